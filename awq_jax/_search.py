# SPDX-License-Identifier: Apache-2.0
"""Scale search: every candidate of every rule competes with identity on the true output error.

For linears that read one input, ``t`` scales the rows of their weights and its inverse goes into the producer of the
input: ``W^ = diag(1/t) Q(diag(t) W)``. With ``D = W - W^`` and the Gram matrix ``G = X'X`` the output error is exactly
``||X D||^2 = tr(D' G D)``, so no activation is kept (AWQ, Lin et al. 2023, section 3.2, scores the same error on
stored activations).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from awq_jax._activations import Sample, activation_loss, input_step
from awq_jax._gram import times
from awq_jax._operands import refuse_shape, refuse_weight
from awq_jax._pytree import pytree
from awq_jax._round import fake_quantize
from awq_jax._spec import QuantSpec, ScaleRule, SearchSpec
from awq_jax._stats import ActStats, percentile
from awq_jax._tie import Tie

__all__ = ["ScaleResult", "candidate_scales", "gram_loss", "search_scale", "split_columns"]

_LIMIT = 1e4  # a channel is never scaled further than this, so folded norms stay representable


@pytree
class ScaleResult:
    """The outcome of a search.

    Attributes:
      scale: ``t``, float32 ``[k]``, or ``[c]`` in the producer's channels where they are tied.
      index: the winner in ``search.candidates``; 0 is identity.
      losses: objective of every candidate, float32 ``[candidates]``; inf where it was not finite.

    Invariant: ``loss <= rtn_loss``, because identity is a candidate.
    """

    scale: Any
    index: Any
    losses: Any

    @property
    def loss(self) -> Array:
        """Objective of the winner."""
        return jnp.min(self.losses, axis=-1)

    @property
    def rtn_loss(self) -> Array:
        """Objective of identity, round to nearest."""
        return self.losses[..., 0]


def _activation_statistic(stats: ActStats, r: ScaleRule) -> Float[Array, " k"]:
    if r.statistic == "mean":
        return stats.abs_mean
    return stats.abs_max if r.statistic == "max" else percentile(stats, r.percentile)


def _weight_statistic(weights: Sequence[Array], spec: QuantSpec, r: ScaleRule) -> Float[Array, " k"]:
    """One magnitude per input channel over all linears of a group."""
    magnitude = jnp.concatenate([jnp.abs(w.astype(jnp.float32)) for w in weights], axis=1)
    if r.weight_statistic == "max":
        return magnitude.max(1)
    k, n = magnitude.shape
    groups = magnitude.reshape(-1, spec.rows_per_group(k), n)
    peak = groups.max(1, keepdims=True)
    return (groups / jnp.where(peak > 0, peak, 1.0)).mean(2).reshape(k)


def _scales_of_rule(a: Array, w: Array, r: ScaleRule) -> Float[Array, "c k"]:
    """Candidates ``a**p * w**-q`` of one rule, normalised; dead channels stay at 1."""
    live = (a > 0) & (w > 0)
    powers = jnp.array(r.powers, jnp.float32)
    log_t = powers[:, :1] * jnp.log(jnp.where(live, a, 1.0)) - powers[:, 1:] * jnp.log(jnp.where(live, w, 1.0))
    # Normalising by sqrt(max * min) is centring the logarithms between their extremes.
    top = jnp.where(live, log_t, -jnp.inf).max(1, keepdims=True)
    bottom = jnp.where(live, log_t, jnp.inf).min(1, keepdims=True)
    t = jnp.exp(log_t - (top + bottom) / 2)
    if r.salient_fraction < 1:
        count = max(1, round(r.salient_fraction * a.shape[0]))
        live = live & (a >= jax.lax.top_k(a, count)[0][-1])
    t = jnp.where(live & jnp.isfinite(t), t, 1.0)
    return jnp.clip(t, 1 / _LIMIT, _LIMIT)


def candidate_scales(
    stats: ActStats,
    weights: Sequence[Float[Array, "k _"]],
    search: SearchSpec,
    spec: QuantSpec,
    tie: Tie | None = None,
) -> Float[Array, "candidates c"]:
    """Every candidate ``t`` of a search, in the order of ``search.candidates``; row 0 is identity."""
    channels = stats.abs_sum.shape[0] // (tie.repeats if tie else 1)
    rows = [jnp.ones((1, channels))]
    for r in search.rules:
        if r.name == "identity":
            continue
        a, w = _activation_statistic(stats, r), _weight_statistic(weights, spec, r)
        if tie:
            a, w = tie.pool(a), tie.pool(w)
        rows.append(_scales_of_rule(a, w, r))
    return jnp.concatenate(rows)


def gram_loss(error: Float[Array, "k n"], stats: ActStats) -> Float[Array, ""]:
    """``tr(D' G D) / tokens``: the squared output error of one token, summed over outputs."""
    # Not a `vdot`: it lays both out in one row, and a mesh that shares the outputs would gather them for it.
    return jnp.sum(error * times(stats.gram, error)) / jnp.maximum(stats.count, 1.0)


def _of_activations(
    stats: ActStats,
    sample: Sample,
    dense: Sequence[Array],
    rounded: Sequence[Array],
    t: Array,
    specs: Sequence[QuantSpec],
) -> Float[Array, ""]:
    """What int8 activations add to the loss of the weights that multiply them."""
    added = jnp.zeros(())
    for kind in sorted({s.activations for s in specs} - {"float"}):
        of_kind = [i for i, s in enumerate(specs) if s.activations == kind]
        step = input_step(stats.abs_max / t) if kind == "tensor" else None
        added += activation_loss(sample, [dense[i] for i in of_kind], [rounded[i] for i in of_kind], t, step)
    return added


def split_columns(wide: Array, widths: Sequence[int]) -> list[Array]:
    """Columns back into weights."""
    return jnp.split(wide, np.cumsum(widths)[:-1].tolist(), axis=1)


def _refuse_misfits(stats: Any, weights: Sequence[Any], spec: QuantSpec | Sequence[QuantSpec], tie: Tie | None) -> None:
    """Refuse arguments of `search_scale` that do not fit together."""
    if not isinstance(stats, ActStats):
        raise TypeError(f"stats is of type {type(stats).__name__}; search_scale needs the ActStats of `observe`.")
    if len(stats.abs_sum.shape) != 1:
        raise ValueError(f"stats are of {stats.abs_sum.shape[:-1]} inputs; search_scale takes one: use jax.vmap.")
    if hasattr(weights, "shape") or not len(weights):
        raise ValueError("weights must be a list of at least one kernel [k, n], those that share the input.")
    k = stats.abs_sum.shape[0]
    for number, weight in enumerate(weights):
        name = f"weights[{number}]"
        refuse_weight(weight, name, leading=False)
        refuse_shape(name, weight, (k, weight.shape[1]), f"a row for each of the {k} channels of stats")
    if not isinstance(spec, QuantSpec) and len(spec) != len(weights):
        raise ValueError(f"there are {len(weights)} weights and {len(spec)} specs; give one, or one for each.")
    if tie is not None and k % (tie.kv_heads * tie.repeats):
        raise ValueError(f"{tie} does not fit stats of {k} channels, which are kv_heads * repeats * head width.")


def search_scale(
    stats: ActStats,
    weights: Sequence[Float[Array, "k _"]],
    search: SearchSpec = SearchSpec(),  # noqa: B008 - frozen
    spec: QuantSpec | Sequence[QuantSpec] = QuantSpec(),  # noqa: B008 - frozen
    *,
    tie: Tie | None = None,
    loss: Callable[[list[Array]], Array] | None = None,
    sample: Sample | None = None,
) -> ScaleResult:
    """Find the scale with the lowest loss; pure, one compiled loop over all candidates.

    Args:
      stats: of the input that the linears share; needs ``gram`` unless ``loss`` is given.
      weights: kernels ``[k, n_i]``.
      search: rules and grid.
      spec: the number format, or one for each weight.
      tie: where the producer's channels are fewer than k.
      loss: objective of a list of candidate weights (float32, same shapes); `gram_loss` of all of them if None.
      sample: inputs of some tokens, for weights whose activations are int8: what rounding these costs depends on each
        token and is measured.

    Returns:
      The winner. A candidate whose loss is not finite never wins; if none is finite, identity does.

    Raises:
      TypeError: ``stats`` are not `ActStats`, or a weight is no array.
      ValueError: there is no weight, a weight is not ``[k, n]`` floats or the statistics not of its k inputs, the group
        size does not divide k, the statistics hold no Gram matrix, or activations are int8 and there is no sample.
    """
    _refuse_misfits(stats, weights, spec, tie)
    if loss is None and stats.gram is None:
        raise ValueError("the gram objective needs ActStats.gram: observe(..., gram=True).")
    specs = [spec] * len(weights) if isinstance(spec, QuantSpec) else list(spec)
    if sample is None and any(s.activations != "float" for s in specs):
        raise ValueError("activations are int8: give a sample of inputs to measure on what rounding them costs.")
    # Outputs are rounded one by one, so weights of one format may stand side by side: a third less to compile.
    widths, formats = [w.shape[1] for w in weights], [*dict.fromkeys(specs)]
    if len(formats) == 1:
        specs, widths = formats, [sum(widths)]
    dense = split_columns(jnp.concatenate([w.astype(jnp.float32) for w in weights], axis=1), widths)
    scales = candidate_scales(stats, weights, search, specs[0], tie)

    def evaluate(t: Array) -> Array:
        rows = (tie.spread(t) if tie else t)[:, None]
        rounded = [fake_quantize(w * rows, s) / rows for w, s in zip(dense, specs, strict=True)]
        if loss is not None:
            return loss(split_columns(jnp.concatenate(rounded, axis=1), [w.shape[1] for w in weights]))
        error = gram_loss(jnp.concatenate([w - c for w, c in zip(dense, rounded, strict=True)], axis=1), stats)
        return error if sample is None else error + _of_activations(stats, sample, dense, rounded, rows[:, 0], specs)

    losses = jax.lax.map(evaluate, scales)
    losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    index = jnp.argmin(losses)
    return ScaleResult(scale=scales[index], index=index, losses=losses)
