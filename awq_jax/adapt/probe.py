# SPDX-License-Identifier: Apache-2.0
"""The experiment: scale a parameter's channels and see which weights' inputs follow, channel by channel."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from awq_jax._tie import Tie
from awq_jax.adapt.candidates import Candidate
from awq_jax.adapt.columns import spread
from awq_jax.adapt.fold import scale_channels
from awq_jax.adapt.layout import Layout
from awq_jax.adapt.program import Apply, flatten, run, unflatten
from awq_jax.adapt.record import Recorder, concatenate, pool_rows

__all__ = ["How", "Probe", "followers"]

_BASE = 16  # a channel's number is written in digits, one measurement each
_STEPS = 8  # digits are powers of 2**(1/8), 9 % apart: bfloat16 tells them apart

How = tuple[float, str | None]
"""(offset of the gain, path of the bias)"""


def _raw(apply: Apply, params: Any, args: Any) -> dict[str, Array]:
    recorder = Recorder(lambda path, rows, free: rows.astype(jnp.float32), concatenate, pool_rows)
    run(apply, params, args, recorder)
    return recorder.collected


class Probe:
    """Measures by what factor the input channels of each weight change."""

    def __init__(self, apply: Apply, params: Any, args: Any, table: Any) -> None:
        leaves, tree = flatten(params)
        first = lambda rows, path: rows[(0,) * len(table[path].lead)] if table[path].lead else rows

        @jax.jit
        def measure(leaves: Any, scaled: Any) -> dict[str, tuple[Array, Array]]:
            before = _raw(apply, unflatten(tree, leaves), args)
            after = _raw(apply, unflatten(tree, scaled), args)
            out = {}
            for path, rows in before.items():
                if path in table:
                    x, y = first(rows, path), first(after[path], path)
                    power = jnp.sum(x * x, axis=0)
                    ratio = jnp.sum(x * y, axis=0) / jnp.where(power > 0, power, 1.0)
                    error = jnp.sum((y - ratio * x) ** 2, axis=0) / jnp.where(power > 0, power, 1.0)
                    out[path] = (jnp.where(power > 0, ratio, jnp.nan), jnp.sqrt(error))
            return out

        self.leaves, self.measure = leaves, measure
        same = measure(leaves, leaves)
        self.silent = {path for path, (ratio, _) in same.items() if not np.isfinite(np.asarray(ratio)).any()}

    def digits(self, candidate: Candidate, layout: Layout | None, how: How, place: int) -> dict[str, np.ndarray]:
        """One digit of the channel that each input channel follows, -1 where unknown, by path."""
        channel = np.arange(candidate.channels) // _BASE**place % _BASE
        t = np.ones((*candidate.lead, candidate.channels), np.float32)
        t[(0,) * _depth(candidate, layout)] = 2.0 ** ((channel + 1) / _STEPS)
        wide = jnp.asarray(t) if layout is None else spread(jnp.asarray(t), candidate.columns, layout)
        offset, bias = how
        scaled = {candidate.path: scale_channels(self.leaves[candidate.path], layout, offset, wide)}
        if bias:
            scaled[bias] = scale_channels(self.leaves[bias], None, 0.0, wide)
        found = {}
        for path, (ratio, error) in self.measure(self.leaves, {**self.leaves, **scaled}).items():
            ratio, error = np.asarray(ratio), np.asarray(error)
            live = np.isfinite(ratio)
            with np.errstate(divide="ignore", invalid="ignore"):
                steps = _STEPS * np.log2(np.where(live & (ratio > 0), ratio, 1e9))
            digit = np.round(steps) - 1
            fits = (digit >= 0) & (digit < _BASE) & (np.abs(steps - digit - 1) < 0.2) & (error < 0.05)
            if live.any() and fits[live].all():
                found[path] = np.where(live, digit, -1).astype(int)
        return found


def _depth(candidate: Candidate, layout: Layout | None) -> int:
    """Leading axes to take the first of: stacked layers, not experts."""
    return len(candidate.lead) if layout is None else len(layout.stack)


def followers(probe: Probe, candidate: Candidate, weights: Mapping[str, Layout], how: How) -> dict[str, Any]:
    """{sink: Tie or None} of the weights whose inputs follow a candidate's channels."""
    layout = weights.get(candidate.path)
    places = max(1, math.ceil(math.log(candidate.channels, _BASE) - 1e-9))
    numbers = probe.digits(candidate, layout, how, 0)
    for place in range(1, places):
        if not numbers:
            return {}
        more = probe.digits(candidate, layout, how, place)
        numbers = {p: np.where(n < 0, n, n + more[p] * _BASE**place) for p, n in numbers.items() if p in more}
    found = {}
    for path, number in numbers.items():
        if weights[path].lead[: len(candidate.lead)] != candidate.lead:
            continue
        fit = _tie_of(number, candidate.channels)
        if fit is not None:
            found[path] = fit or None
    return found


def _tie_of(number: np.ndarray, channels: int) -> Any:
    """False where input channel j follows channel j; a Tie where heads repeat; None where neither is so."""
    live = number >= 0
    if len(number) % channels:
        return None
    repeats = len(number) // channels
    if repeats == 1:
        return False if (number == np.arange(channels))[live].all() else None
    for heads in (h for h in range(1, channels + 1) if channels % h == 0):
        tie = Tie(heads, repeats)
        if (np.asarray(tie.spread(jnp.arange(channels, dtype=jnp.float32))) == number)[live].all():
            return tie
    return None
