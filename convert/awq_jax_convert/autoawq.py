# SPDX-License-Identifier: Apache-2.0
"""AutoAWQ's ``gemm`` files, what the Hub calls an AWQ checkpoint: codes packed along the outputs.

A linear ``[k, n]`` is three tensors: ``qweight`` int32 ``[k, n/8]``, ``qzeros`` int32 ``[k/g, n/8]`` and ``scales``
float16 ``[k/g, n]``. Nibble i of word c holds output ``8c + ORDER[i]``. Codes and zeros are those of `QTensor`; only
the words differ. (Format: AutoAWQ 88e4c76, ``awq/utils/packing_utils.py``.)
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int8, Int32, UInt8, UInt32, UInt64

from awq_jax._qtensor import QTensor
from awq_jax_convert.codec import refuse_damaged_scales
from awq_jax_convert.safetensors_dir import TensorMeta
from awq_jax_convert.scheme import Scheme

__all__ = ["ORDER", "VERSIONS", "AutoAWQ", "decode", "encode", "pack", "unpack"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PARTS = ("qweight", "qzeros", "scales")
VERSIONS = ("gemm", "gemv", "gemv_fast")
_KEYS = {"quant_method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version"}
# Run-time choices of other loaders: they don't change what the bytes mean.
_HARMLESS = {"modules_to_not_convert", "backend", "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "exllama_config"}


def pack(codes: UInt8[np.ndarray, "r n"]) -> Int32[np.ndarray, "r n8"]:
    """Eight codes of neighbouring outputs to an int32 word, in AutoAWQ's order.

    Raises:
      ValueError: the number of outputs is not a multiple of 8.

    >>> hex(pack(np.arange(8, dtype=np.uint8)[None]).view(np.uint32)[0, 0])
    '0x75316420'
    """
    r, n = codes.shape
    if n % 8:
        raise ValueError(f"AutoAWQ packs outputs in eights; {n} outputs are not a multiple of 8.")
    return _words(np.ascontiguousarray(codes).view("<u8").reshape(r, n // 8)).view("<i4")


def unpack(words: Int32[np.ndarray, "r n8"]) -> UInt8[np.ndarray, "r n"]:
    """Inverse of `pack`.

    >>> unpack(pack(np.arange(8, dtype=np.uint8)[None])).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    r, n8 = words.shape
    return _eights(words).view(np.uint8).reshape(r, 8 * n8)


# Eight codes, one to a byte, and eight in a word: ORDER puts those of even outputs into the word's lower half and those
# of odd ones into the upper. Whole 64-bit words are ten times as quick as an index for each code.
_EVERY_OTHER, _CLOSE = np.uint64(0x000F000F000F000F), np.uint64(0xFFFF)
_ODD, _UPPER = np.uint64(0x0F000F000F000F00), np.uint64(0xFFFF0000)
# A product with four powers of two moves four nibbles side by side to bit 48; no two meet on the way, so none carries.
_EVEN_TO_48 = np.uint64(1 << 48 | 1 << 36 | 1 << 24 | 1 << 12)
_ODD_TO_48 = np.uint64(1 << 40 | 1 << 28 | 1 << 16 | 1 << 4)
# Bytes worked on at a time. Numpy holds the interpreter between two operations: with blocks of 128 kB two threads took
# twice as long as one, with these half as long.
_BLOCK = 1 << 20


def _words(eights: UInt64[np.ndarray, "r n8"]) -> UInt32[np.ndarray, "r n8"]:
    """Codes of neighbouring outputs, each in the lower half of its byte, to AutoAWQ's words."""
    even, odd = eights & _EVERY_OTHER, eights & _ODD
    even *= _EVEN_TO_48
    even >>= np.uint64(48)
    odd *= _ODD_TO_48
    odd >>= np.uint64(32)
    odd &= _UPPER
    even |= odd
    return even.astype("<u4")


def _eights(words: Int32[np.ndarray, "r n8"]) -> UInt64[np.ndarray, "r n8"]:
    """Inverse of `_words`."""

    def apart(half: np.ndarray) -> np.ndarray:
        pairs = (half | (half << np.uint64(24))) & np.uint64(0x000000FF000000FF)
        return (pairs | (pairs << np.uint64(12))) & _EVERY_OTHER

    wide = np.ascontiguousarray(words).view("<u4").astype("<u8")
    return apart(wide & _CLOSE) | (apart(wide >> np.uint64(16)) << np.uint64(8))


