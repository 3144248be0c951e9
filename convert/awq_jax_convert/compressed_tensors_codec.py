# SPDX-License-Identifier: Apache-2.0
"""What the formats of compressed-tensors have in common: one config, whose groups give modules their number formats."""

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax_convert.compressed_tensors_config import ConfigGroup, groups_of, read_groups, scheme_of, to_config
from awq_jax_convert.safetensors_dir import TensorMeta
from awq_jax_convert.scheme import Scheme

__all__ = ["ConfiguredCodec", "refuse_bad_scales", "refuse_parts"]

HEAD = "lm_head"
"""What transformers calls every model's output head, whatever its checkpoints do (GPT-NeoX: ``embed_out``).

Its loader quantizes whatever ``ignore`` does not name, the head too; a name that matches nothing is passed over.
"""


@dataclasses.dataclass(frozen=True)
class ConfiguredCodec(abc.ABC):
    """The codec of one checkpoint, as far as its config tells.

    Attributes:
      groups: what its ``config_groups`` say; empty for one that is yet to be written.
      ignore: modules that stay dense.
    """

    groups: tuple[ConfigGroup, ...] = ()
    ignore: tuple[str, ...] = ()

    name = "compressed-tensors"
    scale_part = "weight_scale"
    parts = ()
    format: ClassVar[str]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ConfiguredCodec":
        """Read a ``quantization_config``.

        Raises:
          ValueError: anything in it that is not understood.
        """
        groups, ignore = read_groups(config)
        return cls(groups, ignore)

    def to_config(self) -> dict[str, Any]:
        """The ``quantization_config`` that other loaders read."""
        return to_config(self.groups, self.ignore, self.format)

    def scheme(self, name: str, parts: Iterable[str]) -> Scheme:
        """The number format that the config gives a module.

        Raises:
          ValueError: no target matches it.
        """
        return scheme_of(self.groups, name)

    @abc.abstractmethod
    def shape(self, name: str, metas: Mapping[str, TensorMeta]) -> tuple[int, int]:
        """``(k, n)`` of a linear from its tensors' headers; raises ValueError where they don't fit."""

    @abc.abstractmethod
    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        """The weight, with numpy leaves."""

    @abc.abstractmethod
    def encode(self, name: str, weight: QTensor) -> dict[str, np.ndarray]:
        """The tensors of a quantized linear, by full name."""

    @abc.abstractmethod
    def written(self, scheme: Scheme) -> Scheme:
        """What the config of a checkpoint to be written says of weights in memory that have this number format."""

    def skipping(self, dense: Iterable[str], quantized: Mapping[str, Scheme]) -> "ConfiguredCodec":
        """This codec with a config group for every number format in use, and the modules that stay dense."""
        schemes = {name: self.written(found) for name, found in quantized.items()}
        return dataclasses.replace(self, groups=groups_of(schemes), ignore=tuple(sorted({HEAD, *dense})))


def refuse_parts(name: str, metas: Mapping[str, TensorMeta], wanted: set[str]) -> None:
    """Refuse a module whose tensors are not those that its number format asks for.

    Raises:
      ValueError: naming what there is and what is wanted.
    """
    if set(metas) != wanted:
        raise ValueError(
            f"quantized module {name!r} has {', '.join(sorted(metas))}, its scheme asks for "
            f"{', '.join(sorted(wanted))}; download the checkpoint again."
        )


def refuse_bad_scales(name: str, scale: np.ndarray) -> None:
    """Refuse to write scales that loaders can't multiply by.

    Raises:
      ValueError: naming the module and how many.
    """
    bad = int((~np.isfinite(scale) | (scale <= 0)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {scale.size} scales of {name!r} are not finite and positive. Leave this weight unquantized with "
            "an override."
        )
