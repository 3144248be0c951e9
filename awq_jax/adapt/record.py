# SPDX-License-Identifier: Apache-2.0
"""The acts: record what weights read, or let quantized kernels do their products."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from awq_jax._stats import ActStats, merge
from awq_jax.adapt.columns import Columns, Piece
from awq_jax.adapt.layout import Layout
from awq_jax.adapt.product import Product
from awq_jax.adapt.views import View

__all__ = ["Recorder", "Server", "Use", "concatenate", "merge_stats", "pool_rows", "pool_stats"]


@dataclasses.dataclass
class Use:
    """How a program uses one parameter.

    Attributes:
      layouts: of the products it is in.
      others: names of other operations that read it.
      sources: what it is multiplied with, by identity: equal lists read the same tensors.
      stack: how many scans go along its first axes.
      cuts: columns that the program takes apart from the others.
    """

    layouts: list[Layout] = dataclasses.field(default_factory=list)
    others: list[str] = dataclasses.field(default_factory=list)
    sources: list[Any] = dataclasses.field(default_factory=list)
    stack: int = 0
    cuts: set[Columns] = dataclasses.field(default_factory=set)


class Recorder:
    """Runs the program as written and keeps what ``reduce`` makes of the rows that each weight reads.

    Args:
      reduce: ``(path, rows [*batch, m, k], sizes of the axes that m is made of) -> tree``, or None for nothing.
      merge: joins two such trees of one weight.
      pool: joins the first axis of a tree: a weight that all turns of a loop share.
      cuts: follow each kernel's outputs to where the program cuts them.
    """

    def __init__(
        self,
        reduce: Callable[[str, Array, tuple[int, ...]], Any] | None = None,
        merge: Callable[[Any, Any], Any] | None = None,
        pool: Callable[[Any], Any] | None = None,
        *,
        cuts: bool = False,
    ) -> None:
        self.reduce, self.merge, self.pool, self.cuts = reduce, merge, pool, cuts
        self.collected: dict[str, Any] = {}
        self.uses: dict[str, Use] = {}
        self._alive: list[Any] = []  # an id is unique only while its object lives

    def fork(self) -> "Recorder":
        """Shares the uses."""
        other = Recorder(self.reduce, self.merge, self.pool, cuts=self.cuts)
        other.uses, other._alive = self.uses, self._alive
        return other

    def produced(self, view: View, product: Product, y: Any) -> Any:
        """A piece of the program's data, where cuts are looked for."""
        return Piece.of(view.path, product, y, self.uses[view.path].cuts) if self.cuts and y.size else y

    def product(self, view: View, product: Product, x: Any, usual: Callable[[], Any]) -> Any:
        """Note the layout, reduce the rows."""
        use = self._use(view)
        use.layouts.append(product.layout)
        use.sources.append((id(x), product.x_order, product.x_shape))
        self._alive.append(x)
        if self.reduce is not None:
            self._add(view.path, self.reduce(view.path, product.rows(x), product.free))
        return usual()

    def other(self, view: View, primitive: str) -> Any:
        """Note the operation."""
        self._use(view).others.append(primitive)
        return view.value

    def _use(self, view: View) -> Use:
        if view.value is None:
            raise ValueError(
                f"{view.path!r} is quantized already, and what its program does is looked for in dense weights, as "
                "awq_jax.train.merge_adapters(params, {}) makes them."
            )
        use = self.uses.setdefault(view.path, Use())
        use.stack = len(view.stack)
        return use

    def gather(self, collected: dict[str, Any], scanned: set[str] | None) -> None:
        """Weights that are not sliced by the loop are pooled over its turns."""
        for path, value in collected.items():
            shared = scanned is not None and path not in scanned
            self._add(path, self.pool(value) if shared and self.pool else value)

    def _add(self, path: str, value: Any) -> None:
        if value is None:
            return
        held = self.collected.get(path)
        self.collected[path] = self.merge(held, value) if held is not None and self.merge else value


class Server:
    """Quantized kernels do their own products."""

    def __init__(self) -> None:
        self.collected: dict[str, Any] = {}

    def fork(self) -> "Server":
        """Nothing is collected."""
        return Server()

    def product(self, view: View, product: Product, x: Any, usual: Callable[[], Any]) -> Any:
        """``rows(x) @ matrix`` where the weight is quantized."""
        if view.weight is None:
            return usual()
        held, wanted = view.weight.layout, product.layout
        if (held.factors, held.order, held.lead) != (wanted.factors, wanted.order, wanted.lead):
            raise ValueError(
                f"{view.path!r} was quantized as {held.describe()}, axes {held.order} of {held.factors}, but this "
                f"program multiplies by {wanted.describe()}, axes {wanted.order} of {wanted.factors}. Propose and "
                "quantize with the function that is served."
            )
        wide = np.promote_types(x.dtype, product.dtype)  # products return the dtype of x
        return product.restore(view.weight.contract(product.rows(x).astype(wide)))

    def produced(self, view: View, product: Product, y: Any) -> Any:
        """As it is."""
        return y

    def other(self, view: View, primitive: str) -> Any:
        """A dense parameter; a quantized one can only be multiplied by."""
        if view.value is None:
            raise ValueError(
                f"{view.path!r} is quantized, but this program reads it by {primitive!r}. Propose with the function "
                "that is served, or leave the weight in floating point with an override."
            )
        return view.value

    def gather(self, collected: dict[str, Any], scanned: set[str] | None) -> None:
        """Nothing is collected."""


def merge_stats(a: ActStats, b: ActStats) -> ActStats:
    """`awq_jax.merge`; sums have no shape of their own, so leading axes are free."""
    return merge(a, b)


def pool_stats(stats: ActStats) -> ActStats:
    """Statistics over a first axis."""
    total = jax.tree.map(lambda leaf: leaf.sum(0), stats)
    return dataclasses.replace(total, abs_max=stats.abs_max.max(0))


def concatenate(a: Array, b: Array) -> Array:
    """Rows of both."""
    return jnp.concatenate([a, b], axis=-2)


def pool_rows(rows: Array) -> Array:
    """Rows of every turn of a loop."""
    return jnp.concatenate(list(rows), axis=-2)
