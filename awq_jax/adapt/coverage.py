# SPDX-License-Identifier: Apache-2.0
"""What each weight got and why: no weight is missing, none is rounded to nearest without a word."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from awq_jax._search import ScaleResult
from awq_jax._spec import Recipe
from awq_jax._stats import ActStats
from awq_jax.adapt.program import flatten
from awq_jax.adapt.table import Instance, Table
from awq_jax.report import GroupReport, LinearReport, method_of

__all__ = ["Coverage", "coverage_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """The report of `awq_jax.adapt.quantize`.

    Attributes:
      linears: every kernel, quantized or not.
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


def coverage_of(
    params: Any, outcome: Any, stats: Mapping[str, ActStats], table: Table, recipe: Recipe, *, identity: bool
) -> Coverage:
    """The report of a quantization.

    Args:
      params: dense.
      outcome: of `quantize_params`.
      stats: it was given.
      table: of the program.
      recipe: it was given.
      identity: whether weights without a producer got no scale.
    """
    leaves, _ = flatten(params)
    bits = {path: 8 * np.dtype(leaves[path].dtype).itemsize for path in (*table.weights, *table.left)}
    groups, linears = [], []
    for instance, result in zip(table.instances(), outcome.results, strict=True):
        if result is not None:
            groups.append(_group_report(instance, result, recipe))
        for path in instance.sinks:
            _, spec = recipe.spec_of(path, path.rpartition("/")[0])
            if spec is None:
                why = "left in floating point by an override"
                linears.append(LinearReport(path=path, method="float", reason=why, bits=bits[path], group_size=0))
                continue
            assert result is not None  # a quantized weight makes its group one that was searched
            held = stats[table.source[path]]
            notes = [_why_not_scaled(instance, result, held, recipe, identity=identity)]
            if (seen := float(outcome.seen[path])) < 1:
                notes.append(f"{1 - seen:.0%} of its layers or experts saw no token")
            if (rows := held.gram.shape[-1]) < (k := table.weights[path].k):
                notes.append(f"of the Gram matrix of its {k} inputs blocks of {rows} rows were kept (gram_limit)")
            finite = _finite(result)
            method = method_of(
                scaled=bool(finite and (np.asarray(result.index) > 0).any()),
                fed_back=bool(finite and recipe.feedback is not None),
            )
            reason = "; ".join(filter(None, notes))
            linears.append(
                LinearReport(path=path, method=method, reason=reason, bits=spec.bits, group_size=spec.group_size)
            )
    for path, reason in table.left.items():
        linears.append(LinearReport(path=path, method="float", reason=reason, bits=bits[path], group_size=0))
    size = lambda tree: sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(tree))
    return Coverage(
        linears=tuple(linears), groups=tuple(groups), nbytes=size(outcome.params), dense_nbytes=size(params)
    )


def _finite(result: Any) -> bool:
    return bool(np.isfinite(np.asarray(result.losses)[..., 0]).all())


def _why_not_scaled(instance: Instance, result: Any, held: ActStats, recipe: Recipe, *, identity: bool) -> str:
    """Why a weight got no scale, in all of its layers or in some; empty if it did."""
    helped = np.asarray(result.index).reshape(-1) > 0
    if not _finite(result):
        sound = bool(np.isfinite(np.asarray(held.abs_sum)).all() and np.isfinite(np.asarray(held.gram)).all())
        return "its group holds weights that are not finite" if sound else "its activations are not finite"
    if "awq" not in recipe.method:
        return f"method {recipe.method!r} searches no scale"
    if instance.producer is None and identity:
        return instance.group.reason or "nothing in front of it can absorb a scale"
    if not helped.any():
        return "no candidate was better than round to nearest"
    if not helped.all():
        return f"in {int((~helped).sum())} of {helped.size} no candidate was better than round to nearest"
    return ""


def _group_report(instance: Instance, result: ScaleResult, recipe: Recipe) -> GroupReport:
    """Of a stack, losses are summed over its layers; the rule is the one that most of them chose."""
    losses = np.asarray(result.losses, np.float64)
    losses = losses.reshape(-1, losses.shape[-1])
    winners = np.asarray(result.index).reshape(-1)
    rules = recipe.searches.candidates if losses.shape[-1] > 1 else recipe.searches.candidates[:1]
    rule, power, _ = rules[np.bincount(winners).argmax()]
    total = losses.sum(0)
    value = lambda v: float(v) if np.isfinite(v) else None
    return GroupReport(
        sinks=instance.sinks,
        producer=instance.label,
        rule=rule.name,
        power=power,
        loss=value(losses.min(-1).sum()),
        rtn_loss=value(total[0]),
        losses=tuple(map(value, total)),
    )
