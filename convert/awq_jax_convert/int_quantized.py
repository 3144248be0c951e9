# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors ``int-quantized``, what llm-compressor writes for W8A8: a byte for each code, not packed.

A linear ``[k, n]`` is ``weight`` int8 ``[n, k]``, ``weight_scale`` ``[n, k/g]`` and, where activations have one static
scale, ``input_scale`` ``[1]``. Codes are symmetric around 0: our bytes, transposed.
Steps of dynamic activations are in no file: they are ``max|x| / 127`` in vLLM and here, ``max|x| / 127.5`` in
compressed-tensors' own code (docs/formats.md, "Steps by token").
(Format: compressed-tensors 0.19.0, ``compressors/naive_quantized``.)
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax_convert.codec import refuse_damaged_scales
from awq_jax_convert.compressed_tensors_codec import ConfiguredCodec, refuse_bad_scales, refuse_parts
from awq_jax_convert.compressed_tensors_config import INTS
from awq_jax_convert.safetensors_dir import TensorMeta
from awq_jax_convert.safetensors_header import FLOATS
from awq_jax_convert.scheme import Scheme

__all__ = ["IntQuantized"]

WEIGHT, SCALE, INPUT = "weight", "weight_scale", "input_scale"


@dataclasses.dataclass(frozen=True)
class IntQuantized(ConfiguredCodec):
    """The codec of one checkpoint."""

    format = INTS
    parts = (WEIGHT, SCALE, INPUT)

    def shape(self, name: str, metas: Mapping[str, TensorMeta]) -> tuple[int, int]:
        """``(k, n)`` of a linear from its tensors' headers.

        Raises:
          ValueError: a part is missing or too many, or a dtype or shape does not fit.
        """
        scheme = self.scheme(name, metas)
        refuse_parts(name, metas, {WEIGHT, SCALE} | ({INPUT} if scheme.activations == "tensor" else set()))
        weight, scale = metas[WEIGHT], metas[SCALE]
        fits = weight.dtype == "I8" and scale.dtype in FLOATS and len(weight.shape) == 2 and all(weight.shape)
        if fits:
            n, k = weight.shape
            fits = k % scheme.rows(k) == 0 and scale.shape == (n, k // scheme.rows(k))
        if INPUT in metas:
            fits = fits and metas[INPUT].dtype in FLOATS and metas[INPUT].shape in [(), (1,)]
        if not fits:
            found = ", ".join(f"{part} {meta.dtype}{list(meta.shape)}" for part, meta in sorted(metas.items()))
            raise ValueError(
                f"{name!r}: {found} do not fit int8 codes [n, k] with group_size={scheme.group_size} of "
                "quantization_config."
            )
        return weight.shape[1], weight.shape[0]

    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        """The weight, with numpy leaves.

        Raises:
          ValueError: a scale is NaN or infinite.
        """
        scale, step = np.ascontiguousarray(parts[SCALE].T), None
        refuse_damaged_scales(name, scale)
        if INPUT in parts:
            refuse_damaged_scales(name, parts[INPUT])
            step = np.full(scale.shape, parts[INPUT].astype(np.float32).reshape(()))
        return QTensor(
            packed=np.ascontiguousarray(parts[WEIGHT].T),
            scale=scale,
            bits=8,
            activations=self.scheme(name, parts).activations,
            input_scale=step,
        )

    def encode(self, name: str, weight: QTensor) -> dict[str, np.ndarray]:
        """The tensors of a quantized linear; codes and scales unchanged.

        Raises:
          ValueError: another width, zeros, or a scale that is not finite and positive.
        """
        if weight.bits != 8 or weight.zero is not None:
            raise ValueError(f"{name!r} is not a symmetric weight of 8 bits, which is what int-quantized files hold.")
        scale = np.asarray(weight.scale)
        refuse_bad_scales(name, scale)
        made = {f"{name}.{WEIGHT}": np.asarray(weight.packed).T, f"{name}.{SCALE}": scale.T}
        if weight.input_scale is not None:
            made[f"{name}.{INPUT}"] = np.asarray(weight.input_scale, np.float32)[0, :1]
        return made

    def written(self, scheme: Scheme) -> Scheme:
        """Whole columns are said as such, and there are no zeros; a scheme knows its activations."""
        return dataclasses.replace(scheme, group_size=-1, symmetric=True)
