# SPDX-License-Identifier: Apache-2.0
"""Search, fold and round every group of a table."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp

from awq_jax._pytree import pytree
from awq_jax._search import ScaleResult
from awq_jax._spec import QuantSpec, Recipe
from awq_jax._stats import ActStats
from awq_jax.adapt.columns import spread
from awq_jax.adapt.coverage import Coverage, coverage_of
from awq_jax.adapt.fold import fold_instances, rows_of
from awq_jax.adapt.kernel import QKernel, dtype_name
from awq_jax.adapt.layout import Layout
from awq_jax.adapt.program import flatten, unflatten
from awq_jax.adapt.search import round_matrix, search_group
from awq_jax.adapt.table import Instance, Table, refuse_misfits

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
        "quant.activations": any(
            spec is not None and spec.activations != "float"
            for spec in (recipe.quant, *dict(recipe.overrides).values())
        ),
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
      ValueError: see `specs_of`; or the parameters or the statistics are not those of the table.
    """
    if without_producer not in get_args(Without):
        raise ValueError(f"without_producer is {without_producer!r}; use {' or '.join(map(repr, get_args(Without)))}.")
    refuse_misfits(params, table)
    leaves, tree = flatten(params)
    specs = specs_of(table, recipe)
    refuse_statistics(stats, table, specs)
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
            held, rows = stats[table.source[path]], rows_of(instance, result.scale)
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
    """What a weight's columns are divided by because it absorbs scales of other groups."""
    divisor: Any = jnp.float32(1)
    for instance, result in zip(instances, results, strict=True):
        if instance.producer == path and result is not None:
            wide = spread(result.scale, instance.group.columns, layout)
            divisor *= wide.reshape(*layout.lead, 1, layout.n)
    return divisor


def refuse_statistics(stats: Mapping[str, ActStats], table: Table, specs: Mapping[str, QuantSpec | None]) -> None:
    """Refuse statistics that are not of the inputs of a table's weights, or in blocks that split a group.

    Raises:
      ValueError: naming the weight.
    """
    for path, spec in specs.items():
        source, layout = table.source[path], table.weights[path]
        if spec is None:
            continue
        if source not in stats:
            raise ValueError(
                f"there are no statistics of {source!r}, which {path!r} needs; observe with the same table that is "
                "used to quantize, on batches in which the weight is read."
            )
        held, wanted = stats[source], (*layout.lead, layout.k)
        if held.abs_sum.shape != wanted:
            raise ValueError(
                f"the statistics that {path!r} needs are {held.abs_sum.shape}, not {wanted}; observe with this table."
            )
        if held.gram is None:
            raise ValueError(f"the statistics that {path!r} needs hold no Gram matrix; observe with gram=True.")
        rows, group = held.gram.shape[-1], spec.rows_per_group(layout.k, path)
        if rows % group:
            raise ValueError(
                f"blocks of {rows} rows were kept of the Gram matrix of {path!r} (gram_limit), which split its groups "
                f"of {group}: observe with the recipe that is used to quantize."
            )


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
        [stats[table.source[path]] for path in paths],
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
    return outcome.params, coverage_of(params, outcome, stats, table, recipe, identity=without_producer == "identity")
