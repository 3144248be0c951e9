# SPDX-License-Identifier: Apache-2.0
"""`w8a8_matmul`: one int8 product that sums in int32, and the float products around it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from awq_jax_kernels.int8_matmul import xla
from awq_jax_kernels.product import check_rows, frozen_weight, over_leading_axes, shapes_of
from awq_jax_kernels.w8a8_matmul.rounding import TOP, round_rows

__all__ = ["w8a8_matmul"]

_MAX_ROWS = (2**31 - 1) // (TOP + 1) ** 2  # of a sum of products that int32 holds whatever the codes are


def w8a8_matmul(
    x: Float[Array, "..."],
    packed: Int8[Array, "*b k n"],
    scale: Float[Array, "*b 1 n"],
    step: Float[Array, "*b"] | None = None,
) -> Float[Array, "..."]:
    """Round activations to int8 and multiply by int8 codes: ``y = (round(x / s) @ c) * s * scale``.

    The product is int8 by int8 with sums in int32, what TPUs and GPUs have units for; scales follow, so a weight has
    one for each column. Rounding is that of `round_rows` (W8A8 of Xiao et al. 2022, SmoothQuant, section 3).

    Args:
      x: ``[*b, m, k]``, float32, bfloat16 or float16. For a weight without leading axes, any ``[..., k]``.
      packed: int8 codes c, symmetric around 0, ``[*b, k, n]``.
      scale: floating ``[*b, 1, n]``.
      step: s of all tokens, ``[*b]``; None is each token's own, ``max|x| / 127``.

    Returns:
      ``[*b, m, n]`` or ``[..., n]`` in the dtype of x; NaN for a token that has a value that is no finite number. The
      gradient passes straight through the rounding of x; the weight is frozen, and so is ``step``.

    Raises:
      ValueError: shapes that disagree, more than one scale for a column, or more rows than sums in int32 allow.

    >>> w8a8_matmul(jnp.array([[127.0, 10.0]]), jnp.array([[1], [2]], jnp.int8), jnp.full((1, 1), 0.5)).item()
    73.5
    """
    _check(x, packed, scale, step)
    return over_leading_axes(_product, x, packed, scale, step)


def _check(x: Any, packed: Any, scale: Any, step: Any) -> None:
    """Raise where shapes disagree, naming them all."""
    shapes = shapes_of(x=x, packed=packed, scale=scale, step=step)
    check_rows(x, packed.shape, 1, shapes)
    *b, k, n = packed.shape
    if scale.shape != (*b, 1, n):
        raise ValueError(f"scale must be {(*b, 1, n)}, one for each column: int32 sums know no groups: {shapes}.")
    if step is not None and step.shape != tuple(b):
        raise ValueError(f"step must be {tuple(b)}, one for each weight: {shapes}.")
    if k > _MAX_ROWS:
        raise ValueError(f"a sum of {k} products of int8 codes may leave int32, which holds {_MAX_ROWS}: {shapes}.")


def _rounded(x: Any, packed: Any, scale: Any, step: Any) -> Any:
    codes, each = round_rows(x, step)
    total = jax.lax.dot_general(codes, packed, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return (total.astype(jnp.float32) * each * scale.astype(jnp.float32)).astype(x.dtype)


def _input_cotangent(dy: Any, packed: Any, scale: Any, step: Any) -> Any:
    return xla.input_cotangent(dy, packed, scale)


_product = frozen_weight(_rounded, _input_cotangent)
