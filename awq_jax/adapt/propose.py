# SPDX-License-Identifier: Apache-2.0
"""Find the groups of a program by experiment: scale a parameter's channels and see which weights' inputs follow.

A parameter absorbs a scale exactly where its channels, multiplied by t, multiply the inputs of some weights by t and
nothing else of the function changes once those weights' rows are divided by t. Both halves are measured on the user's
own function with a small batch: no list of module classes, no pattern of equations.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from awq_jax._tie import Tie
from awq_jax.adapt.fold import fold_instances, scale_channels
from awq_jax.adapt.layout import Layout
from awq_jax.adapt.program import Apply, flatten, hold_static, run, star, unflatten
from awq_jax.adapt.record import Recorder, Use, concatenate, pool_rows
from awq_jax.adapt.table import Group, Table

__all__ = ["find_weights", "propose", "verify"]

_BASE = 16  # a channel's number is written in digits, one measurement each
_STEPS = 8  # digits are powers of 2**(1/8), 9 % apart: bfloat16 tells them apart
_BIASES = ("bias", "b", "beta", "offset")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A parameter that may absorb a scale.

    Attributes:
      path: of the gain or kernel.
      bias: beside it, or None.
      lead: sizes of stacked layers and experts.
      channels: of one layer.
    """

    path: str
    bias: str | None
    lead: tuple[int, ...]
    channels: int


def find_weights(apply: Apply, params: Any, *args: Any) -> tuple[dict[str, Layout], dict[str, str], dict[str, Use]]:
    """(layouts of kernels that can be quantized, reasons for the others, all uses); runs nothing.

    A kernel is a parameter in a product. It can be quantized if products are all that reads it.
    """
    recorder = Recorder()
    arrays, restore = hold_static(args)
    jax.eval_shape(lambda p, arrays: run(apply, p, restore(arrays), recorder), params, arrays)
    weights, left = {}, {}
    for path, use in recorder.uses.items():
        if not use.layouts:
            continue
        if use.others:
            left[path] = f"also read by {', '.join(dict.fromkeys(use.others))}"
        elif len(set(use.layouts)) > 1:
            left[path] = "multiplied along different axes in different places"
        elif use.layouts[0].k % 2:
            left[path] = f"its contraction dimension {use.layouts[0].k} is odd, and two codes share a byte"
        else:
            weights[path] = use.layouts[0]
    return weights, left, recorder.uses


