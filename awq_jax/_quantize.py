# SPDX-License-Identifier: Apache-2.0
"""The one orchestration: groups -> search -> fold -> clip -> round -> pack. Pure; one jit for a whole layer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from awq_jax._clip import search_clip
from awq_jax._fold import fold_scale
from awq_jax._plan import GroupPlan, LayerPlan
from awq_jax._pytree import pytree
from awq_jax._round import quantize
from awq_jax._search import ScaleResult, search_scale, split_columns
from awq_jax._stats import ActStats
from awq_jax._tree import get, put

__all__ = ["QuantizedLayer", "quantize_layer", "round_layer"]

Params = Mapping[str, Any]
GroupLoss = Callable[[GroupPlan], Callable[[list[Array]], Array] | None]


@pytree
class QuantizedLayer:
    """One layer after quantization.

    Attributes:
      params: the layer's tree with `QTensor` kernels and folded producers.
      results: a `ScaleResult` per group of the plan, None where nothing of the group is quantized.
    """

    params: Any
    results: Any


def _search_group(params: Params, plan: GroupPlan, layer: LayerPlan, stats: ActStats, loss: Any) -> ScaleResult:
    """The scale of one group; a group that nothing can absorb keeps identity and only measures it."""
    kernels = [get(params, path)["kernel"] for path, _, _ in plan.quantized]
    specs = [spec for _, spec, _ in plan.quantized]
    # A sink left in floating point still shares the input: its rows are scaled, but it adds no error.
    search = layer.search if plan.group.producer is not None else dataclasses.replace(layer.search, rules=())
    return search_scale(stats, kernels, search, specs, tie=plan.tie, loss=loss)


def _round_group(params: Params, plan: GroupPlan, layer: LayerPlan, stats: ActStats | None, rows: Array | None) -> Any:
    """Replace the kernels of one group by their quantized form; clip where a Gram matrix tells how."""
    out = dict(params)
    kernels = {path: get(out, path)["kernel"].astype(jnp.float32) for path, _, _ in plan.quantized}
    ratios = _clip_group(kernels, plan, layer, stats, rows)
    for path, spec, _ in plan.quantized:
        out = put(out, f"{path}/kernel", quantize(kernels[path], spec, ratios.get(path)))
    return out


def _clip_group(
    kernels: Mapping[str, Array], plan: GroupPlan, layer: LayerPlan, stats: ActStats | None, rows: Array | None
) -> dict[str, Array]:
    """Thresholds of the kernels that may be clipped; those of one format are searched side by side."""
    if stats is None or stats.gram is None or not layer.search.clip_ratios:
        return {}
    gram = stats.gram if rows is None else stats.gram / (rows[:, None] * rows[None, :])
    ratios: dict[str, Array] = {}
    for spec in dict.fromkeys(spec for _, spec, may_clip in plan.quantized if may_clip):
        paths = [path for path, other, may_clip in plan.quantized if may_clip and other == spec]
        wide = jnp.concatenate([kernels[path] for path in paths], axis=1)
        found = search_clip(gram, wide, spec, layer.search.clip_ratios)
        ratios |= dict(zip(paths, split_columns(found, [kernels[path].shape[1] for path in paths]), strict=True))
    return ratios


def round_layer(params: Params, plan: LayerPlan) -> Params:
    """Round to nearest, without statistics: what every other method is measured against."""
    for group in plan.groups:
        params = _round_group(params, group, plan, None, None)
    return params


def quantize_layer(
    params: Params,
    stats: Mapping[str, ActStats],
    plan: LayerPlan,
    loss: GroupLoss = lambda group: None,
) -> QuantizedLayer:
    """Quantize one layer: search every group on the original weights, fold all scales, clip, round, pack.

    Folding preserves the layer's function, so statistics taken once on the float model serve every group whatever
    the order.

    Args:
      params: nested dict of one layer, dense kernels ``[k, n]``.
      stats: `ActStats` by tap, ``plan.taps``.
      plan: static.
      loss: objective of a group, given its plan; None is the Gram objective.
    """
    results = tuple(
        _search_group(params, group, plan, stats[group.group.sinks[0]], loss(group)) if group.quantized else None
        for group in plan.groups
    )
    folded = params
    for group, result in zip(plan.groups, results, strict=True):
        if result is not None and group.group.producer is not None:
            folded = fold_scale(folded, group.group, result.scale, group.tie)
    for group, result in zip(plan.groups, results, strict=True):
        if result is not None:
            rows = group.tie.spread(result.scale) if group.tie else result.scale
            folded = _round_group(folded, group, plan, stats[group.group.sinks[0]], rows)
    return QuantizedLayer(params=folded, results=results)
