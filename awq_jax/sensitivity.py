# SPDX-License-Identifier: Apache-2.0
"""What rounding one group of linears costs the whole model: the KL divergence with that group alone rounded.

Every group is quantized at every width as the recipe says, searched scales and all, on the float model's activations.
One at a time is put into the float model, and its layer's output passes through the float layers that follow: what
arrives at the head is compared with what arrives there without it. Losses of different layers are in one unit, nats a
token, and need no weights.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from awq_jax._plan import LayerPlan
from awq_jax._qtensor import dequantize
from awq_jax._quantize import quantize_layer
from awq_jax._stats import ActStats, calibrate
from awq_jax._tree import get, put
from awq_jax.hosts import Hosts
from awq_jax.layer_step import block_loss, observer
from awq_jax.models.config import DecoderConfig
from awq_jax.models.functional import block, embed, head
from awq_jax.sharding import Layout
from awq_jax_convert.hf import HFCheckpoint

__all__ = ["Measuring", "divergences"]

Params = Mapping[str, Any]
Units = tuple[tuple[str, ...], ...]
"""Paths of the linears of one layer that take a width together."""

Measuring = Callable[[int, int], None]
"""Called with (layers done, layers)."""

_EXACT = "highest"  # precision of products: eight bits move the output less than tf32 does


@partial(jax.jit, static_argnames=("config", "plan", "tokens"))
def _observe(
    params: Params, hidden: Array, mask: Array, *, config: DecoderConfig, plan: LayerPlan, tokens: int
) -> tuple[dict[str, ActStats], Array]:
    """Statistics of a float layer's inputs, and its outputs."""
    return calibrate(observer(config, plan, tokens), params, (hidden, mask), has_aux=True)


@jax.jit
def _first(chunks: Float[Array, "c b t d"]) -> Float[Array, "1 b t d"]:
    return chunks[:1]


@partial(jax.jit, static_argnames="config")
def _pass(params: Params, streams: Float[Array, "s b t d"], *, config: DecoderConfig) -> Float[Array, "s b t d"]:
    """Streams through a layer, one after the other."""
    return jax.lax.map(lambda h: block(config, params, h), streams)


@partial(jax.jit, static_argnames=("config", "plan", "units"))
def _each_rounded(
    params: Params,
    stats: Mapping[str, ActStats],
    plain: Float[Array, "1 b t d"],
    mask: Bool[Array, "c b t"],
    *,
    config: DecoderConfig,
    plan: LayerPlan,
    units: Units,
) -> Float[Array, "s b t d"]:
    """Outputs of a layer in which one unit at a time is rounded."""
    hidden, keep = plain[0], mask[0]
    gram = plan.search.objective == "gram"
    loss = (lambda group: None) if gram else block_loss(config, params, hidden, keep, plan)
    found = quantize_layer(params, stats, plan, loss)
    outputs = []
    for unit in units:
        one = found.wanted  # scales are folded in, which changes nothing
        for path in unit:
            one = put(one, f"{path}/kernel", dequantize(get(found.params, path)["kernel"]))
        outputs.append(block(config, one, hidden))
    return jnp.stack(outputs)


@partial(jax.jit, static_argnames="config")
def _divergence(
    stem: Params,
    plain: Float[Array, "1 b t d"],
    streams: Float[Array, "s b t d"],
    mask: Bool[Array, "c b t"],
    *,
    config: DecoderConfig,
) -> Float[Array, " s"]:
    """Mean ``KL(float model || stream)`` of a token, of every stream; one sample's logits are alive at a time."""
    log_p = lambda h: jax.nn.log_softmax(head(config, stem, h[None])[0])

    def of_sample(sample: tuple[Array, Array, Array]) -> Float[Array, " s"]:
        h, others, keep = sample
        base = log_p(h)
        kl = lambda other: jnp.sum(jnp.exp(base) * (base - log_p(other)), axis=-1)
        return jax.lax.map(lambda other: jnp.sum(jnp.where(keep, kl(other), 0.0)), others)

    sums = jax.lax.map(of_sample, (plain[0], jnp.moveaxis(streams, 1, 0), mask[0]))
    return sums.sum(0) / jnp.maximum(mask[0].sum(dtype=jnp.float32), 1.0)


def divergences(
    checkpoint: HFCheckpoint,
    versions: Sequence[tuple[LayerPlan, ...]],
    units: Sequence[Units],
    batches: tuple[np.ndarray, np.ndarray],
    *,
    layout: Layout,
    hosts: Hosts,
    measuring: Measuring = lambda done, layers: None,
) -> list[list[list[float]]]:
    """Measure every unit of every layer at every width.

    Statistics come of all batches, divergences of the first. Its hidden states of every (unit, version) are kept on the
    host until the last layer: units times versions times ``4 b t d`` bytes, and half as many passes through the model.

    Args:
      checkpoint: dense.
      versions: plans of the layers, one tuple for each width.
      units: of every layer; an empty one is passed through.
      batches: tokens and mask, ``[chunks, b, t]``.
      layout: where arrays lie.
      hosts: processes that do the same.
      measuring: told of every layer.

    Returns:
      ``[layer][unit][version]`` in nats a token.
    """
    config, (tokens, mask) = checkpoint.config, map(layout.activations, batches)
    stem, counted = layout.whole(checkpoint.stem()), int(batches[1].sum())
    hidden = layout.hidden(jax.jit(embed, static_argnums=0)(config, stem, tokens))
    # The float model's stream, computed as the others are. Of several processes none can index what all hold.
    plain = layout.hidden(_first(hidden))
    kept: list[list[np.ndarray]] = []
    for index, plans in enumerate(zip(*versions, strict=True)):
        hosts.meet(f"measuring layer {index}")
        params, at = layout.layer(checkpoint.layer(index)), config.of_layer(index)
        with jax.default_matmul_precision(_EXACT):
            through = lambda array: _pass(params, layout.hidden(array), config=at)  # noqa: B023 - used in this turn
            kept = [[layout.fetch_chunks(through(array)) for array in rows] for rows in kept]
        stats, after = _observe(params, hidden, mask, config=at, plan=plans[0], tokens=counted)
        made = []
        for plan in plans if units[index] else ():
            with jax.default_matmul_precision(_EXACT):
                streams = _each_rounded(params, stats, plain, mask, config=at, plan=plan, units=units[index])
            made.append(layout.fetch_chunks(layout.hidden(streams)))
        kept.append(made)
        with jax.default_matmul_precision(_EXACT):
            plain = layout.hidden(_pass(params, plain, config=at))
        hidden = layout.hidden(after)
        measuring(index + 1, config.num_layers)
    with jax.default_matmul_precision(_EXACT):
        lost = lambda array: _divergence(stem, plain, layout.hidden(array), mask, config=config)
        found = [[layout.fetch(lost(array)) for array in rows] for rows in kept]
    return [np.stack(rows, axis=1).tolist() if rows else [] for rows in found]
