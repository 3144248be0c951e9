# SPDX-License-Identifier: Apache-2.0
"""Find the groups of a program by experiment: scale a parameter's channels and see which weights' inputs follow.

A parameter absorbs a scale exactly where its channels, multiplied by t, multiply the inputs of some weights by t and
nothing else of the function changes once those weights' rows are divided by t. Both halves are measured on the user's
own function with a small batch: no list of module classes, no pattern of equations.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax

from awq_jax.adapt.candidates import Candidate, candidates_of, find_weights
from awq_jax.adapt.columns import Columns
from awq_jax.adapt.layout import Layout
from awq_jax.adapt.probe import How, Probe, followers
from awq_jax.adapt.program import Apply, bind_stars, flatten, star
from awq_jax.adapt.table import Group, Table
from awq_jax.adapt.verify import tolerance_of, verify

__all__ = ["propose"]


def _ways(candidate: Candidate, weights: Mapping[str, Layout]) -> list[How]:
    """Offsets and biases to try, the likeliest first."""
    offsets = (0.0,) if candidate.path in weights else (0.0, 1.0)
    return [(offset, bias) for bias in candidate.biases for offset in offsets]


def _groups(probe: Probe, candidates: list[Candidate], weights: Mapping[str, Layout]) -> Any:
    """(groups by pattern, how many leading axes each producer has), measured on the first layer of each pattern."""
    groups: list[Group] = []
    done: set[tuple[str, Columns | None]] = set()
    missed: set[Any] = set()
    leads: dict[str, int] = {}
    paths = [candidate.path for candidate in candidates]
    for candidate in candidates:
        alike = (_of_any_layer(candidate.path, weights), candidate.lead, candidate.channels, candidate.columns)
        if alike in missed or not done.isdisjoint({(candidate.path, None), (candidate.path, candidate.columns)}):
            continue
        for how in _ways(candidate, weights):
            found = followers(probe, candidate, weights, how)
            if found and len(set(found.values())) == 1:
                group = _group(candidate, how, found)
                assert group.producer is not None
                groups.append(group)
                leads[group.producer] = len(candidate.lead)
                done.update((path, group.columns) for path in bind_stars(group.producer, paths))
                break
        else:
            missed.add(alike)
    return groups, leads


def _of_any_layer(path: str, weights: Mapping[str, Layout]) -> str:
    """The path with the number of its layer as a star; a numbered module of one weight alone is no layer."""
    head = star(path, 1)[0].partition("*")[0]
    layer = head + star(path)[1][0] + "/" if star(path)[1] else ""
    return star(path, 1)[0] if layer and sum(weight.startswith(layer) for weight in weights) > 1 else path


def _group(candidate: Candidate, how: How, found: Mapping[str, Any]) -> Group:
    """With stars for the numbers of the directory that all its paths are in: the layer, not the places in it."""
    offset, bias = how
    paths = [candidate.path, *found, *([bias] if bias else [])]
    parts = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    shared = [part[0] for part in itertools.takewhile(lambda part: len(set(part)) == 1, parts)]
    common = len(star("/".join(shared))[1])
    return Group(
        producer=star(candidate.path, common)[0],
        sinks=tuple(dict.fromkeys(star(sink, common)[0] for sink in found)),
        bias=star(bias, common)[0] if bias else None,
        columns=candidate.columns,
        offset=offset,
        tie=next(iter(found.values())),
    )


def _apart(groups: list[Group], table: Table) -> list[Group]:
    """Groups none of whose weights is in an earlier one."""
    # A gain costs least to change, and the more weights follow it the less can be missing.
    is_kernel = lambda group: bool(bind_stars(group.producer, table.weights))
    taken: set[str] = set()
    kept = []
    for group in sorted(groups, key=lambda g: (-len(g.sinks), is_kernel(g))):
        sinks = {sink for instance in table.of(group) for sink in instance.sinks}
        if taken.isdisjoint(sinks):
            kept.append(group)
            taken |= sinks
    return kept


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
      ValueError: no parameter is in a product that could be quantized, the parameters have no values, or the outputs on
        this batch prove nothing.
    """
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "propose measures, and these parameters are shapes without values; give random ones of a smaller model of "
            "the same paths, or take layouts alone from adapt.find_weights."
        )
    weights, left, uses = find_weights(apply, params, *args)
    if not weights:
        raise ValueError(
            "no parameter of this function can be quantized: none is multiplied by an activation"
            + (f"; {next(iter(left))!r} is {next(iter(left.values()))}." if left else ".")
        )
    leaves, _ = flatten(params)
    first: dict[Any, str] = {}
    # In a loop, a stacked weight and one that all turns share may read one tensor: they count it differently.
    source = {p: first.setdefault((layout.lead, *uses[p].sources), p) for p, layout in weights.items()}
    candidates = candidates_of(leaves, weights, uses)
    probe = Probe(apply, params, args, weights)
    groups, leads = _groups(probe, candidates, weights)
    lead = {c.path: c.lead for c in candidates}
    for pattern, depth in leads.items():
        lead |= {c.path: c.lead for c in candidates if len(c.lead) == depth and bind_stars(pattern, [c.path])}
    table = Table(groups=(), weights=weights, left=left, source=source, lead=lead)
    return _checked(apply, params, args, table, groups, probe.silent)


def _checked(apply: Apply, params: Any, args: Any, table: Table, groups: list[Group], silent: set[str]) -> Table:
    """The table with the groups that random scales prove, and the other weights with the reason they have none."""
    reasons = dict.fromkeys(silent, "its input is zero on this batch")
    tolerance = tolerance_of(params)
    while True:
        kept = _apart(groups, table)
        whole = _complete(table, kept, reasons)
        if verify(apply, params, args, whole) <= tolerance:
            return whole
        for group in kept:
            if (moved := verify(apply, params, args, whole, {group})) > tolerance:
                groups.remove(group)  # and what was left out for its sake has its turn
                why = f"folding into {group.producer} changes the outputs by {moved:.1%}"
                reasons |= {sink: why for instance in table.of(group) for sink in instance.sinks}
        if all(group in groups for group in kept):
            raise ValueError(
                "each group of this function can be folded by itself, but not all of them together; quantize with a "
                "table of your own, Table.with_groups."
            )


def _complete(table: Table, groups: list[Group], reasons: Mapping[str, str]) -> Table:
    """The table with these groups, and one without a producer for all weights of a pattern that are in none."""
    held = {sink for group in groups for instance in table.of(group) for sink in instance.sinks}
    alike: dict[str, list[str]] = {}
    for path in table.weights:
        alike.setdefault(star(path)[0], []).append(path)
    alone: dict[str, str] = {}
    for pattern, paths in alike.items():
        loose = [path for path in paths if path not in held]
        why = [reasons.get(path, "no parameter in front of it scales its input channel by channel") for path in loose]
        if loose == paths and len(set(why)) == 1:
            alone[pattern] = why[0]
        else:
            alone |= dict(zip(loose, why, strict=True))
    singles = [Group(producer=None, sinks=(sinks,), reason=why) for sinks, why in alone.items()]
    return dataclasses.replace(table, groups=(*groups, *singles))
