# SPDX-License-Identifier: Apache-2.0
"""One layer's work as one compiled function: observe, search, fold, round, and measure the result again.

Layers of equal shape and equal plan share the compilation, so a model compiles once whatever its depth.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from awq_jax._activations import Sample
from awq_jax._experts import ExpertRows, flat, observe_experts, stacked
from awq_jax._plan import GroupPlan, LayerPlan
from awq_jax._pytree import pytree
from awq_jax._qtensor import dequantize_tree
from awq_jax._quantize import QuantizedLayer, quantize_layer, round_layer
from awq_jax._spec import RefineSpec
from awq_jax._stats import ActStats, calibrate, merge, observe
from awq_jax._tree import get, put
from awq_jax.models.config import DecoderConfig
from awq_jax.models.functional import block, part
from awq_jax.placing import ALONE, Placing
from awq_jax.propagate import reobserver
from awq_jax.refine import Batch, refine

__all__ = [
    "LayerOutcome",
    "block_loss",
    "no_statistics",
    "observe_chunk",
    "observer",
    "quantize_and_measure",
    "quantize_observed",
]

Params = Any


@pytree
class LayerOutcome:
    """What `quantize_and_measure` returns.

    Attributes:
      layer: the quantized parameters and search results; the parameters are round-to-nearest where that was better.
      hidden: the float layer's output on the calibration set, input of the next layer.
      stream: the written layer's output on the quantized model's inputs, where the plan propagates; else None.
      error: squared output error of the search's result, relative to the output's square.
      rtn_error: the same for round to nearest.
      finite: whether every statistic of every tap was finite, by tap.
      tokens: counted by the taps.
      magnitudes: by group ``[3, k]``: mean |x|, mean |w| and scale of every channel; None where nothing is quantized.
    """

    layer: Any
    hidden: Any
    stream: Any
    error: Any
    rtn_error: Any
    finite: Any
    tokens: Any
    magnitudes: Any


def observer(
    config: DecoderConfig, plan: LayerPlan, tokens: int, placing: Placing = ALONE
) -> Callable[[Params, Any], Any]:
    """(params, (hidden, mask)) -> (statistics by tap, layer output)."""
    histogram = any(rule.statistic == "percentile" for rule in plan.search.rules)

    def run(params: Params, batch: tuple[Array, Array]) -> tuple[dict[str, ActStats], Array]:
        hidden, mask = batch
        seen: dict[str, ActStats] = {}

        def tap(name: str, x: Any) -> None:
            if name in plan.taps and isinstance(x, ExpertRows):
                rows = plan.gram_block(name, x.rows.shape[-1], len(x.sizes))
                seen[name] = observe_experts(x, mask, block=rows, histogram=histogram)
            elif name in plan.taps:
                stride = plan.search.stride(tokens, x.shape[-1])
                rows = plan.gram_block(name, x.shape[-1])
                stats = observe(x, mask, block=rows, stride=stride, histogram=histogram)
                seen[name] = dataclasses.replace(stats, gram=placing.cut(stats.gram))

        return seen, block(config, params, hidden, tap=tap)

    return run


def block_loss(
    config: DecoderConfig, params: Params, hidden: Array, mask: Array, plan: LayerPlan
) -> Callable[[GroupPlan], Callable[[list[Array]], Array] | None]:
    """The "block" objective: output error of the attention or MLP that a group's linears belong to."""
    inputs = _tapped(config, params, hidden, plan.taps)

    def of_group(group: GroupPlan) -> Callable[[list[Array]], Array] | None:
        name, x = group.group.output, inputs[group.group.sinks[0]]
        if name is None or group.tie is not None:
            return None  # its own output is the block's, and the Gram matrix has that exactly
        target = part(config, name, params[name], x)

        def loss(weights: list[Array]) -> Array:
            changed = params
            for (path, _, _), weight in zip(group.quantized, weights, strict=True):
                changed = put(changed, f"{path}/kernel", stacked(weight, get(params, path)["kernel"]))
            error = part(config, name, changed[name], x) - target
            return jnp.sum(jnp.where(mask[..., None], error, 0.0) ** 2) / jnp.maximum(mask.sum(dtype=jnp.float32), 1.0)

        return loss

    return of_group


def _tapped(config: DecoderConfig, params: Params, hidden: Array, taps: tuple[str, ...]) -> dict[str, Array]:
    """Inputs of linears, by tap."""
    seen: dict[str, Array] = {}
    block(config, params, hidden, tap=lambda name, x: seen.update({name: x}) if name in taps else None)
    return seen


