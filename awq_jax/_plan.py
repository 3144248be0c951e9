# SPDX-License-Identifier: Apache-2.0
"""From a family's table and a recipe to what will be done to one layer: static, hashable, checked before any work."""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence

from awq_jax._gram import block_rows
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

    def gram_block(self, k: int, limit: int | None, experts: int = 1) -> int:
        """Rows of the blocks of its Gram matrix that are kept: whole groups of every sink; k is all of it."""
        return block_rows(k, math.lcm(*(spec.rows_per_group(k) for _, spec, _ in self.quantized)), limit, experts)

    @property
    def quantized(self) -> tuple[tuple[str, QuantSpec, bool], ...]:
        """(path, spec, clip) of the sinks that are quantized."""
        rows = zip(self.group.sinks, self.specs, self.clip, strict=True)
        return tuple((path, spec, clip) for path, spec, clip in rows if spec is not None)

    @property
    def int8_inputs(self) -> bool:
        """Whether a sink multiplies int8 activations."""
        return any(spec.activations != "float" for _, spec, _ in self.quantized)

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

    def gram_block(self, tap: str, k: int, experts: int = 1) -> int:
        """`GroupPlan.gram_block` of the group that is observed at a tap."""
        (plan,) = (plan for plan in self.groups if plan.quantized and plan.group.sinks[0] == tap)
        return plan.gram_block(k, self.search.gram_limit, experts)


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
      ValueError: a group size does not divide a width, an override matches no weight, a Gram matrix that is needed
        whole is over its limit, or a mixture of experts is to be quantized on inputs that pass through quantized
        layers, to be refined or to take int8 activations.
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
        _refuse_int8_experts(family, plan)
        _refuse_blocks(plan, widths)
        plans.append(plan)
    names = [path for row in map(_relative, family.groups) for path in row.sinks]
    weights = [f"layers/{index}/{path}" for index in range(layers) for path in names]
    _refuse_unused((glob for glob, _ in recipe.overrides if glob not in used), weights)
    return tuple(plans)


def _refuse_int8_experts(family: Family, plan: LayerPlan) -> None:
    """What rounding activations costs is measured on a sample of tokens, and a router sends each expert others."""
    odd = next((group for group in plan.groups if group.group.per_expert and group.int8_inputs), None)
    if odd is not None:
        raise ValueError(
            f"family {family.name!r} has experts, and int8 activations are not implemented for them. Leave "
            f"{odd.group.sinks[0]} in floating point (--override '*/{odd.group.sinks[0]}=float'), or take "
            "activations='float'."
        )


def _refuse_blocks(plan: LayerPlan, widths: Mapping[str, int]) -> None:
    """What makes up for drift solves with the whole of a Gram matrix."""
    for tap in plan.taps if plan.propagate else ():
        if plan.gram_block(tap, widths[tap]) < widths[tap]:
            raise ValueError(
                f"the Gram matrix of the {widths[tap]} inputs of {tap} takes {4 * widths[tap] ** 2} bytes, over a "
                f"gram_limit of {plan.search.gram_limit}; propagate='quantized' needs all of it. Raise the limit "
                "(--gram-limit), or use 'dense'."
            )


def _refuse_unused(globs: Iterable[str], weights: Sequence[str]) -> None:
    if unused := sorted(globs):
        shadowed = bool(fnmatch.filter(weights, unused[0]))
        raise ValueError(
            f"override {unused[0]!r} matches no weight{' that one before it leaves' if shadowed else ''}; weights are "
            "named like 'layers/0/attn/q'. A glob may use '*', for example 'layers/*/mlp/down'."
        )
