# SPDX-License-Identifier: Apache-2.0
"""`ragged_int4_matmul`: a mixture of experts' product, each expert's weight in INT4."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from awq_jax_kernels.dispatch import Way, dispatch
from awq_jax_kernels.int4_matmul import api as dense_api
from awq_jax_kernels.int4_matmul import pallas_tpu
from awq_jax_kernels.product import check_groups, check_rows, shapes_of
from awq_jax_kernels.ragged_int4_matmul import reference
from awq_jax_kernels.ragged_int4_matmul.tiles import in_tiles

__all__ = ["ragged_int4_matmul"]

Implementation = Literal["tpu", "xla", "reference"]


def ragged_int4_matmul(
    x: Float[Array, "m k"],
    packed: Int8[Array, "e k2 n"],
    scale: Float[Array, "e groups n"],
    zero: Int8[Array, "e groups n"] | None,
    group_sizes: Int32[Array, " e"],
    *,
    implementation: Implementation | None = None,
    config: Any = None,
    tile: int = 16,
) -> Float[Array, "m n"]:
    """Multiply rows sorted by expert, each by its expert's weight: ``y[i] = x[i] @ ((q[e] - zero[e]) * scale[e])``.

    Rows move into tiles that belong to one expert each, at most ``m // tile + e`` of them. On a TPU all tiles are one
    kernel, which reads from scalar memory whose weight to fetch; elsewhere a loop multiplies a tile at a time.

    Args:
      x: ``[m, k]``, the rows of expert 0 first, then those of expert 1, and so on.
      packed: int8 ``[e, k/2, n]``.
      scale: ``[e, k/g, n]``.
      zero: int8 ``[e, k/g, n]``, or None for 8 everywhere.
      group_sizes: int32 ``[e]``, rows of each expert. Rows past their sum give zero.
      implementation: as in `awq_jax_kernels.int4_matmul.int4_matmul`.
      config: a `BlockConfig`, with implementation "tpu" alone.
      tile: rows in a tile: about m / e, and a multiple of 16 for a TPU; at least 1.

    Returns:
      ``[m, n]`` in the dtype of x. Differentiable with respect to x.

    Raises:
      ValueError: shapes that disagree, a config without its implementation, or the implementation named refuses the
        operands.

    >>> x, packed = jnp.array([[1.0, 1.0], [2.0, 2.0]]), jnp.array([[[0]], [[1]]], jnp.int8)  # codes 8, 8 and 9, 8
    >>> scale = jnp.ones((2, 1, 1))
    >>> ragged_int4_matmul(x, packed, scale, None, jnp.array([1, 1], jnp.int32)).ravel().tolist()
    [0.0, 2.0]
    """
    _check(x, packed, scale, zero, group_sizes)
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"unknown implementation {implementation!r}; choose from {', '.join(get_args(Implementation))}."
        )
    if config is not None and implementation != "tpu":
        raise ValueError("config belongs to the kernel: name it, implementation='tpu'.")
    if tile < 1:
        raise ValueError(f"tile is {tile}; a tile has at least one row.")
    if implementation == "reference":
        return reference.ragged_int4_matmul(x, packed, scale, zero, group_sizes)
    if not x.shape[0]:
        return jnp.zeros((0, packed.shape[2]), x.dtype)
    tiles, experts, place = in_tiles(x, group_sizes, tile)
    y = _multiply_tiles(tiles, packed, scale, zero, experts, implementation=implementation, config=config)
    return y.reshape(-1, y.shape[-1]).at[place].get(mode="fill", fill_value=0)


def _check(x: Any, packed: Any, scale: Any, zero: Any, group_sizes: Any) -> None:
    """Raise where shapes disagree: an index past the last expert would read its weight."""
    shapes = shapes_of(x=x, packed=packed, scale=scale, zero=zero, group_sizes=group_sizes)
    if len(packed.shape) != 3 or len(x.shape) != 2 or group_sizes.shape != packed.shape[:1]:
        raise ValueError(f"x must be (m, k), packed (e, k/2, n) and group_sizes (e,): {shapes}.")
    check_rows(x, packed.shape[1:], 2, shapes)
    check_groups(x.shape[-1], packed.shape, scale, zero, shapes)


def _multiply_tiles(
    tiles: Any, packed: Any, scale: Any, zero: Any, experts: Any, implementation: Any, config: Any
) -> Any:
    """``[tiles, tile, k]`` to ``[tiles, tile, n]``."""
    operands = (tiles, packed, scale, zero, experts)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), operands[:4])
    refusal = functools.partial(dense_api.refusal, "tpu", *one, config=config)
    ways = {
        "tpu": Way(refusal, functools.partial(_differentiable, config), "tpu"),
        "xla": Way(lambda: None, _loop),
    }
    what = f"ragged_int4_matmul takes tiles {tiles.shape} and packed {packed.shape}"
    return dispatch(implementation, ways, "xla", operands, what)


def _loop(tiles: Any, packed: Any, scale: Any, zero: Any, experts: Any) -> Any:
    """One tile after the other, so that one expert's weight is sliced at a time."""

    def multiply(operands: tuple[Any, Any]) -> Any:
        rows, expert = operands
        weight = jax.tree.map(lambda leaf: leaf[expert], (packed, scale, zero))
        return dense_api.int4_matmul(rows, *weight, implementation="xla")

    return jax.lax.map(multiply, (tiles, experts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(config: Any, tiles: Any, packed: Any, scale: Any, zero: Any, experts: Any) -> Any:
    return pallas_tpu.multiply_tiles(tiles, packed, scale, zero, experts, config=config)


def _forward(config: Any, *operands: Any) -> tuple[Any, Any]:
    return _differentiable(config, *operands), operands


def _backward(_: Any, operands: Any, dy: Any) -> Any:
    _, pull = jax.vjp(_loop, *operands)
    return pull(dy)


_differentiable.defvjp(_forward, _backward)
