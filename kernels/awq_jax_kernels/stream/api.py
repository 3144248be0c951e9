# SPDX-License-Identifier: Apache-2.0
"""A decoder layer as a chain of products: each reads the norm of a residual stream, or adds to it.

A norm divides each row, and a product is linear in its rows. So the product of a norm is the product of the weighted
rows, divided; and who makes the rows sums their squares. On a Hopper GPU that leaves nothing to launch between the
products of a layer but attention.
"""

import functools
from typing import Any, Literal

from jaxtyping import Array, Float, Float32, Int8, Int32

from awq_jax_kernels.dispatch import Way, cuda, dispatch
from awq_jax_kernels.gated.api import check
from awq_jax_kernels.int4_matmul.tiles import rows_shape
from awq_jax_kernels.product import check_groups, check_rows, shapes_of, unmapped
from awq_jax_kernels.stream import pallas_gpu, reference
from awq_jax_kernels.stream.reference import Stream, normed

__all__ = ["Stream", "add_product", "normed", "product", "start"]


def start(total: Float[Array, "m d"], weight: Float[Array, " d"], *, offset: float = 0.0) -> Stream:
    """A stream whose norm nothing has read yet.

    Args:
      total: ``[m, d]``.
      weight: ``[d]``, of the norm that reads it.
      offset: 1 for models that store the weight less one.

    >>> import jax.numpy as jnp
    >>> stream = start(jnp.array([[3.0, 4.0]]), jnp.array([1.0, 2.0]))
    >>> stream.weighted.tolist(), stream.squares.tolist()
    ([[3.0, 8.0]], [[25.0]])
    """
    return reference.start(total, weight, offset=offset)


def product(
    stream: Stream,
    packed: Int8[Array, "k2 n"] | Int32[Array, "n128 k64 4 256"],
    scale: Float[Array, "groups n"],
    zero: Int8[Array, "groups n"] | None = None,
    *,
    eps: float,
    activation: str | None = None,
    implementation: Literal["gpu", "reference"] | None = None,
) -> Float[Array, "m columns"]:
    """``norm(total) @ ((q - zero) * scale)``, and with an activation ``activation(gate) * up`` of its two halves.

    Args:
      stream: ``[m, d]``.
      packed, scale, zero: as in `int4_matmul`.
      eps: of the norm, ``total / sqrt(mean(total**2) + eps) * (offset + weight)``.
      activation: as in `awq_jax_kernels.gated`; None leaves the product as it is.
      implementation: "gpu" or "reference"; a refusal is then an error. None takes the kernel where this process has
        a GPU and the kernel takes the operands.

    Returns:
      ``[m, n]``, or ``[m, n/2]``, in the dtype of the stream. There is no gradient.

    Raises:
      ValueError: shapes that disagree, an unknown activation, or a kernel that was named and refuses.

    >>> import jax.numpy as jnp
    >>> packed = jnp.full((1, 1), 0x21 ^ 0x88 - 256, jnp.int8)  # codes 1 and 2, down one column
    >>> scale, zero = jnp.full((1, 1), 0.5), jnp.zeros((1, 1), jnp.int8)
    >>> stream = start(jnp.array([[1.0, 7.0]]), jnp.ones(2))
    >>> product(stream, packed, scale, zero, eps=0.0).item()  # (1 + 14) / 2, divided by 5
    1.5
    """
    _check(stream.weighted, packed, scale, zero)
    if activation is not None:
        check(scale, activation)
    bound = {"eps": eps, "activation": activation}
    operands = (stream, packed, scale, zero)
    refusal = functools.partial(pallas_gpu.refusal_to_multiply, *operands, **bound)
    ways = {
        "gpu": Way(refusal, unmapped(pallas_gpu.product, reference.product, **bound), cuda()),
        "reference": Way(lambda: None, functools.partial(reference.product, **bound)),
    }
    return dispatch(implementation, ways, "reference", operands, _what("product", stream.weighted, scale))


def add_product(
    stream: Stream,
    x: Float[Array, "m k"],
    packed: Int8[Array, "k2 n"] | Int32[Array, "n128 k64 4 256"],
    scale: Float[Array, "groups n"],
    zero: Int8[Array, "groups n"] | None = None,
    *,
    weight: Float32[Array, " n"],
    offset: float = 0.0,
    implementation: Literal["gpu", "reference"] | None = None,
) -> Stream:
    """The stream ``total + x @ ((q - zero) * scale)``, ready for its next norm.

    Args:
      stream: ``[m, n]``.
      x: ``[m, k]``.
      packed, scale, zero: as in `int4_matmul`.
      weight: float32 ``[n]``, of the norm that reads the sum.
      offset: 1 for models that store the weight less one.
      implementation: as in `product`.

    Raises:
      ValueError: shapes that disagree, or a kernel that was named and refuses.

    >>> import jax.numpy as jnp
    >>> packed = jnp.full((1, 2), 0x21 ^ 0x88 - 256, jnp.int8)  # codes 1 and 2, down both columns
    >>> scale, zero = jnp.full((1, 2), 0.5), jnp.zeros((1, 2), jnp.int8)
    >>> stream = start(jnp.array([[1.0, 2.0]]), jnp.ones(2))
    >>> add_product(stream, jnp.array([[2.0, 4.0]]), packed, scale, zero, weight=jnp.ones(2)).total.tolist()
    [[6.0, 7.0]]
    """
    _check(x, packed, scale, zero)
    if stream.total.shape != (x.shape[0], scale.shape[-1]) or weight.shape != scale.shape[-1:]:
        shapes = shapes_of(stream=stream.total, x=x, scale=scale, weight=weight)
        raise ValueError(f"stream must be (m, n) and weight (n,) for x (m, k) and scale (k/g, n): {shapes}.")
    operands = (stream, x, weight, packed, scale, zero)
    refusal = functools.partial(pallas_gpu.refusal_to_add, *operands, offset=offset)
    ways = {
        "gpu": Way(refusal, unmapped(pallas_gpu.add_product, reference.add_product, offset=offset), cuda()),
        "reference": Way(lambda: None, functools.partial(reference.add_product, offset=offset)),
    }
    return dispatch(implementation, ways, "reference", operands, _what("add_product", x, scale))


def _check(x: Any, packed: Any, scale: Any, zero: Any) -> None:
    shapes, rows = shapes_of(x=x, packed=packed, scale=scale, zero=zero), rows_shape(packed)
    check_rows(x, rows, 2, shapes)
    check_groups(x.shape[-1], rows, scale, zero, shapes)


def _what(name: str, x: Any, scale: Any) -> str:
    return f"{name} takes x {x.dtype}{list(x.shape)} and scale {scale.dtype}{list(scale.shape)}"
