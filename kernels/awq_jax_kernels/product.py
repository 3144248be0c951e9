# SPDX-License-Identifier: Apache-2.0
"""What surrounds a product with a quantized weight, whatever its codes: checks, leading axes, and a gradient for x.

An operation writes its product over 2-d operands, ``y[m, n]`` from ``x[m, k]`` and a weight of some leaves, the codes
first; the rest is here.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["check_groups", "check_rows", "frozen_weight", "over_leading_axes", "shapes_of", "unmapped"]


def shapes_of(**operands: Any) -> str:
    """Shapes by name, for errors."""
    return ", ".join(f"{name} {None if leaf is None else leaf.shape}" for name, leaf in operands.items())


def check_rows(x: Any, packed: tuple[int, ...], per_byte: int, shapes: str) -> None:
    """Raise ValueError where x has not a column for each code of a column of packed, or lacks its leading axes."""
    *b, rows, _ = packed
    if x.shape[-1] != per_byte * rows:
        each = {1: "one", 2: "two"}[per_byte]
        raise ValueError(f"x must have {per_byte * rows} columns, {each} for each row of packed: {shapes}.")
    if b and (x.ndim != len(packed) or x.shape[:-2] != tuple(b)):
        raise ValueError(f"x must have the leading axes of the weight, {(*b, 'm', x.shape[-1])}: {shapes}.")


def check_groups(k: int, packed: tuple[int, ...], scale: Any, zero: Any, shapes: str) -> None:
    """Raise ValueError where scales don't divide k rows into groups, or zeros have another shape."""
    *b, _, n = packed
    if scale.shape[:-2] != tuple(b) or scale.shape[-1] != n or not scale.shape[-2] or k % scale.shape[-2]:
        raise ValueError(f"scale must be {(*b, 'k/g', n)}, with k/g a divisor of {k}: {shapes}.")
    if zero is not None and zero.shape != scale.shape:
        raise ValueError(f"zero must have the shape of scale: {shapes}.")


def over_leading_axes(product: Callable[..., Any], x: Any, packed: Any, scale: Any, *rest: Any) -> Any:
    """The product of 2-d operands over leading axes: those of a weight one by one, those of x alone as rows."""
    if scale.ndim > 2:
        return jax.vmap(lambda *one: over_leading_axes(product, *one))(x, packed, scale, *rest)
    y = product(x.reshape(-1, x.shape[-1]), packed, scale, *rest)
    return y.reshape(*x.shape[:-1], scale.shape[-1])


def frozen_weight(product: Callable[..., Any], input_cotangent: Callable[..., Any]) -> Callable[..., Any]:
    """The product of 2-d operands, compiled, with a gradient for x alone.

    Args:
      product: ``y`` from ``(x, *weight)``.
      input_cotangent: ``dx`` from ``(dy, *weight)``.

    Returns:
      The same function. Codes get float0 cotangents, scales get zero.
    """

    @jax.custom_vjp
    def differentiable(x: Any, *weight: Any) -> Any:
        return product(x, *weight)

    def forward(x: Any, *weight: Any) -> tuple[Any, Any]:
        return differentiable(x, *weight), weight

    def backward(weight: Any, dy: Any) -> tuple[Any, ...]:
        return input_cotangent(dy, *weight), *jax.tree.map(_still, weight)

    differentiable.defvjp(forward, backward)
    return jax.jit(differentiable)


def _still(leaf: Any) -> Any:
    """The cotangent of an operand that is frozen."""
    return jnp.zeros_like(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else np.zeros(leaf.shape, jax.dtypes.float0)


@functools.cache
def unmapped(kernel: Callable[..., Any], definition: Callable[..., Any], **bound: Any) -> Callable[..., Any]:
    """The kernel; mapped over an axis, its definition: a bulk copy reads whole operands and not a slice of a stack.

    Args:
      kernel: of operands that are arrays, trees of them or None.
      definition: computes the same.
      **bound: keywords of both, hashable.

    Returns:
      A function of the operands, the same one for the same arguments: a program that calls it for each layer lowers it
      once.
    """
    kernel, definition = functools.partial(kernel, **bound), functools.partial(definition, **bound)

    @jax.custom_batching.custom_vmap
    def run(*operands: Any) -> Any:
        return kernel(*operands)

    @run.def_vmap
    def _(size: int, mapped: Any, *operands: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda over: 0 if over else None, tuple(mapped))
        y = jax.vmap(definition, axes, axis_size=size)(*operands)
        return y, jax.tree.map(lambda _: True, y)

    return run
