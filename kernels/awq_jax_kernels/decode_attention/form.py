# SPDX-License-Identifier: Apache-2.0
"""The sizes and options of one attention, checked once."""

import dataclasses
from typing import Any

__all__ = ["Cache", "Form", "form_of"]

Cache = tuple[Any, Any, Any, Any]
"""(k, v, k_scale, v_scale), see `decode_attention`."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What an implementation needs to know besides its arrays.

    Attributes:
      batch, heads, kv, d: sequences, query heads, key heads, channels of a head.
      positions: that the cache has room for.
      span: of which may be read.
      dtype: of the cache.
      scale, window, softcap: see `decode_attention`.
    """

    batch: int
    heads: int
    kv: int
    d: int
    positions: int
    span: int
    dtype: str
    scale: float
    window: int | None
    softcap: float | None


def form_of(qkv: Any, cache: Cache, lengths: Any, turns: Any, *, heads: int, span: int | None, **options: Any) -> Form:
    """The form of operands that agree.

    Raises:
      ValueError: they do not; the message has their shapes.
    """
    k, v, *scales = cache
    (b, rows, d), width = k.shape, qkv.shape[-1]
    kv = (width // d - heads) // 2
    given = f"qkv {qkv.shape}, k {k.shape}, v {v.shape}, lengths {lengths.shape}, {heads} heads"
    if kv < 1 or width != (heads + 2 * kv) * d or heads % kv or rows % kv or qkv.shape != (b, width):
        raise ValueError(
            f"qkv must be [b, (heads + 2 kv) d], and heads and rows of the cache multiples of kv: {given}."
        )
    if v.shape != k.shape or v.dtype != k.dtype or lengths.shape != (b,):
        raise ValueError(f"k and v must be alike, and lengths [b]: {given}.")
    if any((x is not None) != (str(k.dtype) == "int8") for x in scales):
        raise ValueError(f"scales belong to an int8 cache, and it needs them: k is {k.dtype}.")
    if any(x is not None and x.shape != (b, 1, rows) for x in scales):
        raise ValueError(f"scales must be [b, 1, rows of the cache]: {[x.shape for x in scales]}; {given}.")
    if turns is not None and any(x.shape != (b, d) for x in turns):
        raise ValueError(f"turns must be two arrays [b, d]: {[x.shape for x in turns]}; {given}.")
    positions = rows // kv
    return Form(b, heads, kv, d, positions, min(span or positions, positions), str(k.dtype), **options)
