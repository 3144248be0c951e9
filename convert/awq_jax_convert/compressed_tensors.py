# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors ``pack-quantized``, what llm-compressor writes: codes packed along the inputs.

A linear ``[k, n]`` is ``weight_packed`` int32 ``[n, k*b/32]``, ``weight_scale`` ``[n, k/g]``, ``weight_shape`` and,
where it is asymmetric, ``weight_zero_point`` int32 ``[n*b/32, k/g]``, packed along the outputs. Files hold a code c in
-2**(b-1) .. 2**(b-1)-1 as ``c + 2**(b-1)``: for four and eight bits our codes and zeros.
(Format: compressed-tensors 0.19.0, ``compressors/pack_quantized``.)
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax_convert.codec import refuse_damaged_scales
from awq_jax_convert.compressed_tensors_codec import ConfiguredCodec, refuse_bad_scales, refuse_parts
from awq_jax_convert.compressed_tensors_config import PACKED as FORMAT
from awq_jax_convert.safetensors_dir import TensorMeta
from awq_jax_convert.safetensors_header import FLOATS
from awq_jax_convert.scheme import Scheme
from awq_jax_convert.stored import weight_of, words_of
from awq_jax_convert.words import pack_words, unpack_words, widths

__all__ = ["CompressedTensors", "decode", "encode"]

PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
G_IDX = "weight_g_idx"


def decode(name: str, parts: Mapping[str, np.ndarray], scheme: Scheme) -> QTensor:
    """The weight, with numpy leaves.

    Args:
      name: of the module, for errors.
      parts: its tensors by last name component.
      scheme: their number format.

    Raises:
      ValueError: ``weight_shape`` is of another weight, or a scale is NaN or infinite.
    """
    n, words = parts[PACKED].shape
    k = scheme.rows(words * 32 // scheme.bits) * parts[SCALE].shape[1]
    if parts[SHAPE].tolist() != [n, k]:
        raise ValueError(f"weight_shape of {name!r} says {parts[SHAPE].tolist()}, its tensors are of [{n}, {k}].")
    refuse_damaged_scales(name, parts[SCALE])
    zero = None
    if not scheme.symmetric:
        zero = unpack_words(np.ascontiguousarray(parts[ZERO].T), scheme.bits, n)
    return weight_of(parts[PACKED], parts[SCALE].T, zero, bits=scheme.bits, k=k)


def encode(name: str, weight: QTensor, *, symmetric: bool) -> dict[str, np.ndarray]:
    """The tensors of a quantized linear; codes, zeros and scales unchanged.

    Args:
      name: of the module, for example ``model.layers.0.mlp.down_proj``.
      weight: ``[k, n]``, of two, four or eight bits.
      symmetric: leave the zeros out; otherwise a weight without zeros gets those of the middle.

    Raises:
      ValueError: three bits, which readers would take for one of two layouts; zeros where none are meant to be; or a
        scale that is not finite and positive.
    """
    k, n = weight.shape
    scale, bits = np.asarray(weight.scale), weight.bits
    if bits == 3:
        raise ValueError(f"{name!r} has 3 bits, of which compressed-tensors has two layouts. Write the native format.")
    if symmetric and weight.zero is not None:
        raise ValueError(f"{name!r} has zeros, the checkpoint is to be symmetric.")
    refuse_bad_scales(name, scale)
    half = 2 ** (bits - 1)
    made = {
        f"{name}.{PACKED}": words_of(weight),
        f"{name}.{SCALE}": scale.T,
        f"{name}.{SHAPE}": np.array([n, k], np.int64),
    }
    if not symmetric:
        zero = np.full(scale.shape, half, np.uint8) if weight.zero is None else np.asarray(weight.zero, np.uint8)
        made[f"{name}.{ZERO}"] = pack_words(zero, bits).T
    return made


@dataclasses.dataclass(frozen=True)
class CompressedTensors(ConfiguredCodec):
    """The codec of one checkpoint.

    Attributes:
      group_size: of a checkpoint to be written: -1 where every weight has one group.
      symmetric: whether one to be written leaves zeros out.
    """

    group_size: int = 128
    symmetric: bool = False

    format = FORMAT
    parts = (PACKED, SCALE, ZERO, SHAPE, G_IDX)

    def shape(self, name: str, metas: Mapping[str, TensorMeta]) -> tuple[int, int]:
        """``(k, n)`` of a linear from its tensors' headers.

        Raises:
          ValueError: a part is missing or too many, or a dtype or shape does not fit.
        """
        scheme = self.scheme(name, metas)
        if G_IDX in metas:
            raise ValueError(f"{name!r} is quantized in activation order (weight_g_idx), which is not read.")
        refuse_parts(name, metas, {PACKED, SCALE, SHAPE} | (set() if scheme.symmetric else {ZERO}))
        packed, scale, shape = metas[PACKED], metas[SCALE], metas[SHAPE]
        if packed.dtype != "I32" or scale.dtype not in FLOATS or shape.dtype not in ("I32", "I64"):
            raise ValueError(
                f"{name!r} is not pack-quantized: weight_packed is {packed.dtype}, weight_scale {scale.dtype}, "
                f"weight_shape {shape.dtype}; expected I32, a float and I64."
            )
        fits = len(packed.shape) == len(scale.shape) == 2 and shape.shape == (2,) and packed.shape[0] == scale.shape[0]
        if not fits or not self._fits(scheme, metas):
            raise ValueError(
                f"{name!r}: {', '.join(f'{part} {list(meta.shape)}' for part, meta in sorted(metas.items()))} do not "
                f"fit {scheme.bits} bits with group_size={scheme.group_size} of quantization_config."
            )
        return scheme.rows(packed.shape[1] * 32 // scheme.bits) * scale.shape[1], packed.shape[0]

    def _fits(self, scheme: Scheme, metas: Mapping[str, TensorMeta]) -> bool:
        (n, words), groups = metas[PACKED].shape, metas[SCALE].shape[1]
        if scheme.group_size == -1 and (groups != 1 or words * 32 % scheme.bits):
            return False
        k = scheme.rows(words * 32 // scheme.bits) * groups
        zero = metas.get(ZERO)
        if zero and (zero.dtype != "I32" or zero.shape not in [(rows, groups) for rows in widths(n, scheme.bits)]):
            return False
        return k > 0 and n > 0 and k % 2 == 0 and words in widths(k, scheme.bits)

    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        """`decode` of this format."""
        return decode(name, parts, self.scheme(name, parts))

    def encode(self, name: str, weight: QTensor) -> dict[str, np.ndarray]:
        """`encode` of this format."""
        return encode(name, weight, symmetric=self.symmetric)

    def written(self, scheme: Scheme) -> Scheme:
        """Groups or whole columns, zeros or none, as the checkpoint has them."""
        return Scheme(scheme.bits, -1 if self.group_size == -1 else scheme.group_size, self.symmetric)