def _qweight(packed: Int8[np.ndarray, "k2 n"]) -> Int32[np.ndarray, "k n8"]:
    """``pack(unpack_numpy(packed))`` without a byte for each code."""
    k2, n = packed.shape
    eights = np.ascontiguousarray(packed).view("<u8").reshape(k2, n // 8)
    out = np.empty((k2, 2, n // 8), "<u4")
    for rows in _row_blocks(k2, n):
        both = eights[rows] ^ np.uint64(0x8888888888888888)
        out[rows, 0] = _words(both)
        both >>= np.uint64(4)
        out[rows, 1] = _words(both)
    return out.reshape(2 * k2, n // 8).view("<i4")


def _packed(qweight: Int32[np.ndarray, "k n8"]) -> Int8[np.ndarray, "k2 n"]:
    """Inverse of `_qweight`."""
    k, n8 = qweight.shape
    if k % 2:
        raise ValueError(f"a weight of {k} rows can't be held: two rows share a byte.")
    pairs, out = qweight.reshape(k // 2, 2, n8), np.empty((k // 2, n8), "<u8")
    for rows in _row_blocks(k // 2, 8 * n8):
        both = _eights(pairs[rows, 0]) | (_eights(pairs[rows, 1]) << np.uint64(4))
        out[rows] = both ^ np.uint64(0x8888888888888888)
    return out.view(np.int8).reshape(k // 2, 8 * n8)


def _row_blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(width, 1))
    return (slice(at, at + step) for at in range(0, rows, step))


def _float16_scales(name: str, scale: np.ndarray, round_scales: bool) -> np.ndarray:
    wide = scale.astype(np.float32)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    bad = int((~np.isfinite(narrow) | (narrow <= 0)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {narrow.size} scales of {name!r} are not finite and positive in float16, the dtype that AutoAWQ "
            f"stores (they span {wide.min():g} to {wide.max():g}). Leave this weight unquantized with an override, or "
            "write the native format."
        )
    if not round_scales and not np.array_equal(narrow.astype(np.float32), wide):
        raise ValueError(
            f"the scales of {name!r} are {scale.dtype} and lose precision in float16, the dtype that AutoAWQ stores; "
            "the codes were rounded against other values. Quantize with float16 scales, convert with --dtype float16 "
            "(round_scales=True here), or write compressed-tensors, which holds them."
        )
    return narrow


def encode(name: str, weight: QTensor, *, round_scales: bool = False) -> dict[str, np.ndarray]:
    """The three tensors of a quantized linear; codes and zeros unchanged, a symmetric weight gets zeros of 8.

    Args:
      name: of the module, for example ``model.layers.0.mlp.down_proj``.
      weight: ``[k, n]``.
      round_scales: let scales that float16 can't hold be rounded to it.

    Returns:
      ``name.qweight``, ``name.qzeros`` and ``name.scales``.

    Raises:
      ValueError: n is not a multiple of 8, or a scale is not finite, positive and exact in float16.
    """
    _, n = weight.shape
    if n % 8:
        raise ValueError(
            f"{name!r} of shape {weight.shape} has {n} outputs; AutoAWQ needs a multiple of 8. Leave it unquantized "
            "with an override, or write the native format."
        )
    scale = np.asarray(weight.scale)
    zero = np.full(scale.shape, 8, np.uint8) if weight.zero is None else np.asarray(weight.zero).astype(np.uint8)
    if zero.max(initial=0) > 15:
        raise ValueError(f"{name!r} has a zero of {zero.max()}; codes lie in 0..15.")
    return {
        f"{name}.qweight": _qweight(np.asarray(weight.packed)),
        f"{name}.qzeros": pack(zero),
        f"{name}.scales": _float16_scales(name, scale, round_scales),
    }


def decode(name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
    """Inverse of `encode`, with numpy leaves; zeros that are all 8 become None, a symmetric weight.

    Args:
      name: of the module, for errors.
      parts: ``qweight``, ``qzeros`` and ``scales``.

    Raises:
      ValueError: a scale is NaN or infinite.
    """
    scale, zero = parts["scales"], unpack(parts["qzeros"])
    refuse_damaged_scales(name, scale)
    return QTensor(
        packed=_packed(parts["qweight"]),
        scale=scale,
        zero=None if (zero == 8).all() else zero.astype(np.int8),
    )


@dataclasses.dataclass(frozen=True)
class AutoAWQ:
    """The codec of one checkpoint: what its ``quantization_config`` says.

    Attributes:
      group_size: rows per scale, -1 for the whole column.
      skip: ``modules_to_not_convert``; an entry matches every module whose name contains it.
    """

    group_size: int
    skip: tuple[str, ...] = ()

    name = "autoawq"
    parts = PARTS
    scale_part = "scales"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "AutoAWQ":
        """Read a ``quantization_config``, or the ``quant_config.json`` of older files; their version is not looked at.

        Raises:
          ValueError: an attribute, version, bit width or group size that is not known here.
        """
        unknown = sorted(set(config) - _KEYS - _HARMLESS)
        if unknown:
            raise ValueError(f"quantization_config has attributes that are not understood: {', '.join(unknown)}.")
        version, bits = config.get("version", "gemm"), config.get("bits", config.get("w_bit"))
        if not isinstance(version, str) or version.lower() not in VERSIONS:
            raise ValueError(f"AWQ version {version!r} is not read; {', '.join(VERSIONS)} are.")
        if type(bits) is not int or bits != 4:
            raise ValueError(f"AWQ with bits={bits!r} is not read; 4 is.")
        group = config.get("group_size", config.get("q_group_size"))
        if type(group) is not int or (group != -1 and group < 1):
            raise ValueError(f"AWQ with group_size={group!r} is not read; it is a positive number, or -1.")
        skip = config.get("modules_to_not_convert") or []
        if not isinstance(skip, list) or not all(isinstance(name, str) for name in skip):
            raise ValueError(f"modules_to_not_convert is {str(skip)[:80]}; it is a list of module names, or null.")
        return cls(group, tuple(skip))

    def to_config(self) -> dict[str, Any]:
        """The ``quantization_config`` that other loaders read.

        ``zero_point`` is true even for symmetric weights, whose zeros are 8: vLLM's fast kernels ask for it.
        """
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(self.skip) or None,
        }

    def scheme(self, name: str, parts: Iterable[str]) -> Scheme:
        """The number format; whether all zeros are 8 is not known from headers."""
        return Scheme(4, self.group_size, False)

    def shape(self, name: str, metas: Mapping[str, TensorMeta]) -> tuple[int, int]:
        """``(k, n)`` of a linear from its tensors' headers, which must agree with each other and with the config.

        Raises:
          ValueError: a part is missing, or a dtype or shape does not fit.
        """
        missing = [part for part in PARTS if part not in metas]
        if missing:
            raise ValueError(f"quantized module {name!r} lacks {', '.join(missing)}; download the checkpoint again.")
        weight, zeros, scales = (metas[part] for part in PARTS)
        if (weight.dtype, zeros.dtype) != ("I32", "I32") or scales.dtype != "F16" or len(weight.shape) != 2:
            raise ValueError(
                f"{name!r} is not AutoAWQ gemm: qweight {weight.dtype}{list(weight.shape)}, qzeros {zeros.dtype}, "
                f"scales {scales.dtype}; expected I32, I32 and F16."
            )
        k, n8 = weight.shape
        g = k if self.group_size == -1 else self.group_size
        if not g or k % g or k % 2 or zeros.shape != (k // g, n8) or scales.shape != (k // g, 8 * n8):
            raise ValueError(
                f"{name!r}: qweight {list(weight.shape)}, qzeros {list(zeros.shape)} and scales {list(scales.shape)} "
                f"do not fit group_size={self.group_size} of quantization_config; with {k} inputs and "
                f"{8 * n8} outputs the scales are [k/g, n]."
            )
        return k, 8 * n8

    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        """`decode` of this format."""
        return decode(name, parts)

    def encode(self, name: str, weight: QTensor) -> dict[str, np.ndarray]:
        """`encode` of this format, after checking the group size.

        Raises:
          ValueError: the weight's group size is not the checkpoint's, or see `encode`.
        """
        g = weight.shape[-2] if self.group_size == -1 else self.group_size
        if weight.group_size != g:
            raise ValueError(
                f"{name!r} has group_size={weight.group_size}, the checkpoint {self.group_size}: an AWQ checkpoint "
                "has one. Quantize all weights with the same group size, or write the native format."
            )
        return encode(name, weight)

    def skipping(self, dense: Iterable[str], quantized: Iterable[str]) -> "AutoAWQ":
        """This codec with the modules that stay dense.

        Raises:
          ValueError: an entry's name is part of a quantized module's name, which would make loaders skip that too.
        """
        skip = tuple(sorted(dense))
        clash = next(((s, q) for q in quantized for s in skip if s in q), None)
        if clash:
            raise ValueError(
                f"module {clash[0]!r} stays dense and {clash[1]!r} is quantized, but modules_to_not_convert matches "
                "by substring. Quantize both or neither."
            )
        return dataclasses.replace(self, skip=skip)
