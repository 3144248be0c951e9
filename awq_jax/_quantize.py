# SPDX-License-Identifier: Apache-2.0
"""The one orchestration: groups -> search -> fold -> clip -> round -> pack. Pure; one jit for a whole layer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from awq_jax._activations import Sample, input_step
from awq_jax._clip import clip_for
from awq_jax._experts import each_expert, flat, stacked, without_starved
from awq_jax._fold import fold_scale
from awq_jax._gram import rescaled
from awq_jax._plan import GroupPlan, LayerPlan
from awq_jax._pytree import pytree
from awq_jax._qtensor import QTensor, dequantize
from awq_jax._round import Ends, quantize
from awq_jax._search import ScaleResult, gram_loss, search_scale, split_columns
from awq_jax._stats import ActStats
from awq_jax._tree import get, put
from awq_jax.methods import round_by
from awq_jax.methods.drift import Drift, realign

__all__ = ["QuantizedLayer", "quantize_layer", "round_layer"]

Params = Mapping[str, Any]
GroupLoss = Callable[[GroupPlan], Callable[[list[Array]], Array] | None]
Reobserve = Callable[[Params, Params, GroupPlan], Drift]
"""(folded float parameters, parameters so far quantized, group) -> what reaches the group's linears now."""


@pytree
class QuantizedLayer:
    """One layer after quantization.

    Attributes:
      params: the layer's tree with `QTensor` kernels and folded producers.
      results: a `ScaleResult` per group of the plan, None where nothing of the group is quantized.
      losses: by group, the output error after clipping and rounding, in the unit of ``results[i].losses`` under the
        Gram objective; None where activations are rounded too.
      wanted: the layer's tree as it was rounded: scales folded in, weights moved to make up for drift.
    """

    params: Any
    results: Any
    losses: Any
    wanted: Any


def _search_group(
    params: Params, plan: GroupPlan, layer: LayerPlan, stats: ActStats, loss: Any, sample: Sample | None = None
) -> ScaleResult:
    """The scale of one group; a group that nothing can absorb keeps identity and only measures it."""
    if plan.group.per_expert:
        one = lambda part, seen, _: _search_group(part, plan.of_one_expert(), layer, seen, None)
        return each_expert(one, params, plan.group.sinks, stats, None)
    kernels = [flat(get(params, path)["kernel"]) for path, _, _ in plan.quantized]
    specs = [spec for _, spec, _ in plan.quantized]
    # A sink left in floating point still shares the input: its rows are scaled, but it adds no error.
    search = layer.search if plan.group.producer is not None else layer.search.identity_only
    return search_scale(stats, kernels, search, specs, tie=plan.tie, loss=loss, sample=sample)


def _round_group(
    params: Params, plan: GroupPlan, layer: LayerPlan, stats: ActStats | None
) -> tuple[Params, Array | None]:
    """Replace the kernels of one group by their quantized form, and say what output error is left.

    With a Gram matrix thresholds are searched, and errors fed back if the plan says so; kernels of one format lie side
    by side.
    """
    out = dict(params)
    if plan.group.per_expert and stats is not None:
        one = lambda part, seen: _round_group(part, plan.of_one_expert(), layer, seen)
        parts, lost = each_expert(one, params, plan.group.sinks, stats)
        for path in plan.group.sinks:
            out = put(out, path, get(parts, path))
        return out, None if lost is None else lost.sum()
    dense = {path: get(out, path)["kernel"] for path, _, _ in plan.quantized}
    kernels = {path: flat(kernel.astype(jnp.float32)) for path, kernel in dense.items()}
    if stats is None or stats.gram is None:
        for path, spec, _ in plan.quantized:
            weight = _with_input_scale(quantize(kernels[path], spec), stats)
            out = put(out, f"{path}/kernel", stacked(weight, dense[path]))
        return out, None
    ratios = _clip_group(kernels, plan, layer, stats)
    loss = jnp.zeros(())
    for spec in dict.fromkeys(spec for _, spec, _ in plan.quantized):
        paths = [path for path, other, _ in plan.quantized if other == spec]
        wide = jnp.concatenate([kernels[path] for path in paths], axis=1)
        ratio = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *(ratios[path] for path in paths))
        weight = _with_input_scale(round_by(wide, stats.gram, spec, layer.feedback, ratio), stats)
        loss += gram_loss(wide - dequantize(weight), stats)
        ends = np.cumsum([kernels[path].shape[1] for path in paths])
        for path, end in zip(paths, ends.tolist(), strict=True):
            columns = slice(end - kernels[path].shape[1], end)
            part = jax.tree.map(lambda leaf, at=columns: leaf[:, at], weight)
            out = put(out, f"{path}/kernel", stacked(part, dense[path]))
    return out, None if plan.int8_inputs else loss


