# SPDX-License-Identifier: Apache-2.0
"""What is in a checkpoint, from its headers alone."""

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from typing import Any

from awq_jax_convert.formats import open_checkpoint
from awq_jax_convert.hf_config import FamilyChoice

__all__ = ["Description", "Row", "describe"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter, or one that every layer has alike.

    Attributes:
      path: with ``*`` for the layer where rows were merged.
      shape: of the dense weight.
      form: for example ``bfloat16`` or ``int4 g128``.
      nbytes: as kept, of one of them.
      count: how many there are.
    """

    path: str
    shape: tuple[int, ...]
    form: str
    nbytes: int
    count: int = 1

    @property
    def bits_per_weight(self) -> float:
        """Bits as kept, scales and zeros included."""
        return 8 * self.nbytes / max(math.prod(self.shape), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """A checkpoint: family, size and format, and its parameters in order."""

    family: str
    num_layers: int
    format: str
    nbytes: int
    parameters: tuple[Row, ...]

    def rows(self, *, collapse: bool) -> Iterator[Row]:
        """The parameters; with ``collapse`` one row for those that differ in the layer's index alone."""
        if not collapse:
            yield from self.parameters
            return
        merged: dict[Row, int] = {}
        for row in self.parameters:
            alike = dataclasses.replace(row, path=re.sub(r"^layers/\d+/", "layers/*/", row.path))
            merged[alike] = merged.get(alike, 0) + 1
        yield from (dataclasses.replace(row, count=count) for row, count in merged.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)


def _in_order(path: str) -> tuple[Any, ...]:
    """embed, layer 0, 1, …, 10, …, then what follows the layers."""
    if path.startswith("layers/"):
        _, index, rest = path.split("/", 2)
        return (1, int(index), rest)
    return (0 if path.startswith("embed/") else 2, 0, path)


def describe(path: str | os.PathLike[str], family: FamilyChoice = None) -> Description:
    """Open a checkpoint directory and list it; ``family`` as for `open_checkpoint`.

    Raises:
      FileNotFoundError, ValueError: as `open_checkpoint`.
    """
    found = open_checkpoint(path, family)
    rows = (
        Row(path=name, shape=found.shape(name), form=found.stored_form(name), nbytes=found.stored_nbytes(name))
        for name in sorted(found.paths(), key=_in_order)
    )
    return Description(
        family=found.family.name,
        num_layers=found.num_layers,
        format=found.format,
        nbytes=found.nbytes,
        parameters=tuple(rows),
    )
