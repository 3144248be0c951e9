# SPDX-License-Identifier: Apache-2.0
"""`int4_matmul`: one function, several implementations, and the rule that picks among them.

An implementation is a module with two functions over 2-d operands::

    supports(x, packed, scale, zero=None, *, config=None) -> str | None    # why not, from shapes and dtypes alone
    int4_matmul(x, packed, scale, zero=None, *, config=None) -> y          # y has the dtype of x

`supports` takes anything with a shape and a dtype. What is common to all of them stands here and in
`awq_jax_kernels.product`: checks, leading axes, batching and the gradient.
"""

import functools
import importlib
from types import ModuleType
from typing import Any, Literal, get_args

import jax
from jaxtyping import Array, Float, Int8, Int32

from awq_jax_kernels import dispatch
from awq_jax_kernels.int4_matmul import xla
from awq_jax_kernels.int4_matmul.tiles import as_rows, is_tiled, rows_shape
from awq_jax_kernels.product import check_groups, check_rows, frozen_weight, over_leading_axes, shapes_of

__all__ = ["IMPLEMENTATIONS", "Implementation", "int4_matmul", "refusal"]

Implementation = Literal["tpu", "gpu", "xla", "reference"]

IMPLEMENTATIONS: dict[str, str] = {
    "tpu": "awq_jax_kernels.int4_matmul.pallas_tpu",
    "gpu": "awq_jax_kernels.int4_matmul.pallas_gpu",
    "xla": "awq_jax_kernels.int4_matmul.xla",
    "reference": "awq_jax_kernels.int4_matmul.reference",
}

_READS_TILES = "gpu"
_EIGHT_BITS = "packed has a byte for each row of x, codes of eight bits; int8_matmul multiplies these"


def int4_matmul(
    x: Float[Array, "..."],
    packed: Int8[Array, "*b k2 n"] | Int32[Array, "*b n128 k64 4 256"],
    scale: Float[Array, "*b groups n"],
    zero: Int8[Array, "*b groups n"] | None = None,
    *,
    implementation: Implementation | None = None,
    config: Any = None,
) -> Float[Array, "..."]:
    """Multiply activations by an INT4 weight, ``y = x @ ((q - zero) * scale)``, without building the dense weight.

    Args:
      x: ``[*b, m, k]``, float32, bfloat16 or float16. For a weight without leading axes, any ``[..., k]``.
      packed: int8 ``[*b, k/2, n]``, the layout of `awq_jax_kernels.nibbles`; or the same codes in the order that
        `awq_jax_kernels.int4_matmul.tiles.prepare` gives them for Hopper GPUs, elsewhere undone in every product.
      scale: floating ``[*b, k/g, n]``; the group size g is ``k // scale.shape[-2]``.
      zero: int8 codes 0..15 ``[*b, k/g, n]``; None is 8 everywhere, a symmetric weight.
      implementation: "tpu", "gpu", "xla" or "reference"; a refusal is then an error. None takes the kernel of the
        platform that the program is lowered for, where it accepts the operands, and XLA's grouped product elsewhere.
      config: block sizes for the implementation named; None takes the tuned or the derived ones.

    Returns:
      ``[*b, m, n]`` or ``[..., n]`` in the dtype of x. The gradient with respect to x is defined; the weight is
      frozen: `packed` and `zero` get float0 cotangents, and that of `scale` is zero.

    Raises:
      ValueError: shapes that disagree, an implementation that refuses, or a config without an implementation.

    >>> import jax.numpy as jnp
    >>> packed = jnp.full((1, 1), 0x21 ^ 0x88 - 256, jnp.int8)  # codes 1 and 2, down one column
    >>> scale, zero = jnp.full((1, 1), 0.5), jnp.zeros((1, 1), jnp.int8)
    >>> int4_matmul(jnp.array([[10.0, 100.0]]), packed, scale, zero).item()
    105.0
    """
    shapes = shapes_of(x=x, packed=packed, scale=scale, zero=zero)
    rows = rows_shape(packed)
    if x.shape[-1] == rows[-2]:
        raise ValueError(f"int4_matmul takes no such weight: {_EIGHT_BITS}: {shapes}.")
    check_rows(x, rows, 2, shapes)
    check_groups(x.shape[-1], rows, scale, zero, shapes)
    if config is not None and implementation is None:
        raise ValueError("config belongs to one implementation: name it, such as implementation='tpu'.")
    return over_leading_axes(functools.partial(_multiply, implementation, config), x, packed, scale, zero)


