# SPDX-License-Identifier: Apache-2.0
"""AutoAWQ's layouts for decoding kernels, read: ``gemv``, and ``gemv_fast``, which is llm-awq's own.

``gemv``: ``qweight`` int32 ``[n, k/8]`` along the inputs, ``qzeros`` int32 ``[n, w]``, ``scales`` float16 ``[n, 8*w]``,
the last two filled up with zeros. ``gemv_fast``: ``qweight`` int16 ``[n/4, k]``, four outputs interleaved, ``scales``
and the zeros times the scales, negated, float16 ``[8*w, n]``.
(Formats: AutoAWQ 88e4c76, ``awq/modules/linear``; llm-awq d6e797a, ``tinychat``.)
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NoReturn

import numpy as np
from jaxtyping import Int16, UInt8

from awq_jax._qtensor import QTensor
from awq_jax_convert.codec import refuse_damaged_scales
from awq_jax_convert.safetensors_dir import TensorMeta
from awq_jax_convert.scheme import Scheme
from awq_jax_convert.stored import weight_of
from awq_jax_convert.words import unpack_words
from awq_jax_kernels.nibbles import pack_numpy

__all__ = ["AWQFast", "AWQGemv", "unpack_fast"]


def unpack_fast(words: Int16[np.ndarray, "n4 k"]) -> UInt8[np.ndarray, "n k"]:
    """Codes of the interleaved layout: nibble j of a word is code j of 64 inputs of one of four outputs, and so on.

    A row's 32 inputs lie as 4 x 4 pairs, transposed, and in each 8 of them the even ones before the odd ones.
    """
    n4, k = words.shape
    raw = np.ascontiguousarray(words).view(np.uint16).reshape(n4, k // 64, 64)
    nibbles = np.stack([(raw >> np.uint16(4 * place)) & 15 for place in range(4)], axis=-1).astype(np.uint8)
    rows = nibbles.reshape(n4, k // 64, 4, 64).transpose(0, 2, 1, 3).reshape(4 * n4, k // 32, 4, 2, 4)
    pairs = rows.transpose(0, 1, 2, 4, 3).reshape(4 * n4, k // 32, 4, 4, 2)
    return np.ascontiguousarray(pairs.transpose(0, 1, 3, 2, 4)).reshape(4 * n4, k)


def _in_groups(k: int, group_size: int, room: int) -> bool:
    return k > 0 and group_size % 2 == 0 and k % group_size == 0 and k // group_size <= room


def _refuse(name: str, version: str, group_size: int, metas: Mapping[str, TensorMeta]) -> NoReturn:
    said = ", ".join(f"{part} {meta.dtype}{list(meta.shape)}" for part, meta in sorted(metas.items()))
    raise ValueError(f"{name!r} is not AutoAWQ {version} with group_size={group_size}: {said}.")


@dataclasses.dataclass(frozen=True)
class _InFour:
    """What the two have in common: four bits, one group size, scales by this name."""

    group_size: int

    scale_part = "scales"

    def scheme(self, name: str, parts: Iterable[str]) -> Scheme:
        """The number format; whether all zeros are 8 is not known from headers."""
        return Scheme(4, self.group_size, False)


@dataclasses.dataclass(frozen=True)
class AWQGemv(_InFour):
    """The codec of a ``gemv`` checkpoint; it is only read.

    Attributes:
      group_size: rows per scale.
    """

    name = "autoawq-gemv"
    parts = ("qweight", "qzeros", "scales")

    def shape(self, name: str, metas: Mapping[str, TensorMeta]) -> tuple[int, int]:
        """``(k, n)`` of a linear from its tensors' headers; raises ValueError where they don't fit."""
        found = [metas.get(part, TensorMeta("missing", (), 0)) for part in self.parts]
        if [meta.dtype for meta in found] == ["I32", "I32", "F16"] and all(len(meta.shape) == 2 for meta in found):
            (n, k8), (zero_n, words), scales = (meta.shape for meta in found)
            k = 8 * k8
            fits = zero_n == n and scales == (n, 8 * words) and _in_groups(k, self.group_size, 8 * words)
            if fits and n:
                return k, n
        _refuse(name, "gemv", self.group_size, metas)

    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        """The weight, with numpy leaves; zeros that are all 8 become None."""
        k = 8 * parts["qweight"].shape[1]
        groups = k // self.group_size
        scale = np.ascontiguousarray(parts["scales"][:, :groups].T)
        refuse_damaged_scales(name, scale)
        zero = unpack_words(parts["qzeros"], 4, 8 * parts["qzeros"].shape[1])[:, :groups].T
        return weight_of(parts["qweight"], scale, None if (zero == 8).all() else zero, bits=4, k=k)


@dataclasses.dataclass(frozen=True)
class AWQFast(_InFour):
    """The codec of a ``gemv_fast`` or llm-awq checkpoint; it is only read.

    Attributes:
      group_size: rows per scale.
    """

    name = "autoawq-gemv_fast"
    parts = ("qweight", "qzeros", "scaled_zeros", "scales")

    def shape(self, name: str, metas: Mapping[str, TensorMeta]) -> tuple[int, int]:
        """``(k, n)`` of a linear from its tensors' headers; raises ValueError where they don't fit."""
        zeros = [part for part in self.parts[1:3] if part in metas]
        found = [metas.get(part, TensorMeta("missing", (), 0)) for part in ("qweight", *zeros, "scales")]
        if [meta.dtype for meta in found] == ["I16", "F16", "F16"] and all(len(meta.shape) == 2 for meta in found):
            (n4, k), zero, scales = (meta.shape for meta in found)
            fits = zero == scales and scales[1] == 4 * n4 and _in_groups(k, self.group_size, scales[0])
            if fits and n4 and k % 64 == 0:
                return k, 4 * n4
        _refuse(name, "gemv_fast", self.group_size, metas)

    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        """The weight, with numpy leaves; zeros that are all 8 become None.

        Raises:
          ValueError: a zero times its scale does not tell the zero, or a scale is damaged.
        """
        groups = parts["qweight"].shape[1] // self.group_size
        scale = np.ascontiguousarray(parts["scales"][:groups])
        refuse_damaged_scales(name, scale)
        scaled = parts.get("qzeros", parts.get("scaled_zeros"))
        with np.errstate(all="ignore"):
            exact = -np.asarray(scaled)[:groups].astype(np.float64) / scale.astype(np.float64)
        zero = np.round(exact)
        # A product rounded to float16 is off by at most 15 / 2048; what is farther is not a product of a zero.
        odd = int((~(np.abs(exact - zero) < 0.1) | (zero < 0) | (zero > 15)).sum())
        if odd:
            raise ValueError(
                f"{odd} of {zero.size} zeros of {name!r} can't be told from their products with the scales. Quantize "
                "the original weights, or use AutoAWQ's gemm."
            )
        packed = pack_numpy(np.ascontiguousarray(unpack_fast(parts["qweight"]).T))
        return QTensor(packed=packed, scale=scale, zero=None if (zero == 8).all() else zero.astype(np.int8))
