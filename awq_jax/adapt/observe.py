# SPDX-License-Identifier: Apache-2.0
"""Statistics of what the weights of a program read."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from awq_jax._spec import Recipe, SearchSpec
from awq_jax._stats import ActStats
from awq_jax._stats import observe as observe_rows
from awq_jax.adapt.blocks import gram_rows
from awq_jax.adapt.padding import mask_rows
from awq_jax.adapt.program import Apply, run
from awq_jax.adapt.record import Recorder, merge_stats, pool_stats
from awq_jax.adapt.table import Table, refuse_misfits

__all__ = ["merge_tree", "observe", "observing"]


Mask = Callable[..., Array]
"""``token_mask(*args) -> bool [*t]``: which tokens of the arguments of ``apply`` count."""


def observing(
    apply: Apply,
    table: Table,
    search: SearchSpec | Recipe = SearchSpec(),  # noqa: B008 - frozen
    *,
    token_mask: Mask | None = None,
) -> Callable[..., Any]:
    """A pure function ``(params, *args) -> (outputs, stats)`` that computes what ``apply`` does and watches.

    It runs under the caller's `jit`, in a training step, under `pmap` or `shard_map`: reduce the statistics with
    `awq_jax.all_reduce` there, and join those of several batches with `merge_tree`.

    Args:
      apply: ``apply(params, *args) -> outputs``.
      table: from `propose`; one statistic is kept where several weights read the same tensor.
      search: decides what is kept: ``tokens_per_channel``, ``gram_limit``, and histograms if a rule takes percentiles.
        A recipe says it as its search does, and which blocks of a Gram matrix hold whole quantization groups.
      token_mask: ``token_mask(*args)`` is True where a token counts, ``[b, t]``; None counts every row. Its axes are
        looked for in those of each weight's rows, by size and in order; a model that turns ``[b, t]`` into ``[t, b]``
        with b = t can't be told from one that does not.

    Returns:
      The function. Its ``stats`` are ``{path: ActStats}``, with leading axes for stacked layers and experts.

    Raises:
      ValueError: when called: the parameters are not those of the table, or quantized; or a weight's rows are not made
        of the mask's axes, as behind a dispatch to experts.
    """
    recipe = search if isinstance(search, Recipe) else None
    search = search.searches if isinstance(search, Recipe) else search
    histogram = any(rule.statistic == "percentile" for rule in search.rules)
    rows_kept = gram_rows(table, search.gram_limit, recipe)

    def reduce(path: str, rows: Array, free: tuple[int, ...], keep: Array | None) -> ActStats | None:
        if table.source.get(path) != path:
            return None
        stride = search.stride(rows.shape[-2], rows.shape[-1])
        kept = None if keep is None else mask_rows(keep, free, path)
        block = rows_kept[path] if rows_kept[path] < table.weights[path].k else None  # a shard has fewer
        one = partial(observe_rows, stride=stride, histogram=histogram, block=block)
        for _ in rows.shape[:-2]:
            one = jax.vmap(one, in_axes=(0, None))
        return _placed_by_compiler(one)(rows, kept)

    def watched(params: Any, *args: Any) -> Any:
        refuse_misfits(params, table, whole=False)
        keep = None if token_mask is None else token_mask(*args)
        recorder = Recorder(partial(reduce, keep=keep), merge_stats, pool_stats)
        outputs = run(apply, params, args, recorder)
        return outputs, recorder.collected

    return watched


def _placed_by_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    """A sum over tokens, wherever these lie; where the axes of a mesh are explicit, its result is replicated."""
    explicit = AxisType.Explicit in getattr(jax.sharding.get_abstract_mesh(), "axis_types", ())
    return jax.sharding.auto_axes(function, out_sharding=PartitionSpec()) if explicit else function


def merge_tree(a: dict[str, ActStats] | None, b: dict[str, ActStats]) -> dict[str, ActStats]:
    """Statistics of two batches joined, path by path; a weight may be read in one of them alone. None is no batch."""
    a = a or {}
    return {p: merge_stats(a[p], b[p]) if p in a and p in b else (a if p in a else b)[p] for p in {**a, **b}}


def observe(
    apply: Apply,
    params: Any,
    batches: Iterable[Any],
    table: Table,
    search: SearchSpec | Recipe = SearchSpec(),  # noqa: B008 - frozen
    *,
    token_mask: Mask | None = None,
) -> dict[str, ActStats]:
    """Run the model over batches and keep sums; no activation is stored.

    Args:
      apply: ``apply(params, batch) -> outputs``.
      params: dense.
      batches: each the argument of ``apply``.
      table: from `propose`.
      search: the one that `quantize` will use, or its recipe.
      token_mask: ``token_mask(batch)`` is True where a token counts, for example ``lambda ids: ids != pad``; see
        `observing`. The model's own attention must not look at the padding.

    Raises:
      ValueError: there are no batches, the parameters are not those of the table, or the mask does not fit the rows of
        a weight.
    """
    refuse_misfits(params, table)
    watched = observing(apply, table, search, token_mask=token_mask)
    step = jax.jit(lambda params, total, batch: merge_tree(total, watched(params, batch)[1]), donate_argnums=1)
    total = None
    for batch in batches:
        try:
            total = step(params, total, batch)
        except Exception as error:
            if hasattr(batches, "shape"):
                error.add_note(f"batches is an array, whose rows {batch.shape} were taken for them: give [batches].")
            raise
    if total is None:
        raise ValueError("there are no batches to observe.")
    return total
