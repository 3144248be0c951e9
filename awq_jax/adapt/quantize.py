# SPDX-License-Identifier: Apache-2.0
"""Search, fold and round every group of a table."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax._pytree import pytree
from awq_jax._search import ScaleResult
from awq_jax._spec import QuantSpec, Recipe
from awq_jax._stats import ActStats
from awq_jax.adapt.coverage import Coverage
from awq_jax.adapt.fold import fold_instances, rows_of
from awq_jax.adapt.kernel import QKernel, dtype_name
from awq_jax.adapt.layout import Layout
from awq_jax.adapt.program import flatten, unflatten
from awq_jax.adapt.search import round_matrix, search_group
from awq_jax.adapt.table import Instance, Table
from awq_jax.report import GroupReport, LinearReport, method_of

__all__ = ["Outcome", "quantize", "quantize_params", "specs_of"]

Without = Literal["identity", "scale"]


@pytree
class Outcome:
    """What `quantize_params` returns.

    Attributes:
      params: the tree with `QKernel` leaves and folded producers.
      results: a `ScaleResult` for each instance of the table, or None where none of its weights is quantized.
      seen: fraction of layers and experts that any token reached, by weight.
    """

    params: Any
    results: Any
    seen: Any


def specs_of(table: Table, recipe: Recipe) -> dict[str, QuantSpec | None]:
    """The format of each weight by the recipe's overrides; globs match a leaf's path, or its module's.

    Raises:
      ValueError: a group size does not divide a weight's contraction dimension, a glob matches nothing, or the recipe
        asks for what needs layers.
    """
    needs_layers = {
        "refine": recipe.refine is not None,
        "propagate": recipe.propagate != "dense",
        "search.objective": recipe.search.objective != "gram",
    }
    for name, asked in needs_layers.items():
        if asked:
            raise ValueError(
                f"Recipe.{name} works layer by layer, and a tree of parameters says nothing of layers. Leave it out "
                "here; quantize_checkpoint has it."
            )
    specs: dict[str, QuantSpec | None] = {}
    used: set[str | None] = set()
    for path in table.weights:
        glob, spec = recipe.spec_of(path, path.rpartition("/")[0])
        used.add(glob)
        specs[path] = spec
        if spec is not None:
            spec.rows_per_group(table.weights[path].k, path)
    if unused := [glob for glob, _ in recipe.overrides if glob not in used]:
        raise ValueError(
            f"override {unused[0]!r} matches no weight; weights are {', '.join(list(table.weights)[:4])}, …"
        )
    return specs


def quantize_params(
    params: Any,
    stats: Mapping[str, ActStats],
    table: Table,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    *,
    without_producer: Without = "identity",
) -> Outcome:
    """The pure part of `quantize`: arrays in, arrays out, under `jit` or `jax.eval_shape` if you like.

    Args:
      params: dense tree.
      stats: from `observe`.
      table: from `propose`.
      recipe: formats, search and overrides.
      without_producer: what weights get that no parameter can absorb a scale for: "identity" (round to nearest, and
        clipping), or "scale": a searched scale kept beside the weight and applied to its input at run time.

    Raises:
      ValueError: see `specs_of`; or statistics of a weight are missing.
    """
    leaves, tree = flatten(params)
    specs = specs_of(table, recipe)
    instances = tuple(table.instances())
    results = tuple(_search(i, leaves, stats, table, recipe, specs, without_producer) for i in instances)
    found = zip(instances, results, strict=True)
    out: dict[str, Any] = {}
    out |= fold_instances(leaves, table, [(i, r.scale) for i, r in found if i.producer is not None and r is not None])
    seen: dict[str, Any] = {}
    for instance, result in zip(instances, results, strict=True):
        for path in instance.sinks:
            spec, layout = specs[path], table.weights[path]
            if spec is None:
                continue
            assert result is not None  # a quantized weight makes its group one that was searched
            held, rows = _stats_of(path, stats, table), rows_of(instance, result.scale)
            spread = rows.reshape(*rows.shape[:-1], *(1,) * (len(layout.lead) - rows.ndim + 1), rows.shape[-1])
            # From the original leaf, not the folded one: that is rounded to the leaf's dtype.
            matrix = layout.matrix(leaves[path].astype(jnp.float32)) / _columns(path, layout, instances, results)
            weight = round_matrix(
                matrix, spread, held, spec=spec, ratios=recipe.searches.clip_ratios, feedback=recipe.feedback
            )
            seen[path] = jnp.mean((held.abs_sum.max(-1) > 0).astype(jnp.float32))
            beside = instance.producer is None and without_producer == "scale"
            inverse = jnp.broadcast_to(1 / spread, (*layout.lead, layout.k)) if beside else None
            out[path] = QKernel(weight=weight, inverse=inverse, layout=layout, dtype=dtype_name(leaves[path]))
    return Outcome(params=unflatten(tree, out), results=results, seen=seen)


def _columns(path: str, layout: Layout, instances: tuple[Instance, ...], results: tuple[Any, ...]) -> Any:
    """What a weight's columns are divided by because it absorbs another group's scale."""
    for instance, result in zip(instances, results, strict=True):
        if instance.producer == path and result is not None:
            return result.scale.reshape(*layout.lead, 1, layout.n)
    return jnp.float32(1)


def _stats_of(path: str, stats: Mapping[str, ActStats], table: Table) -> ActStats:
    source = table.source[path]
    if source not in stats:
        raise ValueError(
            f"there are no statistics of {source!r}, which {path!r} needs; observe with the same table that is used "
            "to quantize."
        )
    return stats[source]


def _search(
    instance: Instance,
    leaves: Mapping[str, Any],
    stats: Mapping[str, ActStats],
    table: Table,
    recipe: Recipe,
    specs: Mapping[str, QuantSpec | None],
    without_producer: Without,
) -> ScaleResult | None:
    """The scale of one instance; identity where nothing may carry one."""
    paths = [path for path in instance.sinks if specs[path] is not None]
    if not paths:
        return None
    layouts = [table.weights[path] for path in paths]
    lead = min(len(layout.lead) for layout in layouts)
    if instance.producer is not None:
        lead = len(table.lead[instance.producer])
    free = instance.producer is not None or without_producer == "scale"
    return search_group(
        [_stats_of(path, stats, table) for path in paths],
        [layout.matrix(leaves[path]) for path, layout in zip(paths, layouts, strict=True)],
        specs=tuple(spec for path in paths if (spec := specs[path]) is not None),
        search=recipe.searches if free else recipe.searches.identity_only,
        tie=instance.group.tie,
        lead=lead,
    )


def quantize(
    params: Any,
    stats: Mapping[str, ActStats],
    table: Table,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    *,
    without_producer: Without = "identity",
) -> tuple[Any, Coverage]:
    """Quantize a tree of parameters; arguments and errors as `quantize_params`.

    Returns:
      The tree with `QKernel` leaves, for `serve`, and what each weight got and why.
    """
    outcome = quantize_params(params, stats, table, recipe, without_producer=without_producer)
    specs = specs_of(table, recipe)
    groups, linears = [], []
    for instance, result in zip(table.instances(), outcome.results, strict=True):
        if result is not None:
            groups.append(_group_report(instance, result, recipe))
        linears += _linears(instance, result, outcome.seen, specs, recipe, without_producer)
    bits = lambda leaf: 8 * np.dtype(leaf.dtype).itemsize
    leaves, _ = flatten(params)
    for path, reason in table.left.items():
        linears.append(LinearReport(path=path, method="float", reason=reason, bits=bits(leaves[path]), group_size=0))
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    coverage = Coverage(
        linears=tuple(linears), groups=tuple(groups), nbytes=size(outcome.params), dense_nbytes=size(params)
    )
    return outcome.params, coverage


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
        producer=instance.producer,
        rule=rule.name,
        power=power,
        loss=value(losses.min(-1).sum()),
        rtn_loss=value(total[0]),
        losses=tuple(map(value, total)),
    )


def _linears(
    instance: Instance,
    result: ScaleResult | None,
    seen: Mapping[str, Any],
    specs: Mapping[str, QuantSpec | None],
    recipe: Recipe,
    without_producer: Without,
) -> Iterator[LinearReport]:
    for path in instance.sinks:
        spec = specs[path]
        if spec is None:
            why = "left in floating point by an override"
            yield LinearReport(path=path, method="float", reason=why, bits=32, group_size=0)
            continue
        assert result is not None
        helped = np.asarray(result.index).reshape(-1) > 0
        finite = np.isfinite(np.asarray(result.losses)[..., 0]).all()
        notes = []
        if not finite:
            notes.append("its activations are not finite")
        elif "awq" not in recipe.method:
            notes.append(f"method {recipe.method!r} searches no scale")
        elif instance.producer is None and without_producer == "identity":
            notes.append(instance.group.reason or "nothing in front of it can absorb a scale")
        elif not helped.any():
            notes.append("no candidate was better than round to nearest")
        elif not helped.all():
            notes.append(f"in {int((~helped).sum())} of {helped.size} no candidate was better than round to nearest")
        if seen[path] < 1:
            notes.append(f"{1 - float(seen[path]):.0%} of its layers or experts saw no token")
        yield LinearReport(
            path=path,
            method=method_of(
                scaled=bool(finite and helped.any()), fed_back=bool(finite and recipe.feedback is not None)
            ),
            reason="; ".join(notes),
            bits=spec.bits,
            group_size=spec.group_size,
        )