def _candidates(leaves: Mapping[str, Any], weights: Mapping[str, Layout], uses: Mapping[str, Use]) -> list[Candidate]:
    """Gains and kernels, the bias beside each found by its place and size."""
    beside: dict[str, list[str]] = {}
    for path in leaves:
        beside.setdefault(path.rpartition("/")[0], []).append(path)
    found = []
    for siblings in beside.values():
        plain = [p for p in siblings if p in uses and p not in weights and not uses[p].layouts]
        biases = [p for p in plain if p.rpartition("/")[2].lower() in _BIASES]
        kernels = [p for p in siblings if p in weights]
        gains = [p for p in plain if p not in biases and leaves[p].ndim == uses[p].stack + 1]
        for path in [*gains, *kernels]:
            layout = weights.get(path)
            lead = layout.lead if layout else tuple(leaves[path].shape[: uses[path].stack])
            channels = layout.n if layout else leaves[path].shape[-1]
            bias = next((b for b in biases if math.prod(leaves[b].shape) == math.prod(lead) * channels), None)
            if layout and (experts := _experts(layout, weights)):
                found.append(Candidate(path=path, bias=bias, lead=(*lead, experts), channels=channels // experts))
            found.append(Candidate(path=path, bias=bias, lead=lead, channels=channels))
    return found


def _experts(layout: Layout, weights: Mapping[str, Layout]) -> int:
    """Size of a kernel's first output axis if it may be one of experts: some other kernel is mapped over as many."""
    size = layout.factors[layout.out[0]] if len(layout.out) > 1 else 0
    return size if any(size in other.sizes(other.batch) for other in weights.values()) else 0


def _raw(apply: Apply, params: Any, args: Any) -> dict[str, Array]:
    recorder = Recorder(lambda path, rows, free: rows.astype(jnp.float32), concatenate, pool_rows)
    run(apply, params, args, recorder)
    return recorder.collected


class _Probe:
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

    def digits(self, candidate: Candidate, layout: Layout | None, offset: float, place: int) -> dict[str, np.ndarray]:
        """One digit of the channel that each input channel follows, -1 where unknown, by path."""
        channel = np.arange(candidate.channels) // _BASE**place % _BASE
        t = np.ones((*candidate.lead, candidate.channels), np.float32)
        t[(0,) * _depth(candidate, layout)] = 2.0 ** ((channel + 1) / _STEPS)
        scaled = {candidate.path: scale_channels(self.leaves[candidate.path], layout, offset, jnp.asarray(t))}
        if candidate.bias:
            scaled[candidate.bias] = scale_channels(self.leaves[candidate.bias], None, 0.0, jnp.asarray(t))
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


def _followers(probe: _Probe, candidate: Candidate, weights: Mapping[str, Layout], offset: float) -> dict[str, Any]:
    """{sink: Tie or None} of the weights whose inputs follow a candidate's channels."""
    layout = weights.get(candidate.path)
    places = max(1, math.ceil(math.log(candidate.channels, _BASE) - 1e-9))
    numbers = probe.digits(candidate, layout, offset, 0)
    for place in range(1, places):
        if not numbers:
            return {}
        more = probe.digits(candidate, layout, offset, place)
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


def _groups(probe: _Probe, candidates: list[Candidate], weights: Mapping[str, Layout]) -> Any:
    """(groups by pattern, how many leading axes each producer has), measured on the first layer of each pattern."""
    groups: list[Group] = []
    done: set[Any] = set()
    leads: dict[str, int] = {}
    for candidate in candidates:
        pattern, numbers = star(candidate.path)
        if pattern in done or (pattern, candidate.lead) in done:
            continue
        done.add((pattern, candidate.lead))
        for offset in (0.0,) if candidate.path in weights else (0.0, 1.0):
            found = _followers(probe, candidate, weights, offset)
            ties = set(found.values())
            same = [star(sink) for sink in found]
            if found and len(ties) == 1 and all(stars == numbers for _, stars in same):
                bias = star(candidate.bias)[0] if candidate.bias else None
                sinks = tuple(sink for sink, _ in same)
                groups.append(Group(producer=pattern, sinks=sinks, bias=bias, offset=offset, tie=ties.pop()))
                done.add(pattern)
                leads[pattern] = len(candidate.lead)
                break
    # A gain costs least to change, and the more weights follow it the less can be missing.
    groups.sort(key=lambda g: (-len(g.sinks), "/kernel" in str(g.producer)))
    taken: set[str] = set()
    kept = []
    for group in groups:
        if taken.isdisjoint(group.sinks):
            kept.append(group)
            taken.update(group.sinks)
    return kept, leads


def verify(apply: Apply, params: Any, args: Any, table: Table, groups: Any = None) -> float:
    """Fold random powers of two into every group and return how far the outputs move, relative to the largest.

    Powers of two round nothing, so a table that is right gives 0, or the rounding of ``1 + gain``.
    """
    leaves, tree = flatten(params)
    rng = np.random.default_rng(0)
    scales = []
    for instance in table.instances():
        if instance.producer is not None and (groups is None or instance.group in groups):
            layout, lead = table.weights.get(instance.producer), table.lead[instance.producer]
            size = math.prod(layout.lead) * layout.n if layout else leaves[instance.producer].size
            t = 2.0 ** rng.integers(-1, 2, (*lead, size // math.prod(lead)))
            scales.append((instance, jnp.asarray(t, jnp.float32)))
    call = jax.jit(lambda leaves: apply(unflatten(tree, leaves), *args))
    worst = 0.0
    changed = fold_instances(leaves, table, scales)
    for a, b in zip(jax.tree.leaves(call(leaves)), jax.tree.leaves(call(changed)), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            worst = max(worst, float(np.abs(a - b).max(initial=0.0) / max(np.abs(a).max(initial=0.0), 1e-30)))
    return worst


def _tolerance(params: Any) -> float:
    """What rounding ``1 + gain`` to the parameters' dtype may move."""
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return 64 * max(float(jnp.finfo(d).eps) for d in dtypes) if dtypes else 0.0


def propose(apply: Apply, params: Any, *args: Any) -> Table:
    """Find what shares a scale and what absorbs it.

    Runs ``apply`` some dozens of times on a small batch: give a few hundred tokens. Print the table and read it; it
    can be changed with `Table.with_groups` or written by hand.

    Args:
      apply: ``apply(params, *args) -> outputs``, pure; the function that will be served.
      params: tree of dense arrays.
      *args: a small batch, arrays and static values.

    Returns:
      The table. Each group has passed a test: random scales folded into it leave the outputs as they were.

    Raises:
      ValueError: no parameter is in a product that could be quantized.
    """
    weights, left, uses = find_weights(apply, params, *args)
    if not weights:
        raise ValueError(
            "no parameter of this function can be quantized: none is multiplied by an activation"
            + (f"; {next(iter(left))!r} is {next(iter(left.values()))}." if left else ".")
        )
    leaves, _ = flatten(params)
    first: dict[Any, str] = {}
    source = {path: first.setdefault(tuple(uses[path].sources), path) for path in weights}
    candidates = _candidates(leaves, weights, uses)
    probe = _Probe(apply, params, args, weights)
    groups, leads = _groups(probe, candidates, weights)
    lead = {c.path: c.lead for c in candidates if leads.get(star(c.path)[0], len(c.lead)) == len(c.lead)}
    table = Table(groups=(), weights=weights, left=left, source=source, lead=lead)
    return _checked(apply, params, args, table, groups, probe.silent)


def _checked(apply: Apply, params: Any, args: Any, table: Table, groups: list[Group], silent: set[str]) -> Table:
    """The table with the groups that random scales prove, and the other weights with the reason they have none."""
    reasons = {star(path)[0]: "its input is zero on this batch" for path in silent}

    def complete(kept: list[Group]) -> Table:
        held = {sink for group in kept for sink in group.sinks}
        loose = dict.fromkeys(pattern for path in table.weights if (pattern := star(path)[0]) not in held)
        why = "no parameter in front of it scales its input channel by channel"
        alone = [Group(producer=None, sinks=(p,), reason=reasons.get(p, why)) for p in loose]
        return dataclasses.replace(table, groups=(*kept, *alone))

    tolerance = _tolerance(params)
    if verify(apply, params, args, complete(groups)) > tolerance:
        for group in list(groups):
            moved = verify(apply, params, args, complete(groups), {group})
            if not moved <= tolerance:
                groups.remove(group)
                why = f"folding into {group.producer} changes the outputs by {moved:.1%}"
                reasons |= dict.fromkeys(group.sinks, why)
    return complete(groups)
