# SPDX-License-Identifier: Apache-2.0
"""`int8_matmul`: checks, leading axes and the gradient around XLA's product. No kernel is written for it."""

from typing import Any

import jax
from jaxtyping import Array, Float, Int8, UInt8

from awq_jax_kernels.int4_matmul.backward import frozen
from awq_jax_kernels.int8_matmul import xla

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
    _check(x, packed, scale, zero)
    if packed.ndim > 2:
        return jax.vmap(int8_matmul)(x, packed, scale, zero)
    y = _product(x.reshape(-1, x.shape[-1]), packed, scale, zero)
    return y.reshape(*x.shape[:-1], packed.shape[-1])


def _check(x: Any, packed: Any, scale: Any, zero: Any) -> None:
    """Raise where shapes disagree, naming them all."""
    shapes = f"x {x.shape}, packed {packed.shape}, scale {scale.shape}, zero {None if zero is None else zero.shape}"
    *b, k, n = packed.shape
    if x.shape[-1] != k:
        raise ValueError(f"x must have {k} columns, one for each row of packed: {shapes}.")
    if scale.shape[:-2] != tuple(b) or scale.shape[-1] != n or not scale.shape[-2] or k % scale.shape[-2]:
        raise ValueError(f"scale must be {(*b, 'k/g', n)}, with k/g a divisor of {k}: {shapes}.")
    if zero is not None and zero.shape != scale.shape:
        raise ValueError(f"zero must have the shape of scale: {shapes}.")
    if b and (x.ndim != packed.ndim or x.shape[:-2] != tuple(b)):
        raise ValueError(f"x must have the leading axes of the weight, {(*b, 'm', k)}: {shapes}.")


@jax.custom_vjp
def _differentiable(x: Any, packed: Any, scale: Any, zero: Any) -> Any:
    return xla.int8_matmul(x, packed, scale, zero)


def _forward(x: Any, packed: Any, scale: Any, zero: Any) -> tuple[Any, Any]:
    return _differentiable(x, packed, scale, zero), (packed, scale, zero)


def _backward(weight: Any, dy: Any) -> tuple[Any, Any, Any, Any]:
    return xla.input_cotangent(dy, *weight), *frozen(*weight)


_differentiable.defvjp(_forward, _backward)
_product = jax.jit(_differentiable)
