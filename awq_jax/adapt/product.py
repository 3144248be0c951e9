# SPDX-License-Identifier: Apache-2.0
"""One `dot_general` with a parameter in it, as a product of matrices."""

import dataclasses
import math
from typing import Any

from jaxtyping import Array

from awq_jax.adapt.layout import Layout
from awq_jax.adapt.views import View

__all__ = ["Product", "product_of"]


@dataclasses.dataclass(frozen=True)
class Product:
    """``y[*batch, m, n] = rows(x)[*batch, m, k] @ matrix[*batch, k, n]``.

    Attributes:
      layout: of the kernel.
      x_order: axes of x: mapped, free, summed, as the kernel stores them.
      x_shape: x with its summed and mapped axes cut into the kernel's factors.
      free: sizes of x's free axes.
      result: order of y's factors (mapped, free, output) that the program expects.
      shape: of the program's result.
      dtype: of the program's result, wider than x where it asks for that (``preferred_element_type``).
    """

    layout: Layout
    x_order: tuple[int, ...]
    x_shape: tuple[int, ...]
    free: tuple[int, ...]
    result: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any

    def rows(self, x: Array) -> Array:
        """``[*batch, m, k]``."""
        batch = self.layout.sizes(self.layout.batch)
        return x.reshape(self.x_shape).transpose(self.x_order).reshape(*batch, math.prod(self.free), self.layout.k)

    def restore(self, y: Array) -> Array:
        """The program's result from ``[*batch, m, n]``."""
        sizes = (*self.layout.sizes(self.layout.batch), *self.free, *self.layout.sizes(self.layout.out))
        return y.reshape(sizes).transpose(self.result).reshape(self.shape)


def product_of(view: View, x_shape: tuple[int, ...], dims: Any, dtype: Any, *, kernel_first: bool) -> Product | None:
    """Read a `dot_general` as a product of matrices; None if the parameter has nothing to sum over or no outputs.

    Args:
      view: of the parameter.
      x_shape: of the other operand.
      dims: ``dimension_numbers``.
      dtype: of the result.
      kernel_first: whether the parameter is the left operand.
    """
    contract, batch = dims
    (x_sum, w_sum), (x_map, w_map) = (pair[::-1] if kernel_first else pair for pair in (contract, batch))
    layout = view.layout(tuple(w_map), tuple(w_sum))
    outs = [a for a in range(len(view.axes)) if a not in w_map and a not in w_sum]
    if layout.k == 1 or not any(view.axes[a] for a in outs):
        return None

    # x, cut: every axis becomes the factors of the kernel axis it meets; ids number the pieces in order.
    meets = {**dict(zip(x_sum, w_sum, strict=True)), **dict(zip(x_map, w_map, strict=True))}
    cut: list[int] = []
    found: dict[int, int] = {}
    free: list[int] = []
    for axis, size in enumerate(x_shape):
        if axis in meets:
            for f in view.axes[meets[axis]]:
                found[f] = len(cut)
                cut.append(view.factors[f])
        else:
            free.append(len(cut))
            cut.append(size)
    order = (*(found[f] for f in layout.batch), *free, *(found[f] for f in layout.contract))

    # y has the pieces (mapped, free, out); the program wants (mapped axes, left operand's free, right operand's free).
    b, m = len(layout.batch), len(free)
    mapped = [layout.batch.index(f) for a in w_map for f in view.axes[a]]
    kept = [f for a in outs for f in view.axes[a]]
    columns = [b + m + layout.out.index(f) for f in kept]
    lost = [b + m + i for i, f in enumerate(layout.out) if f not in kept]  # axes of size 1
    rows = list(range(b, b + m))
    result = (*mapped, *lost, *((*columns, *rows) if kernel_first else (*rows, *columns)))
    out_sizes = [view.shape[a] for a in outs]
    free_sizes = [cut[i] for i in free]
    tail = (*out_sizes, *free_sizes) if kernel_first else (*free_sizes, *out_sizes)
    return Product(
        layout=layout,
        x_order=order,
        x_shape=tuple(cut),
        free=tuple(free_sizes),
        result=result,
        shape=(*(view.shape[a] for a in w_map), *tail),
        dtype=dtype,
    )