def _with_input_scale(weight: QTensor, stats: ActStats | None) -> QTensor:
    """A weight with the static step of its inputs, where they have one."""
    if weight.activations != "tensor":
        return weight
    assert stats is not None
    return weight.with_input_scale(input_step(stats.abs_max))


def _realigned(params: Params, plan: GroupPlan, drift: Drift) -> Params:
    """The float kernels of one group, moved to make up for what their inputs have become."""
    for path, _, _ in plan.quantized:
        params = put(params, f"{path}/kernel", realign(get(params, path)["kernel"].astype(jnp.float32), drift))
    return params


def _clip_group(kernels: Mapping[str, Array], plan: GroupPlan, layer: LayerPlan, stats: ActStats) -> dict[str, Ends]:
    """Thresholds of the kernels; those of one format are searched side by side, those left unclipped have 1."""
    ratios: dict[str, Ends] = {}
    for path, spec, _ in plan.quantized:
        k, n = kernels[path].shape
        whole = jnp.ones((k // spec.rows_per_group(k), n))
        ratios[path] = Ends(whole, whole)
    if not layer.search.clip_ratios:
        return ratios
    for spec in dict.fromkeys(spec for _, spec, may_clip in plan.quantized if may_clip):
        paths = [path for path, other, may_clip in plan.quantized if may_clip and other == spec]
        wide = jnp.concatenate([kernels[path] for path in paths], axis=1)
        ends = clip_for(layer.feedback, stats.gram, wide, spec, layer.search.clip_ratios)
        columns = [split_columns(end, [kernels[path].shape[1] for path in paths]) for end in ends]
        ratios |= dict(zip(paths, map(Ends, *columns), strict=True))
    return ratios


def round_layer(params: Params, plan: LayerPlan, stats: Mapping[str, ActStats] | None = None) -> Params:
    """Round to nearest: what every other method is measured against. Static steps alone need statistics, the maxima."""
    for group in plan.groups:
        seen = stats[group.group.sinks[0]] if stats is not None and group.int8_inputs else None
        params, _ = _round_group(params, group, plan, seen and dataclasses.replace(seen, gram=None))
    return params


def quantize_layer(
    params: Params,
    stats: Mapping[str, ActStats],
    plan: LayerPlan,
    loss: GroupLoss = lambda group: None,
    reobserve: Reobserve | None = None,
    samples: Mapping[str, Sample] | None = None,
) -> QuantizedLayer:
    """Quantize one layer: search every group on the original weights, fold all scales, clip, round, pack.

    Folding preserves the layer's function, so statistics taken once on the float model serve every group whatever
    the order.

    Args:
      params: nested dict of one layer, dense kernels ``[k, n]``.
      stats: `ActStats` by tap, ``plan.taps``.
      plan: static.
      loss: objective of a group, given its plan; None is the Gram objective.
      reobserve: measures a group's inputs anew when the groups before it are quantized, and how they have drifted; each
        weight is then moved to make up for it (`realign`).
      samples: inputs by tap, of the groups whose activations are int8.
    """
    stats = {tap: without_starved(seen, plan.search.expert_tokens) for tap, seen in stats.items()}
    sample_of = lambda group: samples[group.group.sinks[0]] if samples is not None and group.int8_inputs else None
    results = tuple(
        _search_group(params, group, plan, stats[group.group.sinks[0]], loss(group), sample_of(group))
        if group.quantized
        else None
        for group in plan.groups
    )
    folded = params
    for group, result in zip(plan.groups, results, strict=True):
        if result is not None and group.group.producer is not None:
            folded = fold_scale(folded, group.group, result.scale, group.tie)
    done, wanted, losses = folded, folded, []
    for group, result in zip(plan.groups, results, strict=True):
        left = None
        if result is not None:
            rows = group.tie.spread(result.scale) if group.tie else result.scale
            seen = stats[group.group.sinks[0]]
            seen = dataclasses.replace(seen, gram=rescaled(seen.gram, rows), abs_max=seen.abs_max / rows)
            if reobserve:
                drift = reobserve(folded, done, group)
                wanted, seen = _realigned(wanted, group, drift), drift.stats
                for path, _, _ in group.quantized:
                    done = put(done, f"{path}/kernel", get(wanted, path)["kernel"])
            done, left = _round_group(done, group, plan, seen)
        losses.append(left)
    return QuantizedLayer(params=done, results=results, losses=tuple(losses), wanted=wanted)
