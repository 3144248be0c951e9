# SPDX-License-Identifier: Apache-2.0
"""Which quantized format a checkpoint is in: one row per format."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax_convert.autoawq import AutoAWQ
from awq_jax_convert.safetensors_dir import TensorMeta

__all__ = ["Codec", "codec_of"]


@runtime_checkable
class Codec(Protocol):
    """A format that keeps a linear in several tensors, ``module.part`` for each of ``parts``."""

    @property
    def name(self) -> str:
        """What users call the format."""
        ...

    @property
    def group_size(self) -> int:
        """Rows per scale, -1 for the whole column."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Last name components of a quantized linear's tensors."""
        ...

    def shape(self, name: str, metas: Mapping[str, TensorMeta]) -> tuple[int, int]:
        """``(k, n)`` from headers alone; raises ValueError where they don't fit the format."""
        ...

    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        """The weight, with numpy leaves."""
        ...

    def encode(self, name: str, weight: QTensor) -> dict[str, np.ndarray]:
        """The tensors, by full name."""
        ...

    def skipping(self, dense: Iterable[str], quantized: Iterable[str]) -> "Codec":
        """The codec of a checkpoint whose other linears stay dense; raises ValueError where it can't say so."""
        ...

    def to_config(self) -> dict[str, Any]:
        """The checkpoint's ``quantization_config``."""
        ...


_FORMATS = {"awq": AutoAWQ.from_config}


def codec_of(config: Any) -> Codec | None:
    """The codec that a ``quantization_config`` asks for, None for a dense checkpoint.

    Raises:
      ValueError: the method, or something it says, is not read here.
    """
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method not in _FORMATS:
        raise ValueError(
            f"the checkpoint is quantized with {method!r}, which is not read; read are {', '.join(_FORMATS)}. "
            "Convert it to that, or start from the dense checkpoint."
        )
    return _FORMATS[method](config)
