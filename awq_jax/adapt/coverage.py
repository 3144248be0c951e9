# SPDX-License-Identifier: Apache-2.0
"""What each weight got and why: no weight is missing, none is rounded to nearest without a word."""

import dataclasses
import json
from collections import Counter

from awq_jax.report import GroupReport, LinearReport

__all__ = ["Coverage"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """The report of `awq_jax.adapt.quantize`.

    Attributes:
      linears: every weight that a product reads, quantized or not.
      groups: every search.
      nbytes: of the parameters after quantizing.
      dense_nbytes: and before.
    """

    linears: tuple[LinearReport, ...]
    groups: tuple[GroupReport, ...]
    nbytes: int
    dense_nbytes: int

    @property
    def methods(self) -> dict[str, int]:
        """How many weights got each method."""
        return dict(Counter(linear.method for linear in self.linears))

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {method}" for method, count in self.methods.items())
        lines = [f"{counts}; {self.dense_nbytes / 1e6:.2f} MB -> {self.nbytes / 1e6:.2f} MB"]
        for group in self.groups:
            gain = "" if group.gain is None else f" error x {group.gain:.3f}"
            lines.append(f"{group.producer or '-'} -> {', '.join(group.sinks)}: {group.rule}{gain}")
        lines += [f"{linear.path}: {linear.method}, {linear.reason}" for linear in self.linears if linear.reason]
        return "\n".join(lines)
