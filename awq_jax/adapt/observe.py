# SPDX-License-Identifier: Apache-2.0
"""Statistics of what the weights of a program read."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from awq_jax._spec import SearchSpec
from awq_jax._stats import ActStats
from awq_jax._stats import observe as observe_rows
from awq_jax.adapt.padding import mask_rows
from awq_jax.adapt.program import Apply, run
from awq_jax.adapt.record import Recorder, merge_stats, pool_stats
from awq_jax.adapt.table import Table

__all__ = ["merge_tree", "observe", "observing"]


Mask = Callable[..., Array]
"""``token_mask(*args) -> bool [*t]``: which tokens of the arguments of ``apply`` count."""


def observing(
    apply: Apply,
    table: Table,
    search: SearchSpec = SearchSpec(),  # noqa: B008 - frozen
    *,
    token_mask: Mask | None = None,
) -> Callable[..., Any]:
    """A pure function ``(params, *args) -> (outputs, stats)`` that computes what ``apply`` does and watches.

    It runs under the caller's `jit`, in a training step, under `pmap` or `shard_map`: reduce the statistics with
    `awq_jax.all_reduce` there, and join those of several batches with `merge_tree`.

    Args:
      apply: ``apply(params, *args) -> outputs``.
      table: from `propose`; one statistic is kept where several weights read the same tensor.
      search: decides what is kept: ``tokens_per_channel``, and histograms if a rule takes percentiles.
      token_mask: ``token_mask(*args)`` is True where a token counts, ``[b, t]``; None counts every row. Its axes are
        looked for in those of each weight's rows, by size and in order; a model that turns ``[b, t]`` into ``[t, b]``
        with b = t can't be told from one that does not.

    Returns:
      The function. Its ``stats`` are ``{path: ActStats}``, with leading axes for stacked layers and experts.

    Raises:
      ValueError: a weight's rows are not made of the mask's axes, as behind a dispatch to experts; when called.
    """
    histogram = any(rule.statistic == "percentile" for rule in search.rules)

    def reduce(path: str, rows: Array, free: tuple[int, ...], keep: Array | None) -> ActStats | None:
        if table.source.get(path) != path:
            return None
        stride = search.stride(rows.shape[-2], rows.shape[-1])
        kept = None if keep is None else mask_rows(keep, free, path)
        one = lambda x: observe_rows(x, kept, stride=stride, histogram=histogram)
        for _ in rows.shape[:-2]:
            one = jax.vmap(one)
        return one(rows)

    def watched(params: Any, *args: Any) -> Any:
        keep = None if token_mask is None else token_mask(*args)
        recorder = Recorder(partial(reduce, keep=keep), merge_stats, pool_stats)
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
    *,
    token_mask: Mask | None = None,
) -> dict[str, ActStats]:
    """Run the model over batches and keep sums; no activation is stored.

    Args:
      apply: ``apply(params, batch) -> outputs``.
      params: dense.
      batches: each the argument of ``apply``.
      table: from `propose`.
      search: the one that `quantize` will use.
      token_mask: ``token_mask(batch)`` is True where a token counts, for example ``lambda ids: ids != pad``; see
        `observing`. The model's own attention must not look at the padding.

    Raises:
      ValueError: there are no batches, or the mask does not fit the rows of a weight.
    """
    watched = observing(apply, table, search, token_mask=token_mask)
    step = jax.jit(lambda params, total, batch: merge_tree(total, watched(params, batch)[1]), donate_argnums=1)
    total = None
    for batch in batches:
        total = step(params, total, batch)
    if total is None:
        raise ValueError("there are no batches to observe.")
    return total