def refusal(
    implementation: Implementation, x: Any, packed: Any, scale: Any, zero: Any = None, *, config: Any = None
) -> str | None:
    """Why an implementation can't take these 2-d operands (anything with a shape and a dtype), or None if it can."""
    if x.shape[-1] == rows_shape(packed)[-2]:
        return _EIGHT_BITS
    if implementation == "tpu" and is_tiled(packed):
        return "packed is in the tile order of a GPU"
    module = _module(implementation)
    return module if isinstance(module, str) else module.supports(x, packed, scale, zero, config=config)


@functools.cache
def _module(implementation: str) -> ModuleType | str:
    """The module of an implementation, imported on first use, or why there is none."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; choose from {', '.join(IMPLEMENTATIONS)}.")
    try:
        return importlib.import_module(IMPLEMENTATIONS[implementation])
    except ModuleNotFoundError as error:
        if error.name == IMPLEMENTATIONS[implementation]:
            return "not built"
        return f"needs {error.name}, which is not installed"


def _multiply(implementation: Implementation | None, config: Any, x: Any, *weight: Any) -> Any:
    """The product of 2-d operands that something takes."""
    packed, scale, _ = weight
    # Without a name the program may be lowered for any platform, and "xla" is the only one that runs on all of them.
    dispatch.require(
        _ways(config, x, *weight),
        ("tpu", "gpu", "xla") if implementation is None else (implementation,),
        f"int4_matmul takes x {x.dtype}{list(x.shape)}, packed {list(packed.shape)}, "
        f"scale {scale.dtype}{list(scale.shape)}",
    )
    return _product(implementation, config)(x, *weight)


@functools.cache
def _product(implementation: Implementation | None, config: Any) -> Any:
    cotangent = lambda dy, packed, *rest: xla.input_cotangent(dy, as_rows(packed), *rest)
    return frozen_weight(_batched(implementation, config), cotangent)


@functools.cache
def _batched(implementation: Implementation | None, config: Any) -> Any:
    """The chosen function with a batching rule: rows of x that share a weight are rows of one product."""

    @jax.custom_batching.custom_vmap
    def product(x: Any, packed: Any, scale: Any, zero: Any) -> Any:
        return _choose(implementation, config, x, packed, scale, zero)

    @product.def_vmap
    def _(size: int, mapped: Any, x: Any, packed: Any, scale: Any, zero: Any) -> tuple[Any, bool]:
        over_x, *over_weight = mapped
        if any(jax.tree.leaves(over_weight)):
            axes = (0 if over_x else None, *jax.tree.map(lambda m: 0 if m else None, tuple(over_weight)))
            choose = functools.partial(_choose, implementation, config)
            return jax.vmap(choose, in_axes=axes, axis_size=size)(x, packed, scale, zero), True
        # Mapping a kernel would fetch the weight once per row of the batch.
        y = product(x.reshape(-1, x.shape[-1]), packed, scale, zero)
        return y.reshape(size, -1, scale.shape[-1]), True

    return product


def _choose(implementation: Implementation | None, config: Any, *operands: Any) -> Any:
    ways = _ways(config, *operands)
    return dispatch.stage(ways, "xla", operands) if implementation is None else ways[implementation].run(*operands)


def _ways(config: Any, *operands: Any) -> dict[str, dispatch.Way]:
    """The implementations."""
    platforms = {"tpu": "tpu", "gpu": dispatch.cuda()}
    return {
        name: dispatch.Way(
            functools.partial(refusal, name, *operands, config=config),
            functools.partial(_run, name, config=config),
            platforms.get(name),
        )
        for name in get_args(Implementation)
    }


def _run(implementation: str, x: Any, packed: Any, scale: Any, zero: Any, *, config: Any) -> Any:
    module: Any = _module(implementation)
    packed = packed if implementation == _READS_TILES else as_rows(packed)
    return module.int4_matmul(x, packed, scale, zero, config=config)