def _samples(config: DecoderConfig, params: Params, hidden: Array, mask: Array, plan: LayerPlan) -> dict[str, Sample]:
    """Inputs of the groups whose activations are int8."""
    taps = tuple(group.group.sinks[0] for group in plan.groups if group.int8_inputs)
    if not taps:
        return {}
    rows = lambda x: jnp.where(mask[..., None], x.astype(jnp.float32), 0.0).reshape(-1, x.shape[-1])
    count = mask.sum(dtype=jnp.float32)
    return {name: Sample(rows(x), count) for name, x in _tapped(config, params, hidden, taps).items()}


def _magnitudes(params: Params, stats: dict[str, ActStats], plan: LayerPlan, results: Any) -> tuple[Any, ...]:
    """By group and channel, ``[3, k]``: mean |x|, mean |w| over the outputs, and the scale that was chosen."""

    def of_group(group: GroupPlan, result: Any) -> Array | None:
        if result is None:
            return None
        kernels = [jnp.abs(get(params, path)["kernel"]) for path, _, _ in group.quantized]
        weights = kernels if group.group.per_expert else [flat(kernel) for kernel in kernels]
        rows = group.tie.spread(result.scale) if group.tie else result.scale
        return jnp.stack([stats[group.group.sinks[0]].abs_mean, jnp.concatenate(weights, axis=-1).mean(-1), rows])

    return tuple(of_group(group, result) for group, result in zip(plan.groups, results, strict=True))


def _relative_errors(
    config: DecoderConfig, versions: list[Params], hidden: Array, stream: Array, target: Array, mask: Array
) -> list[Array]:
    """Squared output error of each version of a layer over the square of the float output's change to the stream."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *versions)
    keep = mask[..., None]
    power = jnp.sum(jnp.where(keep, target - hidden, 0.0) ** 2)

    def error(params: Params) -> Array:
        difference = block(config, dequantize_tree(params), stream) - target
        return jnp.sum(jnp.where(keep, difference, 0.0) ** 2) / jnp.maximum(power, 1e-30)

    return list(jax.lax.map(error, stacked))


def _refined(
    config: DecoderConfig, searched: QuantizedLayer, *, batches: Batch, how: RefineSpec, measured: int
) -> QuantizedLayer:
    """Codes and scales trained on the layer's output; the chunks that the layer is measured on are held back."""

    def error(params: Params, batch: Batch) -> Array:
        x, wanted, keep = batch
        return jnp.sum(jnp.where(keep[..., None], block(config, params, x) - wanted, 0.0) ** 2)

    params = refine(searched.params, searched.wanted, error, batches, how, held=measured)
    # A group's own loss no longer says how its weights were chosen.
    return dataclasses.replace(searched, params=params, losses=(None,) * len(searched.losses))


@partial(
    jax.jit,
    static_argnames=("config", "plan", "measured", "tokens", "placing"),
    donate_argnames=("hidden", "stream"),
)
def quantize_and_measure(
    params: Params,
    hidden: Array,
    mask: Array,
    stream: Array | None = None,
    *,
    config: DecoderConfig,
    plan: LayerPlan,
    measured: int = 1,
    tokens: int | None = None,
    placing: Placing = ALONE,
) -> LayerOutcome:
    """Quantize one layer on its calibration inputs and choose between the search's result and round to nearest.

    Args:
      params: nested dict of one layer, dense, float32.
      hidden: the layer's inputs in the float model, ``[chunks, b, t, d]``; one chunk's activations are alive at a time.
      mask: ``[chunks, b, t]``, False on padding.
      stream: its inputs in the quantized model, like ``hidden``; needed where the plan propagates.
      config: of the model.
      plan: of this layer.
      measured: chunks that the output error is measured on, and the block objective and int8 activations are scored on.
      tokens: how many of the mask are True, for `SearchSpec.stride`; None takes all for tokens.
      placing: where values lie on a mesh.
    """
    tokens = tokens or mask.size
    whole, observed = placing.gathered(params), observer(config, plan, tokens, placing)
    forward = lambda version, chunks: jax.lax.map(lambda h: block(config, version, h), chunks)
    if plan.propagate:
        assert stream is not None
        stats, _ = calibrate(observed, whole, (stream, mask), has_aux=True)
        outputs = forward(whole, hidden)
        reobserve = reobserver(config, hidden, stream, mask)
    elif plan.refine is not None:
        stats, outputs = calibrate(observed, whole, (hidden, mask), has_aux=True)
        stream, reobserve = hidden, None
    else:
        # Outputs take the place of the inputs, which are gigabytes; what is measured on is read before.
        kept: Array
        hidden, kept = jax.lax.optimization_barrier((hidden, hidden[:measured]))
        stats, outputs = calibrate(observed, whole, (hidden, mask), has_aux=True, in_place=True)
        hidden, stream, reobserve = kept, kept, None
    sample = jax.tree.map(lambda a: a[:measured], (hidden, stream, outputs, mask))
    refined = None
    if plan.refine is not None:
        refined = partial(_refined, config, batches=(stream, outputs, mask), how=plan.refine, measured=measured)
    outcome = _chosen(params, stats, sample, config, plan, placing, reobserve, refined)
    after = forward(dequantize_tree(placing.gathered(outcome.layer.params)), stream) if plan.propagate else None
    return dataclasses.replace(outcome, hidden=outputs, stream=after)


