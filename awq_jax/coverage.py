# SPDX-License-Identifier: Apache-2.0
"""From a layer's outcome to its report: what each weight got and, if it is not a searched scale, why."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from awq_jax._plan import GroupPlan, LayerPlan
from awq_jax._search import ScaleResult
from awq_jax.layer_step import LayerOutcome
from awq_jax.report import GroupReport, LayerReport, LinearReport, Method, method_of

__all__ = ["layer_report"]

_BINS = 128  # channels of a group that a report shows


def _reason(plan: GroupPlan, layer: LayerPlan, tap: str, *, finite: bool, fell_back: bool, winner: str) -> str:
    """Why a quantized group has less than its recipe asked for; empty if it has all."""
    if not finite:
        return f"activations at {tap} are not finite"
    if fell_back:
        return "the search did not lower this layer's output error"
    if not layer.search.rules:
        refined = ", refined" if layer.refine else ""
        return "" if layer.feedback else f"the recipe asks for round to nearest{refined}"
    if plan.group.producer is None:
        return plan.group.reason or "nothing in front of it can absorb a scale"
    return "no candidate was better than round to nearest" if winner == "identity" else ""


def _method(layer: LayerPlan, *, finite: bool, fell_back: bool, winner: str) -> Method:
    """What a quantized group got."""
    kept = finite and not fell_back
    if kept and "smoothquant" in winner:
        return "smoothquant"
    return method_of(scaled=kept and winner != "identity", fed_back=kept and layer.feedback is not None)


def _finite(value: Any) -> float | None:
    """JSON has neither NaN nor infinity."""
    return float(value) if np.isfinite(value) else None


def _winner(result: ScaleResult, layer: LayerPlan) -> tuple[str, float]:
    """Name and power of the rule that won; of experts, how many each won, unless it was identity everywhere."""
    won = [layer.search.candidates[int(index)] for index in np.atleast_1d(result.index)]
    names = Counter(rule.name for rule, _, _ in won)
    power = float(np.mean([power for _, power, _ in won]))
    if len(names) == 1:
        return won[0][0].name, power
    return ", ".join(f"{name} ({count} experts)" for name, count in names.most_common()), power


def _linears(
    index: int, plan: GroupPlan, method: Method, reason: str, starved: tuple[int, ...]
) -> Iterator[LinearReport]:
    for path, spec in zip(plan.group.sinks, plan.specs, strict=True):
        name = f"layers/{index}/{path}"
        if spec is None:
            why = "left in floating point by an override"
            yield LinearReport(path=name, method="float", reason=why, bits=32, group_size=0)
        else:
            yield LinearReport(
                path=name,
                method=method,
                reason=reason,
                bits=spec.bits,
                group_size=spec.group_size,
                activations=spec.activations,
                starved=starved,
            )


def _thinned(magnitudes: np.ndarray) -> dict[str, Any]:
    """At most `_BINS` channels of ``[3, k]``, so that a report does not grow with the model's width."""
    activation = np.where(np.isnan(magnitudes[0]), 0.0, magnitudes[0])
    bins = np.array_split(np.arange(activation.size), min(_BINS, activation.size))
    channels = [int(part[activation[part].argmax()]) for part in bins]
    row = lambda values: tuple(_finite(float(f"{values[c]:.4g}")) for c in channels)
    names = ("activation", "weight", "scale")
    return {"channels": tuple(channels), **{name: row(values) for name, values in zip(names, magnitudes, strict=True)}}


def _group(
    index: int, plan: GroupPlan, result: ScaleResult, written: Any, magnitudes: Any, rule: str, power: float
) -> GroupReport:
    producer, each = plan.group.producer, np.atleast_2d(result.losses)  # of every expert
    losses = each.sum(0)
    return GroupReport(
        sinks=tuple(f"layers/{index}/{path}" for path in plan.group.sinks),
        producer=f"layers/{index}/{producer.path}" if producer else None,
        rule=rule,
        power=power,
        loss=_finite(each.min(1).sum()),
        rtn_loss=_finite(losses[0]),
        losses=tuple(map(_finite, losses)),
        written_loss=None if written is None else _finite(written),
        **_thinned(np.asarray(magnitudes).reshape(3, -1)),
    )


def layer_report(index: int, plan: LayerPlan, outcome: LayerOutcome) -> LayerReport:
    """Describe one layer.

    Args:
      index: of the layer.
      plan: what was to be done.
      outcome: what `quantize_and_measure` returned, on the host.
    """
    fell_back = not bool(outcome.error <= outcome.rtn_error)
    groups: list[GroupReport] = []
    linears: list[LinearReport] = []
    layer = outcome.layer
    rows = zip(plan.groups, layer.results, layer.losses, outcome.magnitudes, strict=True)
    for group, result, written, magnitudes in rows:
        winner, power, finite, tap, starved = "identity", 0.0, True, group.group.sinks[0], ()
        if result is not None:
            winner, power = _winner(result, plan)
            finite = bool(outcome.finite[tap])
            if group.group.per_expert:
                starved = tuple(np.flatnonzero(outcome.tokens[tap] < plan.search.expert_tokens).tolist())
            groups.append(_group(index, group, result, written, magnitudes, winner, power))
        tap = f"layers/{index}/{tap}"
        method = _method(plan, finite=finite, fell_back=fell_back, winner=winner)
        reason = _reason(group, plan, tap, finite=finite, fell_back=fell_back, winner=winner)
        linears += _linears(index, group, method, reason, starved)
    return LayerReport(
        index=index,
        error=_finite(outcome.rtn_error if fell_back else outcome.error),
        rtn_error=_finite(outcome.rtn_error),
        fell_back=fell_back,
        groups=tuple(groups),
        linears=tuple(linears),
    )
