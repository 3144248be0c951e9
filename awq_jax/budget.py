# SPDX-License-Identifier: Apache-2.0
"""Bits under a budget: which group of which layer gets which width, so that the model loses least.

What counts is what a weight takes when codes lie close: its own bits, and its share of its group's scale and zero,
``bits + (scale bits + 8) / group size``, without the 8 where weights are symmetric. The mean is over all weights that
are quantized. Embeddings, head and norms are not, nor is what an override leaves in floating point.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax._allocate import allocate
from awq_jax._plan import LayerPlan
from awq_jax._publish import beside, write_bytes
from awq_jax._spec import QuantSpec, Recipe
from awq_jax.hosts import Hosts
from awq_jax.sensitivity import Measuring as Measuring
from awq_jax.sensitivity import Units, divergences
from awq_jax.sharding import Layout
from awq_jax_convert.fit import fused
from awq_jax_convert.formats import refuse_misfit
from awq_jax_convert.hf import HFCheckpoint

__all__ = ["WIDTHS", "Choice", "Chosen", "Question", "choose", "kept_beside", "mean_bits"]

WIDTHS = (2, 3, 4, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What one unit got: linears that take a width together, those of a group of the family's table.

    Attributes:
      sinks: paths of the linears, ``layers/0/attn/q``.
      weights: how many there are.
      bits: the width that was chosen.
      kl: divergence of the model from itself with these linears alone rounded, nats a token, at each width;
        None where it is not finite.
    """

    sinks: tuple[str, ...]
    weights: int
    bits: int
    kl: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """A budget and what came of it.

    Attributes:
      budget: mean bits of a weight that were asked for at most.
      mean: what the choice comes to.
      widths: that competed.
      predicted: sum of the chosen ones' divergences, nats a token.
      choices: of every unit.
    """

    budget: float
    mean: float
    widths: tuple[int, ...]
    predicted: float
    choices: tuple[Choice, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def applied(self, plans: Sequence[LayerPlan]) -> tuple[LayerPlan, ...]:
        """Plans with the widths that were chosen."""
        bits = {path: choice.bits for choice in self.choices for path in choice.sinks}
        return tuple(_with_widths(index, plan, bits) for index, plan in enumerate(plans))

    def recorded(self, recipe: Recipe) -> Recipe:
        """The recipe that makes the same model without a budget: the choice as overrides."""
        made = ((path, dataclasses.replace(recipe.quant, bits=c.bits)) for c in self.choices for path in c.sinks)
        return dataclasses.replace(recipe, overrides=(*recipe.overrides, *made))


def _with_widths(index: int, plan: LayerPlan, bits: Mapping[str, int]) -> LayerPlan:
    """A layer's plan with other widths for some of its linears."""
    groups = []
    for group in plan.groups:
        named = zip(group.group.sinks, group.specs, strict=True)
        specs = tuple(
            spec if spec is None else dataclasses.replace(spec, bits=bits.get(f"layers/{index}/{path}", spec.bits))
            for path, spec in named
        )
        groups.append(dataclasses.replace(group, specs=specs))
    return dataclasses.replace(plan, groups=tuple(groups))


def _stored_bits(spec: QuantSpec, shape: Sequence[int]) -> int:
    """Of a weight ``[*b, k, n]``: codes, and a scale and a zero for each group."""
    k = shape[-2]
    for_group = (32 if spec.scale_dtype == "float32" else 16) + (0 if spec.symmetric else 8)
    return math.prod(shape) * spec.bits + math.prod(shape) // spec.rows_per_group(k) * for_group


def _quantized(plans: Sequence[LayerPlan]) -> Iterator[tuple[str, QuantSpec]]:
    for index, plan in enumerate(plans):
        for group in plan.groups:
            yield from ((f"layers/{index}/{path}", spec) for path, spec, _ in group.quantized)


def _total_bits(checkpoint: HFCheckpoint, plans: Sequence[LayerPlan]) -> int:
    return sum(_stored_bits(spec, checkpoint.shape(f"{path}/kernel")) for path, spec in _quantized(plans))


def _weights(checkpoint: HFCheckpoint, plans: Sequence[LayerPlan]) -> dict[str, int]:
    """How many weights each quantized linear has, by path."""
    return {path: math.prod(checkpoint.shape(f"{path}/kernel")) for path, _ in _quantized(plans)}


def mean_bits(checkpoint: HFCheckpoint, plans: Sequence[LayerPlan]) -> float:
    """What a quantized weight takes in the mean, scales and zeros included; 0 where none is quantized."""
    return _total_bits(checkpoint, plans) / max(1, sum(_weights(checkpoint, plans).values()))


def _widths(format: str, quant: QuantSpec) -> tuple[int, ...]:
    """Those of `WIDTHS` that a file format holds.

    Raises:
      ValueError: there is nothing to choose from.
    """
    held, reason = [], ""
    for bits in WIDTHS:
        try:
            refuse_misfit(format, {dataclasses.replace(quant, bits=bits)})
            held.append(bits)
        except ValueError as error:
            reason = str(error)
    if len(held) < 2:
        only = f"{format} holds {held[0]} bits alone" if held else f"{format} holds none of the widths"
        raise ValueError(f"a budget (--budget) chooses between widths, but {only}: {reason}")
    return tuple(held)


def _units(checkpoint: HFCheckpoint, plans: Sequence[LayerPlan], recipe: Recipe, format: str) -> list[Units]:
    """By layer, linears that no override names; together those of a group and those that a format makes one of.

    Raises:
      ValueError: an override fixes one of several weights that must have one format.
    """
    found = []
    for index, plan in enumerate(plans):
        free = lambda path: recipe.spec_of(f"layers/{index}/{path}")[0] is None  # noqa: B023 - used in this turn
        units = [tuple(p for p, _, _ in group.quantized if free(p)) for group in plan.groups]
        units = [unit for unit in units if unit]
        for paths in _tied(checkpoint, index, plan, format):
            within = [unit for unit in units if set(unit) & set(paths)]
            if within and not all(map(free, paths)):
                fixed = next(path for path in paths if not free(path))
                raise ValueError(
                    f"layers/{index}/{fixed} has an override, and {format} files need one number format for it and "
                    f"{', '.join(path for path in paths if path != fixed)}. Name all of them in overrides, or write "
                    "the native format (--format native)."
                )
            if len(within) > 1:
                units = [tuple(p for unit in within for p in unit), *(unit for unit in units if unit not in within)]
        found.append(tuple(units))
    return found


def _tied(checkpoint: HFCheckpoint, index: int, plan: LayerPlan, format: str) -> Iterator[tuple[str, ...]]:
    """Linears of a layer that a file format or its loaders make one weight of."""
    if format == "native":
        return
    prefix = f"layers/{index}/"
    kernels = [f"{prefix}{path}/kernel" for group in plan.groups for path in group.group.sinks]
    for paths in fused(checkpoint, kernels):
        yield tuple(path.removeprefix(prefix).removesuffix("/kernel") for path in paths)


@dataclasses.dataclass(frozen=True)
class Question:
    """A budget that was found to be one that can be kept: nothing is measured yet.

    Attributes:
      checkpoint: dense.
      plans: of its layers, at whatever width.
      budget: mean bits of a weight at most.
      widths: that the format holds.
      units: of every layer.
    """

    checkpoint: HFCheckpoint
    plans: tuple[LayerPlan, ...]
    budget: float
    widths: tuple[int, ...]
    units: tuple[Units, ...]

    @classmethod
    def of(
        cls, checkpoint: HFCheckpoint, plans: Sequence[LayerPlan], recipe: Recipe, format: str, budget: float
    ) -> "Question":
        """Ask, from headers alone.

        Raises:
          ValueError: a format without a choice, a budget that is no number or below what the smallest widths take,
            overrides that leave nothing to choose or split what must be one.
        """
        widths = _widths(format, recipe.quant)
        asked = cls(checkpoint, tuple(plans), budget, widths, tuple(_units(checkpoint, plans, recipe, format)))
        if not any(asked.units):
            raise ValueError("the overrides name every weight, so a budget (--budget) has nothing to choose.")
        least = mean_bits(checkpoint, asked.version(widths[0]))
        if not math.isfinite(budget) or budget < least:
            raise ValueError(
                f"a budget of {budget:g} bits a weight can't be kept: {widths[0]} bits wherever there is a choice come "
                f"to {least:.4g} with scales and zeros (--budget). Ask for more, or for larger groups (--group-size)."
            )
        return asked

    def version(self, bits: int) -> tuple[LayerPlan, ...]:
        """Plans with one width wherever there is a choice."""
        free = {f"layers/{i}/{path}": bits for i, units in enumerate(self.units) for unit in units for path in unit}
        return tuple(_with_widths(index, plan, free) for index, plan in enumerate(self.plans))

    def answer(self, kl: Sequence[Sequence[Sequence[float]]]) -> Chosen:
        """The widths with the smallest sum of divergences that keep the budget.

        Args:
          kl: of `divergences`, for the versions of `widths`.

        Raises:
          ValueError: a group's divergence is not finite at any width.
        """
        named = [
            (tuple(f"layers/{index}/{path}" for path in unit), tuple(row))
            for index, (units, rows) in enumerate(zip(self.units, kl, strict=True))
            for unit, row in zip(units, rows, strict=True)
        ]
        sizes = _weights(self.checkpoint, self.plans)
        weights = [sum(sizes[path] for path in unit) for unit, _ in named]
        losses = [[loss if math.isfinite(loss) else math.inf for loss in row] for _, row in named]
        for (unit, _), row in zip(named, losses, strict=True):
            if not np.isfinite(row).any():
                raise ValueError(f"with {unit[0]} rounded to any width the model's output is no number.")
        fixed = _total_bits(self.checkpoint, self.version(self.widths[0])) - self.widths[0] * sum(weights)
        room = math.floor(self.budget * sum(sizes.values())) - fixed
        picked = allocate([[count * bits for bits in self.widths] for count in weights], losses, room)
        choices = tuple(
            Choice(
                sinks=unit,
                weights=count,
                bits=self.widths[at],
                kl=tuple(loss if math.isfinite(loss) else None for loss in row),
            )
            for (unit, row), count, at in zip(named, weights, picked, strict=True)
        )
        bits = {path: choice.bits for choice in choices for path in choice.sinks}
        plans = [_with_widths(index, plan, bits) for index, plan in enumerate(self.plans)]
        return Chosen(
            budget=self.budget,
            mean=mean_bits(self.checkpoint, plans),
            widths=self.widths,
            predicted=sum(row[at] for row, at in zip(losses, picked, strict=True)),
            choices=choices,
        )


def choose(
    asked: Question,
    batches: tuple[np.ndarray, np.ndarray],
    *,
    layout: Layout,
    hosts: Hosts,
    kept: Path | None = None,
    inputs: Mapping[str, str] | None = None,
    measuring: Measuring = lambda done, layers: None,
) -> Chosen:
    """Measure what every unit loses at every width, and choose.

    Args:
      asked: the budget.
      batches: calibration tokens and mask, ``[chunks, b, t]``.
      layout: where arrays lie.
      hosts: processes that do the same; what process 0 measured counts.
      kept: a file that keeps what was measured, so that a run that is killed later needs not measure again.
      inputs: fingerprint of what decides the measurement, which the budget does not; what another one kept is not used.
      measuring: told of every layer.
    """
    found = _read(kept, inputs) if kept is not None and hosts.first else None
    text = hosts.share("sensitivities kept", json.dumps(found))
    kl = json.loads(text)
    if kl is None:
        versions = [asked.version(bits) for bits in asked.widths]
        kl = divergences(
            asked.checkpoint, versions, asked.units, batches, layout=layout, hosts=hosts, measuring=measuring
        )
        kl = json.loads(hosts.share("sensitivities", json.dumps(kl)))
        if kept is not None and hosts.first:
            _write(kept, {"inputs": dict(inputs or {}), "kl": kl})
    return asked.answer(kl)


def kept_beside(out: str | os.PathLike[str]) -> Path:
    """Where a run keeps what it measured until its output is there.

    >>> kept_beside("/data/model-mixed").as_posix()
    '/data/.model-mixed.sensitivities.json'
    """
    return beside(out, "sensitivities.json")


def _read(kept: Path, inputs: Mapping[str, str] | None) -> Any:
    """What a run with these inputs measured; None where there is none."""
    try:
        found = json.loads(kept.read_bytes())
    except (OSError, ValueError):
        return None
    return found["kl"] if isinstance(found, dict) and found.get("inputs") == dict(inputs or {}) else None


def _write(kept: Path, content: Any) -> None:
    new = kept.with_name(f"{kept.name}.new")
    new.unlink(missing_ok=True)
    write_bytes(new, json.dumps(content).encode())
    new.replace(kept)
