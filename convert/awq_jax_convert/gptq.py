# SPDX-License-Identifier: Apache-2.0
"""GPTQ's files, read: codes packed along the inputs, eight rows to a word.

A linear ``[k, n]`` is ``qweight`` int32 ``[k*b/32, n]``, ``qzeros`` int32 ``[k/g, n*b/32]``, ``scales`` float16
``[k/g, n]`` and ``g_idx`` int32 ``[k]``, the group of each row. Files of version 1 hold zeros less one.
(Format: GPTQModel 7.7.0, ``nn_modules/qlinear``.)
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax_convert.codec import refuse_damaged_scales
from awq_jax_convert.safetensors_dir import TensorMeta
from awq_jax_convert.safetensors_header import FLOATS
from awq_jax_convert.scheme import Scheme
from awq_jax_convert.stored import weight_of
from awq_jax_convert.words import unpack_words

__all__ = ["GPTQ"]

_VERSIONS = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero
_MUST = {"lm_head": (False, None), "pack_dtype": ("int32", "torch.int32", None), "is_marlin_format": (False, None)}
_EMPTY = ("dynamic", "adapter", "rotation", "modules_in_block_to_quantize")


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """The codec of one checkpoint; it is only read.

    Attributes:
      bits: of a code.
      group_size: rows per scale, -1 for the whole column.
      symmetric: whether every zero is in the middle, as the config says; the tensors are checked.
      offset: what is added to a stored zero.
    """

    bits: int
    group_size: int
    symmetric: bool
    offset: int

    name = "gptq"
    parts = ("qweight", "qzeros", "scales", "g_idx")
    scale_part = "scales"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "GPTQ":
        """Read a ``quantization_config``.

        How the codes were found is passed over; what changes their meaning is read or refused.

        Raises:
          ValueError: activation order, a width, group size or file version that is not read.
        """
        bits, group, kind = config.get("bits"), config.get("group_size"), config.get("checkpoint_format", "gptq")
        if type(bits) is not int or bits not in (2, 3, 4, 8):
            raise ValueError(f"GPTQ with bits={bits!r} is not read; 2, 3, 4 and 8 are.")
        if type(group) is not int or (group != -1 and group < 1):
            raise ValueError(f"GPTQ with group_size={group!r} is not read; it is a positive number, or -1.")
        if not isinstance(kind, str) or kind not in _VERSIONS:
            raise ValueError(f"GPTQ with checkpoint_format={kind!r} is not read; {' and '.join(_VERSIONS)} are.")
        if config.get("desc_act") and group != -1 and not config.get("static_groups"):
            raise ValueError(
                "GPTQ in activation order (desc_act) is not read: its rows are not in the order of their groups. "
                "Quantize with desc_act=False, or start from the dense checkpoint."
            )
        odd = [key for key, fine in _MUST.items() if config.get(key) not in fine]
        odd += [key for key in _EMPTY if config.get(key)]
        if odd:
            raise ValueError(f"GPTQ with {', '.join(f'{key}={config[key]!r}' for key in odd)} is not read.")
        return cls(bits, group, config.get("sym") is True, _VERSIONS[kind])

    def scheme(self, name: str, parts: Iterable[str]) -> Scheme:
        """The number format, the same for all."""
        return Scheme(self.bits, self.group_size, self.symmetric)

    def shape(self, name: str, metas: Mapping[str, TensorMeta]) -> tuple[int, int]:
        """``(k, n)`` of a linear from its tensors' headers.

        Raises:
          ValueError: a part is missing, or a dtype or shape does not fit.
        """
        missing = [part for part in self.parts if part not in metas and part != "g_idx"]
        if missing:
            raise ValueError(f"quantized module {name!r} lacks {', '.join(missing)}; download the checkpoint again.")
        weight, zeros, scales = (metas[part] for part in self.parts[:3])
        if (weight.dtype, zeros.dtype) != ("I32", "I32") or scales.dtype not in FLOATS or len(scales.shape) != 2:
            raise ValueError(
                f"{name!r} is not GPTQ: qweight {weight.dtype}, qzeros {zeros.dtype}, scales {scales.dtype}; expected "
                "I32, I32 and a float."
            )
        groups, n = scales.shape
        k = weight.shape[0] * 32 // self.bits if self.group_size == -1 and weight.shape else groups * self.group_size
        order = metas.get("g_idx", TensorMeta("I32", (k,), 0))
        fits = k > 0 and n > 0 and k % 2 == 0 and (groups == 1 or self.group_size != -1)
        fits = fits and weight.shape == (k * self.bits / 32, n) and zeros.shape == (groups, n * self.bits / 32)
        if not fits or order.shape != (k,) or order.dtype not in ("I32", "I64"):
            raise ValueError(
                f"{name!r}: {', '.join(f'{part} {list(meta.shape)}' for part, meta in sorted(metas.items()))} do not "
                f"fit {self.bits} bits with group_size={self.group_size} of quantization_config."
            )
        return k, n

    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        """The weight, with numpy leaves; zeros that are all in the middle become None.

        Raises:
          ValueError: rows are not in the order of their groups, a zero is outside the codes, or a scale is damaged.
        """
        scale, half = parts["scales"], 2 ** (self.bits - 1)
        groups, n = scale.shape
        k = parts["qweight"].shape[0] * 32 // self.bits
        order = parts.get("g_idx")
        if order is not None and not np.array_equal(order, np.arange(k) // (k // groups)):
            raise ValueError(
                f"{name!r} is quantized in activation order: g_idx does not follow its rows. It is not read; quantize "
                "with desc_act=False."
            )
        refuse_damaged_scales(name, scale)
        zero = unpack_words(parts["qzeros"], self.bits, n) + np.uint8(self.offset)
        if self.bits < 8 and zero.max(initial=0) >= 2**self.bits:
            raise ValueError(
                f"{name!r} has zeros of {zero.max()} with codes of {self.bits} bits: programs disagree on what that "
                "means. Quantize to checkpoint_format gptq_v2."
            )
        words = np.ascontiguousarray(parts["qweight"].T)
        return weight_of(words, scale, None if (zero == half).all() else zero, bits=self.bits, k=k)