def _chosen(
    params: Params,
    stats: dict[str, ActStats],
    sample: tuple[Array, Array, Array, Array],
    config: DecoderConfig,
    plan: LayerPlan,
    placing: Placing,
    reobserve: Any = None,
    refined: Callable[[QuantizedLayer], QuantizedLayer] | None = None,
) -> LayerOutcome:
    """Search on statistics, and on a sample (hidden, stream, outputs, mask) choose between the result and rounding."""
    sample = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), sample)
    _, inputs, _, keep = sample
    stats, whole = placing.everywhere(stats), placing.gathered(params)
    loss = block_loss(config, whole, inputs, keep, plan) if plan.search.objective == "block" else lambda group: None
    samples = _samples(config, whole, inputs, keep, plan)
    params = placing.by_outputs(params)
    searched = quantize_layer(params, stats, plan, loss, reobserve, samples)
    if refined is not None:
        searched = refined(searched)
    rounded = round_layer(params, plan, stats)
    error, rtn_error = _relative_errors(config, [placing.gathered(searched.params), placing.gathered(rounded)], *sample)
    helped = error <= rtn_error  # False where the error is NaN
    chosen = jax.tree.map(lambda a, b: jnp.where(helped, a, b), searched.params, rounded)
    finite = {tap: jnp.isfinite(s.abs_sum).all() & jnp.isfinite(s.gram).all() for tap, s in stats.items()}
    return LayerOutcome(
        layer=dataclasses.replace(searched, params=chosen, wanted=None),
        hidden=None,
        stream=None,
        error=error,
        rtn_error=rtn_error,
        finite=finite,
        tokens={tap: s.count for tap, s in stats.items()},
        magnitudes=_magnitudes(params, stats, plan, searched.results),
    )


def no_statistics(
    params: Params, hidden: Array, mask: Array, config: DecoderConfig, plan: LayerPlan, tokens: int
) -> Any:
    """What `observe_chunk` adds to at first: zeros.

    Args:
      params, config, plan, tokens: as for `quantize_and_measure`.
      hidden, mask: one chunk ``[1, b, t, …]``, or shapes of one.
    """
    observed = observer(config, plan, tokens)
    seen, _ = jax.eval_shape(lambda tree, h, keep: observed(tree, (h[0], keep[0])), params, hidden, mask)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), seen)


@partial(jax.jit, static_argnames=("config", "plan", "tokens", "placing"), donate_argnames=("total", "hidden"))
def observe_chunk(
    params: Params,
    total: dict[str, ActStats],
    hidden: Array,
    mask: Array,
    *,
    config: DecoderConfig,
    plan: LayerPlan,
    tokens: int,
    placing: Placing = ALONE,
) -> tuple[dict[str, ActStats], Array]:
    """Send one chunk ``[1, b, t, d]`` through a layer: statistics with its own added, and what comes out.

    Chunk after chunk, then `quantize_observed`: that is `quantize_and_measure` where hidden states wait elsewhere.
    """
    observed = observer(config, plan, tokens, placing)
    seen, outputs = calibrate(observed, placing.gathered(params), (hidden, mask), has_aux=True, in_place=True)
    return {tap: merge(total[tap], seen[tap]) for tap in total}, outputs


@partial(jax.jit, static_argnames=("config", "plan", "placing"))
def quantize_observed(
    params: Params,
    stats: dict[str, ActStats],
    hidden: Array,
    outputs: Array,
    mask: Array,
    *,
    config: DecoderConfig,
    plan: LayerPlan,
    placing: Placing = ALONE,
) -> LayerOutcome:
    """Quantize one layer on statistics of all chunks; the first ones, in and out, are what it is measured on."""
    return _chosen(params, stats, (hidden, hidden, outputs, mask), config, plan, placing)
