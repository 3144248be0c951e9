# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's ``W4A16_AWQ``, read: codes packed along the outputs, and factors for what a linear reads.

A linear ``[k, n]`` is ``weight`` uint8 ``[n/2, k]``, two outputs to a byte, the even one in the low nibble, in two's
complement; ``weight_scale`` ``[n, k/g]``; and, where nothing before it took its factors, ``pre_quant_scale`` ``[k]``:
``y = (x * pre_quant_scale) w``. There are no zeros. (Format: ModelOpt a2fbac7, ``torch/export/quant_utils.py``.)
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax_convert.codec import refuse_damaged_scales
from awq_jax_convert.factors import FACTORS
from awq_jax_convert.safetensors_dir import TensorMeta
from awq_jax_convert.safetensors_header import FLOATS
from awq_jax_convert.scheme import Scheme
from awq_jax_kernels.nibbles import pack_numpy

__all__ = ["ModelOpt"]

ALGORITHM = "W4A16_AWQ"
WEIGHT, SCALE = "weight", "weight_scale"
# Of config.json and of the file beside it, which says more. Which modules stay dense is told by their tensors.
_KEYS = {"quant_method", "producer", "quant_algo", "group_size", "has_zero_point", "pre_quant_scale"}
_DENSE = {"ignore", "exclude_modules"}
_CACHE = ("kv_cache_quant_algo", "kv_cache_scheme")


@dataclasses.dataclass(frozen=True)
class ModelOpt:
    """The codec of one checkpoint; it is only read.

    Attributes:
      group_size: rows per scale.
    """

    group_size: int

    name = "modelopt"
    parts = (WEIGHT, SCALE, FACTORS)
    scale_part = SCALE

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelOpt":
        """Read ``hf_quant_config.json``, or what config.json repeats of it.

        Raises:
          ValueError: another algorithm, zeros, a quantized cache, no group size, or an attribute that is not known.
        """
        inner = config.get("quantization", {})
        if not isinstance(inner, dict):
            raise ValueError(f"ModelOpt's quantization is {str(inner)[:80]!r}; it is an object.")
        said = {**{key: value for key, value in config.items() if key != "quantization"}, **inner}
        algorithm = said.get("quant_algo")
        if algorithm != ALGORITHM:
            raise ValueError(
                f"ModelOpt's quant_algo {algorithm!r} is not read; {ALGORITHM} is. Start from the dense checkpoint."
            )
        if cached := [key for key in _CACHE if said.get(key)]:
            raise ValueError(
                f"the checkpoint asks for a quantized key and value cache ({cached[0]}={said[cached[0]]!r}), which is "
                "not supported."
            )
        if unknown := sorted(set(said) - _KEYS - _DENSE - set(_CACHE)):
            raise ValueError(f"ModelOpt's config has attributes that are not understood: {', '.join(unknown)}.")
        if said.get("has_zero_point"):
            raise ValueError("ModelOpt with has_zero_point is not read: its files have no zeros.")
        group = said.get("group_size")
        if group is None:
            raise ValueError(
                "hf_quant_config.json is missing, or does not say how many rows share a scale (group_size). Download "
                "the checkpoint again."
            )
        if type(group) is not int or group < 2 or group % 2:
            raise ValueError(f"ModelOpt with group_size={group!r} is not read; it is an even positive number.")
        return cls(group)

    def scheme(self, name: str, parts: Iterable[str]) -> Scheme:
        """The number format, the same for all."""
        return Scheme(4, self.group_size, True)

    def shape(self, name: str, metas: Mapping[str, TensorMeta]) -> tuple[int, int]:
        """``(k, n)`` of a linear from its tensors' headers.

        Raises:
          ValueError: a part is missing, or a dtype or shape does not fit.
        """
        missing = TensorMeta("missing", (), 0)
        weight, scale = metas.get(WEIGHT, missing), metas.get(SCALE, missing)
        if weight.dtype == "U8" and scale.dtype in FLOATS and len(weight.shape) == len(scale.shape) == 2:
            n, k = 2 * weight.shape[0], weight.shape[1]
            factors = metas.get(FACTORS, TensorMeta("F32", (k,), 0))
            fits = n > 0 and k > 0 and k % self.group_size == 0 and scale.shape == (n, k // self.group_size)
            if fits and factors.dtype in FLOATS and factors.shape == (k,):
                return k, n
        said = ", ".join(f"{part} {meta.dtype}{list(meta.shape)}" for part, meta in sorted(metas.items()))
        raise ValueError(
            f"{name!r} is not ModelOpt's {ALGORITHM} with group_size={self.group_size}: {said}; expected weight "
            "U8[n/2, k], weight_scale [n, k/g] and perhaps pre_quant_scale [k]."
        )

    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        """The weight alone, with numpy leaves; its factors are `awq_jax_convert.factors`'s to deal with."""
        refuse_damaged_scales(name, parts[SCALE])
        raw = parts[WEIGHT]
        nibbles = np.stack([raw & 15, raw >> 4], axis=1).reshape(-1, raw.shape[1])  # [n, k]
        # Two's complement v + 8 is the nibble with its highest bit turned.
        codes = np.ascontiguousarray(nibbles.T) ^ np.uint8(8)
        return QTensor(packed=pack_numpy(codes), scale=np.ascontiguousarray(parts[SCALE].T))
