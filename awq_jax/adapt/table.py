# SPDX-License-Identifier: Apache-2.0
"""Which weights share a scale and what absorbs it: a small table that a person can read and write."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from awq_jax._tie import Tie
from awq_jax.adapt.layout import Layout
from awq_jax.adapt.program import bind_stars, fill_stars

__all__ = ["Group", "Instance", "Table"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Weights that read one tensor, and the parameter whose channels it is proportional to.

    Paths are those of parameter leaves; ``*`` is one part of a path and stands for the same in the whole group.

    Attributes:
      producer: a norm's gain, or the kernel of a product; None if nothing absorbs a scale.
      sinks: kernels that read what it produces. All of them: one that is left out would change the function.
      bias: added to the producer's channels, or None.
      offset: 1.0 for norms that multiply by ``1 + gain``.
      tie: where each channel is read by several, as under grouped-query attention.
      reason: why there is no producer.
    """

    producer: str | None
    sinks: tuple[str, ...]
    bias: str | None = None
    offset: float = 0.0
    tie: Tie | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.producer is None:
            return f"{'-':<40} -> {', '.join(self.sinks)}  ({self.reason})"
        notes = [f"+ {self.bias}"] if self.bias else []
        notes += ["1 + gain"] if self.offset else []
        notes += [f"{self.tie.kv_heads} heads, each read {self.tie.repeats} times"] if self.tie else []
        return f"{self.producer:<40} -> {', '.join(self.sinks)}{'  (' + '; '.join(notes) + ')' if notes else ''}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instance:
    """A group with its stars filled in; sinks that do not exist there are left out."""

    group: Group
    producer: str | None
    bias: str | None
    sinks: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """What `propose` found out about a program.

    Attributes:
      groups: every weight is a sink of exactly one.
      weights: layout of each kernel that can be quantized, by path.
      left: kernels that can't, and why.
      source: for each weight the first that reads the same tensor: one statistic serves them all.
      lead: sizes of the leading axes of what absorbs a scale, by path.
    """

    groups: tuple[Group, ...]
    weights: Mapping[str, Layout]
    left: Mapping[str, str]
    source: Mapping[str, str]
    lead: Mapping[str, tuple[int, ...]]

    def __str__(self) -> str:
        lines = ["absorbs the scale                        -> read it", *map(str, self.groups)]
        lines += [f"left alone: {path}  ({reason})" for path, reason in self.left.items()]
        return "\n".join(lines)

    def with_groups(self, *groups: Group) -> "Table":
        """The table with groups of your own in place of those that have the same sinks."""
        new = {sink for group in groups for sink in group.sinks}
        kept = [dataclasses.replace(g, sinks=tuple(s for s in g.sinks if s not in new)) for g in self.groups]
        return dataclasses.replace(self, groups=(*groups, *(g for g in kept if g.sinks)))

    def instances(self) -> Iterator[Instance]:
        """Every group of every layer.

        Raises:
          ValueError: a pattern matches no weight, or a weight is in two groups or in none.
        """
        seen: dict[str, str] = {}
        for group in self.groups:
            found = False
            for instance in self._of(group):
                found = True
                for sink in instance.sinks:
                    if sink in seen:
                        raise ValueError(f"{sink!r} is in two groups: of {seen[sink]} and of {group.producer}.")
                    seen[sink] = str(group.producer)
                yield instance
            if not found:
                raise ValueError(
                    f"the group {group.producer} -> {', '.join(group.sinks)} matches no weight; weights are "
                    f"{', '.join(list(self.weights)[:4])}, …"
                )
        if missing := [path for path in self.weights if path not in seen]:
            raise ValueError(
                f"{missing[0]!r} is in no group; add one, with producer=None and a reason if nothing absorbs a scale."
            )

    def _of(self, group: Group) -> Iterator[Instance]:
        anchors = [group.producer] if group.producer else list(group.sinks)
        paths: Any = self.lead if group.producer else self.weights
        bound = {stars for anchor in anchors for stars in bind_stars(anchor, paths).values()}
        for stars in sorted(bound, key=lambda s: [(len(part), part) for part in s]):
            sinks = tuple(p for s in group.sinks if (p := fill_stars(s, stars)) in self.weights)
            if sinks:
                fill = lambda pattern, stars=stars: None if pattern is None else fill_stars(pattern, stars)
                yield Instance(group=group, producer=fill(group.producer), bias=fill(group.bias), sinks=sinks)
