# SPDX-License-Identifier: Apache-2.0
"""Statistics of what the weights of a program read."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jaxtyping import Array

from awq_jax._spec import SearchSpec
from awq_jax._stats import ActStats
from awq_jax._stats import observe as observe_rows
from awq_jax.adapt.program import Apply, run
from awq_jax.adapt.record import Recorder, merge_stats, pool_stats
from awq_jax.adapt.table import Table

__all__ = ["merge_tree", "observe", "observing"]


def observing(apply: Apply, table: Table, search: SearchSpec = SearchSpec()) -> Callable[..., Any]:  # noqa: B008
    """A pure function ``(params, *args) -> (outputs, stats)`` that computes what ``apply`` does and watches.

    It runs under the caller's `jit`, in a training step, under `pmap` or `shard_map`: reduce the statistics with
    `awq_jax.all_reduce` there, and join those of several batches with `merge_tree`.

    Args:
      apply: ``apply(params, *args) -> outputs``.
      table: from `propose`; one statistic is kept where several weights read the same tensor.
      search: decides what is kept: ``tokens_per_channel``, and histograms if a rule takes percentiles.

    Returns:
      The function. Its ``stats`` are ``{path: ActStats}``, with leading axes for stacked layers and experts.
    """
    histogram = any(rule.statistic == "percentile" for rule in search.rules)

    def reduce(path: str, rows: Array) -> ActStats | None:
        if table.source.get(path) != path:
            return None
        stride = search.stride(rows.shape[-2], rows.shape[-1])
        one = lambda x: observe_rows(x, stride=stride, histogram=histogram)
        for _ in rows.shape[:-2]:
            one = jax.vmap(one)
        return one(rows)

    def watched(params: Any, *args: Any) -> Any:
        recorder = Recorder(reduce, merge_stats, pool_stats)
        outputs = run(apply, params, args, recorder)
        return outputs, recorder.collected

    return watched


def merge_tree(a: dict[str, ActStats] | None, b: dict[str, ActStats]) -> dict[str, ActStats]:
    """Statistics of two batches joined, path by path; None is no batch yet."""
    return b if a is None else {path: merge_stats(a[path], b[path]) for path in b}


def observe(
    apply: Apply,
    params: Any,
    batches: Iterable[Any],
    table: Table,
    search: SearchSpec = SearchSpec(),  # noqa: B008 - frozen
) -> dict[str, ActStats]:
    """Run the model over batches and keep sums; no activation is stored.

    Args:
      apply: ``apply(params, batch) -> outputs``.
      params: dense.
      batches: without padding: every row counts.
      table: from `propose`.
      search: the one that `quantize` will use.

    Raises:
      ValueError: there are no batches.
    """
    watched = observing(apply, table, search)
    step = jax.jit(lambda params, total, batch: merge_tree(total, watched(params, batch)[1]), donate_argnums=1)
    total = None
    for batch in batches:
        total = step(params, total, batch)
    if total is None:
        raise ValueError("there are no batches to observe.")
    return total
