# SPDX-License-Identifier: Apache-2.0
"""Rounding to a grid: from a float weight to codes, scales and zeros."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, UInt8

from awq_jax._operands import refuse_shape, refuse_weight
from awq_jax._qtensor import QTensor
from awq_jax._spec import QuantSpec
from awq_jax_kernels.layout import pack

__all__ = [
    "Ends", "Grid", "code_range", "fake_quantize", "fit_grid", "packed_on", "quantize", "smallest_scale", "to_codes",
]  # fmt: skip


class Grid(NamedTuple):
    """Scale and zero of every (group, output): scale in its storage dtype, zero a float32 whole number."""

    scale: Float[Array, "*b groups n"]
    zero: Float[Array, "*b groups n"]


class Ends(NamedTuple):
    """Clipping thresholds of every (group, output), as fractions of its smallest and of its largest weight."""

    low: Float[Array, "*b groups n"]
    high: Float[Array, "*b groups n"]


def _grouped(weight: Array, spec: QuantSpec) -> Array:
    """[*b, k, n] -> [*b, groups, g, n]."""
    *b, k, n = weight.shape
    g = spec.rows_per_group(k)
    return weight.reshape(*b, k // g, g, n)


def smallest_scale(dtype: Any) -> float:
    """The smallest scale a storage dtype holds; float16 may be subnormal, the others would be flushed to zero."""
    return 2.0**-24 if jnp.dtype(dtype) == jnp.float16 else float(jnp.finfo(dtype).tiny)


def fit_grid(
    weight: Float[Array, "*b k n"], spec: QuantSpec, ratio: Float[Array, "*b groups n"] | Ends | None = None
) -> Grid:
    """The grid that spans each group's range, shrunk by ``ratio``.

    The range always contains 0, so that zero weights stay zero and a one-sided group keeps its values. The scale is
    cast to its storage dtype first and the zero is derived from the stored value. A group with NaN or infinite values
    has the scale NaN, so that nothing made of it looks like a number.

    Args:
      weight: ``[*b, k, n]``.
      spec: the number format.
      ratio: clipping threshold as a fraction of the range, ``[*b, k/g, n]``, or one for each end of it.
    """
    grid = _span(weight, spec, ratio)
    # Asked for by itself: the maximum of a vector with a NaN is a number on some of XLA's backends.
    sound = jnp.isfinite(_grouped(weight, spec)).all(-2)
    return Grid(jnp.where(sound, grid.scale, jnp.nan), grid.zero)


def _span(weight: Array, spec: QuantSpec, ratio: Array | Ends | None) -> Grid:
    """`fit_grid` of numbers."""
    groups = _grouped(weight.astype(jnp.float32), spec)
    high = jnp.maximum(groups.max(-2), 0.0)
    low = jnp.minimum(groups.min(-2), 0.0)
    if ratio is not None:
        ends = ratio if isinstance(ratio, Ends) else Ends(ratio, ratio)
        high, low = high * ends.high, low * ends.low
    if spec.symmetric:
        step = jnp.maximum(high, -low) / (2 ** (spec.bits - 1) - 0.5)
    else:
        step = (high - low) / spec.levels
    # An all-zero group may have any scale: 1 keeps it finite.
    stored = jnp.where(step > 0, jnp.maximum(step, smallest_scale(spec.scale_dtype)), 1.0).astype(spec.scale_dtype)
    scale = stored.astype(jnp.float32)
    zero = jnp.full_like(scale, spec.middle) if spec.symmetric else jnp.clip(-jnp.round(low / scale), 0, spec.levels)
    return Grid(stored, zero)


def code_range(spec: QuantSpec) -> tuple[int, int]:
    """The smallest and the largest code. Symmetric ones lie around the middle, in nibbles 8 whatever the width."""
    half = 2 ** (spec.bits - 1)
    return (spec.middle - half, spec.middle + half - 1) if spec.symmetric else (0, spec.levels)


def _on_grid(weight: Array, grid: Grid, spec: QuantSpec) -> tuple[Array, Array, Array]:
    """(codes as float32 [*b, groups, g, n], zero and scale with the group axis kept)."""
    scale, zero = grid.scale.astype(jnp.float32)[..., None, :], grid.zero[..., None, :]
    low, high = code_range(spec)
    codes = jnp.clip(jnp.round(_grouped(weight.astype(jnp.float32), spec) / scale) + zero, low, high)
    return codes, zero, scale


def to_codes(weight: Float[Array, "*b k n"], grid: Grid, spec: QuantSpec) -> UInt8[Array, "*b k n"]:
    """Nearest codes of a weight on a grid."""
    return _on_grid(weight, grid, spec)[0].reshape(weight.shape).astype(jnp.uint8)


def packed_on(codes: UInt8[Array, "*b k n"], grid: Grid, spec: QuantSpec) -> QTensor:
    """Codes on a grid as a weight."""
    zero = None if spec.symmetric else grid.zero.astype(jnp.int8 if spec.bits <= 4 else jnp.uint8)
    packed = pack(codes, spec.bits)
    return QTensor(packed=packed, scale=grid.scale, zero=zero, bits=spec.bits, activations=spec.activations)


def fake_quantize(
    weight: Float[Array, "*b k n"], spec: QuantSpec, ratio: Float[Array, "*b groups n"] | Ends | None = None
) -> Float[Array, "*b k n"]:
    """``dequantize(quantize(weight))`` without the bytes: float32, what searches evaluate.

    What is no number stays none and the rest of its group is rounded, so that an error computed of both is none either.
    """
    codes, zero, scale = _on_grid(weight, _span(weight, spec, ratio), spec)
    return ((codes - zero) * scale).reshape(weight.shape)


def quantize(
    weight: Float[Array, "*b k n"],
    spec: QuantSpec = QuantSpec(),  # noqa: B008 - frozen
    ratio: Float[Array, "*b groups n"] | Ends | None = None,
) -> QTensor:
    """Round a weight to the nearest codes.

    ``q = clip(round(w / s) + z)``; asymmetric: ``s = (max(w, 0) - min(w, 0)) / (2**bits - 1)``, ``z = -round(min/s)``;
    symmetric: ``s = max|w| / (2**(bits-1) - 1/2)``, ``z`` in the middle.

    Args:
      weight: ``[*b, k, n]``, any float dtype; computed in float32.
      spec: the number format.
      ratio: clipping thresholds ``[*b, k/g, n]`` as fractions of each range, from `search_clip`, or one for each end of
        it, from `settle_clip`.

    Returns:
      The packed weight.

    Raises:
      TypeError: the weight is no array.
      ValueError: it is not ``[*b, k, n]`` floats, the group size does not divide k, or, outside of jit, a scale is not
        finite. A jitted function can't raise: there the scale of a group with NaN or infinite values is NaN, that of
        one whose range the dtype can't hold (in float16 from 982 560) infinite, and nothing that `dequantize` makes of
        either group is a finite number.

    >>> w = jnp.array([[0.0, 1.0], [3.75, -2.75]])
    >>> from awq_jax import dequantize
    >>> dequantize(quantize(w, QuantSpec(group_size=2))).tolist()
    [[0.0, 1.0], [3.75, -2.75]]
    """
    refuse_weight(weight)
    *b, k, n = weight.shape
    groups = k // spec.rows_per_group(k)
    if ratio is not None:
        for ends in ratio if isinstance(ratio, Ends) else (ratio,):
            refuse_shape("ratio", ends, (*b, groups, n), "one for each group and output")
    grid = fit_grid(weight, spec, ratio)
    if not isinstance(grid.scale, Tracer):
        _refuse_overflow(weight, grid.scale)
    return packed_on(to_codes(weight, grid, spec), grid, spec)


def _refuse_overflow(weight: Array, scale: Array) -> None:
    """Refuse scales that are not finite, and say whether the weight is to blame or the dtype."""
    if jnp.isfinite(scale).all():
        return
    bad = int((~jnp.isfinite(weight)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {weight.size} values of a weight {list(weight.shape)} are NaN or infinite; the weight is "
            "damaged, or what computed it overflowed."
        )
    raise ValueError(
        f"a weight {list(weight.shape)} has values up to {float(jnp.abs(weight).max()):.3g}: scales of its groups "
        f"leave the range of {scale.dtype}. Use QuantSpec(scale_dtype='bfloat16')."
    )
