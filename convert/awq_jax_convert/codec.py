# SPDX-License-Identifier: Apache-2.0
"""What a file format of quantized linears has to offer."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax_convert.safetensors_dir import TensorMeta
from awq_jax_convert.scheme import Scheme

__all__ = ["Codec", "WritableCodec", "refuse_damaged_scales"]


@runtime_checkable
class Codec(Protocol):
    """A format that keeps a linear in several tensors, ``module.part`` for each of ``parts``."""

    @property
    def name(self) -> str:
        """What users call the format."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Last name components of a quantized linear's tensors; the first one is always there."""
        ...

    @property
    def scale_part(self) -> str:
        """The part that holds scales."""
        ...

    def scheme(self, name: str, parts: Iterable[str]) -> Scheme:
        """The number format of a module that has these parts."""
        ...

    def shape(self, name: str, metas: Mapping[str, TensorMeta]) -> tuple[int, int]:
        """``(k, n)`` from headers alone; raises ValueError where they don't fit the format."""
        ...

    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        """The weight, with numpy leaves."""
        ...


@runtime_checkable
class WritableCodec(Codec, Protocol):
    """A format that is written too."""

    def encode(self, name: str, weight: QTensor) -> dict[str, np.ndarray]:
        """The tensors, by full name."""
        ...

    def skipping(self, dense: Iterable[str], quantized: Mapping[str, Scheme]) -> "WritableCodec":
        """The codec of a checkpoint with these linears; raises ValueError where it can't say which stay dense."""
        ...

    def to_config(self) -> dict[str, Any]:
        """The checkpoint's ``quantization_config``."""
        ...


def refuse_damaged_scales(name: str, scale: np.ndarray) -> None:
    """Refuse scales that are not numbers.

    Raises:
      ValueError: naming the module and how many.
    """
    bad = scale.size - int(np.isfinite(scale).sum())
    if bad:
        raise ValueError(f"{bad} of {scale.size} scales of {name!r} are NaN or infinite: the checkpoint is damaged.")
