# SPDX-License-Identifier: Apache-2.0
"""Some of a kernel's columns: v in a fused qkv, up in a fused gate and up.

A program says where its fused kernels are cut: their outputs are followed through reshapes and transposes to the next
slice. What is found there is a hint and no more: whether the columns absorb a scale is measured, as for a whole kernel.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from awq_jax.adapt.layout import Layout
from awq_jax.adapt.product import Product
from awq_jax.adapt.views import View, follow, group_axes

__all__ = ["Columns", "Piece", "carried", "spread", "whole"]


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Columns:
    """The columns ``j`` of a kernel with ``start <= j % period < stop``.

    >>> Columns(period=6, start=4, stop=6).of(12).tolist()
    [4, 5, 10, 11]
    """

    period: int
    start: int
    stop: int

    def of(self, n: int) -> np.ndarray:
        """Their numbers, of n."""
        place = np.arange(n) % self.period
        return np.flatnonzero((place >= self.start) & (place < self.stop))

    def __str__(self) -> str:
        return f"columns {self.start}:{self.stop} of every {self.period}"


def spread(t: Array, columns: Columns | None, layout: Layout) -> Array:
    """Factors ``[*lead, n]`` of all columns of a kernel from those of some, ``[*lead, c]``; the others get 1."""
    if columns is None:
        return t
    lead = t.shape[:-1]
    n = math.prod(layout.lead) * layout.n // math.prod(lead)  # experts among the outputs may be leading axes of t
    return jnp.ones((*lead, n), t.dtype).at[..., columns.of(n)].set(t)


@dataclasses.dataclass(frozen=True)
class Piece:
    """An array in a program that holds the outputs of one kernel.

    Attributes:
      view: the array and its axes; ``view.path`` is the kernel's, and ``view.stack`` are here the factors that make up
        the kernel's columns, in the kernel's order.
      cuts: where to note the columns that slices take.
    """

    view: View
    cuts: set[Columns]

    @classmethod
    def of(cls, path: str, product: Product, y: Any, cuts: set[Columns]) -> "Piece":
        """The result of a product."""
        layout = product.layout
        sizes = (*layout.sizes(layout.batch), *product.free, *layout.sizes(layout.out))
        before = len(sizes) - len(layout.out)
        factors = tuple(sizes[i] for i in product.result)
        view = View(
            weight=None,
            value=y,
            path=path,
            leaf_shape=tuple(y.shape),
            factors=factors,
            stack=tuple(product.result.index(before + i) for i in range(len(layout.out))),
            axes=group_axes(factors, range(len(factors)), y.shape),
            dtype=np.dtype(y.dtype),
        )
        return cls(view, cuts)

    def cut(self, axis: int, start: int, stop: int) -> Columns | None:
        """The columns between two places of an axis; None where they are not a part of the columns."""
        factors, columns = self.view.factors, [f for f in self.view.stack if self.view.factors[f] != 1]
        along = [f for f in self.view.axes[axis] if factors[f] != 1]
        at = columns.index(along[0]) if along and along[0] in columns else -1
        if at < 0 or columns[at : at + len(along)] != along:
            return None
        inner = math.prod(factors[f] for f in columns[at + len(along) :])
        period = inner * math.prod(factors[f] for f in along)
        found = Columns(period=period, start=start * inner, stop=stop * inner)
        return found if 0 < found.stop - found.start < period else None


def whole(operand: Any) -> Any:
    """The array of a piece; anything else as it is."""
    return operand.view.value if isinstance(operand, Piece) else operand


def _slices(primitive: str, params: dict[str, Any], shape: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(axis, start, stop) of what an equation cuts out of an operand along one axis."""
    if primitive == "split":
        stops = np.cumsum(params["sizes"]).tolist()
        yield from ((int(params["axis"]), start, stop) for start, stop in zip([0, *stops], stops, strict=False))
    if primitive == "unstack":  # iteration, since jax 0.12
        yield from ((int(params["axis"]), i, i + 1) for i in range(shape[params["axis"]]))
    if primitive == "slice" and all(stride == 1 for stride in params["strides"] or ()):
        bounds = list(zip(params["start_indices"], params["limit_indices"], shape, strict=True))
        cut = [(axis, a, b) for axis, (a, b, size) in enumerate(bounds) if b - a < size]
        yield from cut if len(cut) == 1 else ()


def carried(eqn: Any, operands: Sequence[Any], results: list[Any]) -> list[Any]:
    """Results of an equation, as pieces where they hold the outputs of one kernel still; cuts are noted."""
    pieces = [operand for operand in operands if isinstance(operand, Piece)]
    if len(pieces) != 1 or any(isinstance(result, View | Piece) for result in results):
        return results
    (piece,), name = pieces, eqn.primitive.name
    for axis, start, stop in _slices(name, eqn.params, piece.view.value.shape):
        if found := piece.cut(axis, start, stop):
            piece.cuts.add(found)
    if len(results) != 1:
        return results
    moved = follow(name, piece.view, eqn.params, results[0]) if len(operands) == 1 else None
    if moved is None and results[0].shape == piece.view.value.shape and len(operands) > 1:
        moved = dataclasses.replace(piece.view, value=results[0])  # a bias, a rotation, a factor
    return results if moved is None else [dataclasses.replace(piece, view=moved)]
