# SPDX-License-Identifier: Apache-2.0
"""From a family's table and a recipe to what will be done to one layer: static, hashable, checked before any work."""

import dataclasses
from collections.abc import Iterable, Mapping

from awq_jax._spec import GPTQSpec, QuantSpec, Recipe, RefineSpec, SearchSpec
from awq_jax._tie import Tie
from awq_jax.families._table import Family, Group, Linear

__all__ = ["GroupPlan", "LayerPlan", "plan_layers"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """One group of one layer, with paths relative to the layer.

    Attributes:
      group: producer and sinks.
      specs: number format of each sink; None leaves that sink in floating point.
      tie: for grouped-query attention.
      clip: whether each sink's weights are clipped.
    """

    group: Group
    specs: tuple[QuantSpec | None, ...]
    tie: Tie | None
    clip: tuple[bool, ...]

    @property
    def quantized(self) -> tuple[tuple[str, QuantSpec, bool], ...]:
        """(path, spec, clip) of the sinks that are quantized."""
        rows = zip(self.group.sinks, self.specs, self.clip, strict=True)
        return tuple((path, spec, clip) for path, spec, clip in rows if spec is not None)

    def of_one_expert(self) -> "GroupPlan":
        """The plan of a group in which each expert has its own scale, for one of them."""
        return dataclasses.replace(self, group=dataclasses.replace(self.group, per_expert=False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Everything that decides what happens to one layer. Layers with equal plans share one compilation.

    Attributes:
      groups: what shares a scale.
      search: how scales and thresholds are found.
      feedback: how GPTQ rounds; None rounds to nearest.
      propagate: whether inputs are those of the quantized layers before.
      refine: how codes and scales are trained afterwards; None leaves them.
    """

    groups: tuple[GroupPlan, ...]
    search: SearchSpec
    feedback: GPTQSpec | None = None
    propagate: bool = False
    refine: RefineSpec | None = None

    @property
    def taps(self) -> tuple[str, ...]:
        """Where activations are observed: the first linear of each group stands for all."""
        return tuple(plan.group.sinks[0] for plan in self.groups if plan.quantized)


def _relative(group: Group) -> Group:
    """A table row with ``layers/*/`` removed."""
    strip = lambda path: path.removeprefix("layers/*/")
    producer = group.producer
    if producer is not None:
        producer = dataclasses.replace(producer, path=strip(producer.path))
    return dataclasses.replace(
        group,
        producer=producer,
        sinks=tuple(map(strip, group.sinks)),
        float_sinks=tuple(map(strip, group.float_sinks)),
        output=strip(group.output) if group.output else None,
    )


def plan_layers(
    family: Family,
    recipe: Recipe,
    layers: int,
    widths: Mapping[str, int],
    tie: Tie | None = None,
) -> tuple[LayerPlan, ...]:
    """One plan per layer.

    Args:
      family: the table.
      recipe: formats, search and overrides.
      layers: how many.
      widths: contraction width of each sink, by path relative to a layer.
      tie: the model's grouped-query attention, for groups that ask for it.

    Raises:
      ValueError: a group size does not divide a width, an override matches no weight, or a mixture of experts is to be
        quantized on inputs that pass through quantized layers or to be refined.
    """
    if recipe.propagate == "quantized" and any(group.per_expert for group in family.groups):
        raise ValueError(
            f"family {family.name!r} has experts, and quantized layers before a router change which of them a token "
            "reaches: propagate='quantized' is not implemented for it. Use 'dense'."
        )
    if recipe.refine is not None and any(group.per_expert for group in family.groups):
        raise ValueError(
            f"family {family.name!r} has experts, and where a router sends a token has no gradient: refinement is not "
            "implemented for it. Leave it out (--refine 0)."
        )
    used: set[str | None] = set()
    plans = []
    for index in range(layers):
        groups = []
        for row in map(_relative, family.groups):
            decided = [recipe.spec_of(f"layers/{index}/{path}") for path in row.sinks]
            used.update(glob for glob, _ in decided)
            specs = tuple(spec for _, spec in decided)
            for path, spec in zip(row.sinks, specs, strict=True):
                if spec is not None:
                    spec.rows_per_group(widths[path], f"layers/{index}/{path}/kernel")
            tied = isinstance(row.producer, Linear) and row.producer.tie == "gqa"
            clip = tuple(f"layers/*/{path}" not in family.no_clip for path in row.sinks)
            needs_tie = tied and tie is not None and tie.repeats > 1
            groups.append(GroupPlan(group=row, specs=specs, tie=tie if needs_tie else None, clip=clip))
        plan = LayerPlan(
            groups=tuple(groups),
            search=recipe.searches,
            feedback=recipe.feedback,
            propagate=recipe.propagate == "quantized",
            refine=recipe.refine,
        )
        plans.append(plan)
    _refuse_unused(glob for glob, _ in recipe.overrides if glob not in used)
    return tuple(plans)


def _refuse_unused(globs: Iterable[str]) -> None:
    if unused := sorted(globs):
        raise ValueError(
            f"override {unused[0]!r} matches no weight that one before it leaves; weights are named like "
            "'layers/0/attn/q'. A glob may use '*', for example 'layers/*/mlp/down'."
        )
