# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors ``int-quantized``, what llm-compressor writes for W8A8: a byte for each code, not packed.

A linear ``[k, n]`` is ``weight`` int8 ``[n, k]``, ``weight_scale`` ``[n, k/g]`` and, where activations have one static
scale, ``input_scale`` ``[1]``. Codes are symmetric around 0: our bytes, transposed.
(Format: compressed-tensors 0.19.0, ``compressors/naive_quantized``.)
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax_convert.codec import refuse_damaged_scales
from awq_jax_convert.compressed_tensors_config import INTS, ConfigGroup, groups_of, read_groups, scheme_of, to_config
from awq_jax_convert.safetensors_dir import TensorMeta
from awq_jax_convert.safetensors_header import FLOATS
from awq_jax_convert.scheme import Scheme

__all__ = ["IntQuantized"]

WEIGHT, SCALE, INPUT = "weight", "weight_scale", "input_scale"


@dataclasses.dataclass(frozen=True)
class IntQuantized:
    """The codec of one checkpoint.

    Attributes:
      groups: what its ``config_groups`` say; empty for one that is yet to be written.
      ignore: modules that stay dense.
    """

    groups: tuple[ConfigGroup, ...] = ()
    ignore: tuple[str, ...] = ()

    name = "compressed-tensors"
    parts = (WEIGHT, SCALE, INPUT)
    scale_part = SCALE

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "IntQuantized":
        """Read a ``quantization_config``.

        Raises:
          ValueError: anything in it that is not understood.
        """
        groups, ignore = read_groups(config)
        return cls(groups, ignore)

    def to_config(self) -> dict[str, Any]:
        """The ``quantization_config`` that other loaders read."""
        return to_config(self.groups, self.ignore, INTS)

    def scheme(self, name: str, parts: Iterable[str]) -> Scheme:
        """The number format that the config gives a module.

        Raises:
          ValueError: no target matches it.
        """
        return scheme_of(self.groups, name)

    def shape(self, name: str, metas: Mapping[str, TensorMeta]) -> tuple[int, int]:
        """``(k, n)`` of a linear from its tensors' headers.

        Raises:
          ValueError: a part is missing or too many, or a dtype or shape does not fit.
        """
        scheme = self.scheme(name, metas)
        wanted = {WEIGHT, SCALE} | ({INPUT} if scheme.activations == "tensor" else set())
        if set(metas) != wanted:
            raise ValueError(
                f"quantized module {name!r} has {', '.join(sorted(metas))}, its scheme asks for "
                f"{', '.join(sorted(wanted))}; download the checkpoint again."
            )
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
        bad = int((~np.isfinite(scale) | (scale <= 0)).sum())
        if bad:
            raise ValueError(
                f"{bad} of {scale.size} scales of {name!r} are not finite and positive. Leave this weight unquantized "
                "with an override."
            )
        made = {f"{name}.{WEIGHT}": np.asarray(weight.packed).T, f"{name}.{SCALE}": scale.T}
        if weight.input_scale is not None:
            made[f"{name}.{INPUT}"] = np.asarray(weight.input_scale, np.float32)[0, :1]
        return made

    def skipping(self, dense: Iterable[str], quantized: Mapping[str, Scheme]) -> "IntQuantized":
        """This codec with a config group for every number format in use, and the modules that stay dense.

        ``quantized`` knows its activations; whole columns are said as such, and there are no zeros.
        """
        schemes = {name: dataclasses.replace(found, group_size=-1, symmetric=True) for name, found in quantized.items()}
        return dataclasses.replace(self, groups=groups_of(schemes), ignore=tuple(sorted(dense)))
