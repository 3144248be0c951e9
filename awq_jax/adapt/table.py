# SPDX-License-Identifier: Apache-2.0
"""Which weights share a scale and what absorbs it: a small table that a person can read and write."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from awq_jax._tie import Tie
from awq_jax.adapt.columns import Columns
from awq_jax.adapt.kernel import is_kernel
from awq_jax.adapt.layout import Layout
from awq_jax.adapt.program import bind_stars, fill_stars, flatten

__all__ = ["Group", "Instance", "Table", "refuse_misfits"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Weights that read one tensor, and the parameter whose channels it is proportional to.

    Paths are those of parameter leaves; ``*`` is one part of a path and stands for the same in the whole group.

    Attributes:
      producer: a norm's gain, or the kernel of a product; None if nothing absorbs a scale.
      sinks: kernels that read what it produces. All of them: one that is left out would change the function.
      bias: added to the producer's channels, or None.
      columns: of the producer's kernel, where only some reach the sinks: v in a fused qkv. None is all.
      offset: 1.0 for norms that multiply by ``1 + gain``.
      tie: where each channel is read by several, as under grouped-query attention.
      reason: why there is no producer.
    """

    producer: str | None
    sinks: tuple[str, ...]
    bias: str | None = None
    columns: Columns | None = None
    offset: float = 0.0
    tie: Tie | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.producer is None:
            return f"{'-':<40} -> {', '.join(self.sinks)}  ({self.reason})"
        notes = [str(self.columns)] if self.columns else []
        notes += [f"+ {self.bias}"] if self.bias else []
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

    @property
    def label(self) -> str | None:
        """The producer, for a report."""
        return f"{self.producer}, {self.group.columns}" if self.group.columns else self.producer


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
        """The table with groups of your own in place of those that their weights were in.

        Weights that are left over of such a group get none: a scale in its producer would change what yours read.
        """
        taken = {sink for group in groups for instance in self.of(group) for sink in instance.sinks}
        kept = [rest for group in self.groups for rest in self._without(group, taken)]
        return dataclasses.replace(self, groups=(*groups, *kept))

    def _without(self, group: Group, taken: set[str]) -> list[Group]:
        instances = list(self.of(group))
        if all(taken.isdisjoint(instance.sinks) for instance in instances):
            return [group]
        rest = []
        for instance in instances:
            sinks = tuple(sink for sink in instance.sinks if sink not in taken)
            if sinks == instance.sinks or (sinks and group.producer is None):
                rest.append(dataclasses.replace(group, producer=instance.producer, bias=instance.bias, sinks=sinks))
            elif sinks:
                gone = next(sink for sink in instance.sinks if sink in taken)
                why = f"{gone}, which reads what {instance.producer} makes too, was put into another group"
                rest.append(Group(producer=None, sinks=sinks, reason=why))
        return rest

    def instances(self) -> Iterator[Instance]:
        """Every group of every layer.

        Raises:
          ValueError: a pattern matches no weight, a weight is in two groups or in none, or is to absorb its own scale.
        """
        seen: dict[str, str] = {}
        for group in self.groups:
            instances = list(self.of(group))
            self._refuse_unmatched(group, {sink for instance in instances for sink in instance.sinks})
            for instance in instances:
                for sink in instance.sinks:
                    if sink in seen:
                        raise ValueError(f"{sink!r} is in two groups: of {seen[sink]} and of {group.producer}.")
                    seen[sink] = str(group.producer)
                if instance.producer in instance.sinks:
                    raise ValueError(f"{instance.producer!r} can't absorb the scale of its own rows; give another.")
                yield instance
        if missing := [path for path in self.weights if path not in seen]:
            raise ValueError(
                f"{missing[0]!r} is in no group; add one, with producer=None and a reason if nothing absorbs a scale."
            )

    def _refuse_unmatched(self, group: Group, found: set[str]) -> None:
        name, known = f"the group {group.producer} -> {', '.join(group.sinks)}", ", ".join(list(self.weights)[:4])
        if group.producer and not bind_stars(group.producer, self.lead):
            raise ValueError(
                f"{name} has a producer that is no gain and no kernel of this function; these are "
                f"{', '.join(list(self.lead)[:4])}, …"
            )
        if unmatched := [sink for sink in group.sinks if not bind_stars(sink, found)]:
            raise ValueError(f"{name} matches no weight by {unmatched[0]!r}; weights are {known}, …")

    def of(self, group: Group) -> Iterator[Instance]:
        """The instances of one group."""
        anchors = [group.producer] if group.producer else list(group.sinks)
        paths: Any = self.lead if group.producer else self.weights
        bound = {stars for anchor in anchors for stars in bind_stars(anchor, paths).values()}
        for stars in sorted(bound, key=lambda s: [(len(part), part) for part in s]):
            sinks = tuple(p for s in group.sinks if (p := fill_stars(s, stars)) in self.weights)
            if sinks:
                fill = lambda pattern, stars=stars: None if pattern is None else fill_stars(pattern, stars)
                yield Instance(group=group, producer=fill(group.producer), bias=fill(group.bias), sinks=sinks)


def refuse_misfits(params: Any, table: Table, *, whole: bool = True) -> None:
    """Refuse parameters that are not those of a table, dense.

    Args:
      params: tree.
      table: of it.
      whole: refuse other shapes; inside `jax.shard_map` a weight may be a shard.

    Raises:
      ValueError: a weight is missing, of another shape, or quantized.
    """
    leaves, _ = flatten(params)
    named = [*table.weights, *(p for i in table.instances() for p in (i.producer, i.bias) if p is not None)]
    for path in named:
        if path not in leaves:
            raise ValueError(
                f"the table's {path!r} is not among the parameters {', '.join(list(leaves)[:4])}, …; propose "
                "with these parameters."
            )
    for path, layout in table.weights.items():
        if is_kernel(leaves[path]):
            raise ValueError(
                f"{path!r} is quantized already; the verbs take dense weights, as "
                "awq_jax.train.merge_adapters(params, {}) makes them."
            )
        if whole and tuple(leaves[path].shape) != layout.shape:
            raise ValueError(
                f"{path!r} has the shape {tuple(leaves[path].shape)}, and {layout.shape} in the table; propose with "
                "these parameters."
            )
