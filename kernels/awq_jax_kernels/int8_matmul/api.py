# SPDX-License-Identifier: Apache-2.0
"""`int8_matmul`: XLA's product; no kernel is written for it."""

from jaxtyping import Array, Float, Int8, UInt8

from awq_jax_kernels.int8_matmul import xla
from awq_jax_kernels.product import check_groups, check_rows, frozen_weight, over_leading_axes, shapes_of

__all__ = ["int8_matmul"]


def int8_matmul(
    x: Float[Array, "..."],
    packed: Int8[Array, "*b k n"],
    scale: Float[Array, "*b groups n"],
    zero: UInt8[Array, "*b groups n"] | None = None,
) -> Float[Array, "..."]:
    """Multiply activations by a weight of eight-bit codes, ``y = x @ ((q - zero) * scale)``, without the dense weight.

    Args:
      x: ``[*b, m, k]``, float32, bfloat16 or float16. For a weight without leading axes, any ``[..., k]``.
      packed: int8 ``q - 128``, ``[*b, k, n]``; see `awq_jax_kernels.layout`.
      scale: floating ``[*b, k/g, n]``; the group size g is ``k // scale.shape[-2]``.
      zero: uint8 codes 0..255 ``[*b, k/g, n]``; None is 128 everywhere, a symmetric weight.

    Returns:
      ``[*b, m, n]`` or ``[..., n]`` in the dtype of x. The gradient with respect to x is defined; the weight is
      frozen, as in `awq_jax_kernels.int4_matmul.int4_matmul`.

    Raises:
      ValueError: shapes that disagree.

    >>> import jax.numpy as jnp
    >>> int8_matmul(jnp.array([[1.0, 10.0]]), jnp.array([[100], [-1]], jnp.int8), jnp.full((1, 1), 0.5)).item()
    45.0
    """
    shapes = shapes_of(x=x, packed=packed, scale=scale, zero=zero)
    check_rows(x, packed.shape, 1, shapes)
    check_groups(x.shape[-1], packed.shape, scale, zero, shapes)
    return over_leading_axes(_product, x, packed, scale, zero)


_product = frozen_weight(xla.int8_matmul, xla.input_cotangent)
