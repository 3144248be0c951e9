# SPDX-License-Identifier: Apache-2.0
"""A parameter on its way to a product: what casts, transposes and reshapes did to its axes."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.adapt.layout import Layout, refine

__all__ = ["View", "follow", "group_axes"]


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter leaf as a program sees it.

    Attributes:
      weight: what stands for the leaf where it is not dense, or None.
      value: the array itself, in its present shape, or None.
      path: of the leaf.
      leaf_shape: its shape.
      factors: sizes of the leaf's axes, cut where reshapes cut them.
      stack: factors that enclosing scans go along.
      axes: the factors that make up every present axis.
      dtype: present.
    """

    weight: Any
    value: Any
    path: str
    leaf_shape: tuple[int, ...]
    factors: tuple[int, ...]
    stack: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    dtype: Any

    @classmethod
    def of(cls, path: str, leaf: Any, *, quantized: bool) -> "View":
        """A whole leaf."""
        shape = tuple(leaf.shape)
        return cls(
            weight=leaf if quantized else None,
            value=None if quantized else leaf,
            path=path,
            leaf_shape=shape,
            factors=shape,
            stack=(),
            axes=tuple((i,) for i in range(len(shape))),
            dtype=np.dtype(leaf.dtype),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Present shape."""
        return tuple(math.prod(self.factors[f] for f in axis) for axis in self.axes)

    def scanned(self) -> "View":
        """The same leaf inside a scan along its first axis; ``weight`` and ``value`` are sliced already."""
        return dataclasses.replace(self, stack=(*self.stack, *self.axes[0]), axes=self.axes[1:])

    def may_scan(self) -> bool:
        """Whether its first axis is one whole axis of the leaf, which is how stacked layers look."""
        return bool(self.axes) and len(self.axes[0]) == 1

    def layout(self, batch: tuple[int, ...], contract: tuple[int, ...]) -> Layout:
        """Of a product that maps over and sums over the given present axes."""
        factors = lambda axes: tuple(sorted(f for a in axes for f in self.axes[a]))
        summed, mapped = factors(contract), factors(batch)
        # What is left over, axes of size 1 that a squeeze removed included, is output.
        rest = tuple(f for f in range(len(self.factors)) if f not in (*self.stack, *mapped, *summed))
        return Layout(
            shape=self.leaf_shape,
            factors=self.factors,
            stack=self.stack,
            batch=mapped,
            contract=summed,
            out=rest,
        )


jax.tree_util.register_dataclass(
    View,
    data_fields=["weight", "value"],
    meta_fields=["path", "leaf_shape", "factors", "stack", "axes", "dtype"],
)


def follow(primitive: str, view: View, params: dict[str, Any], value: Any) -> View | None:
    """The view after an operation that moves or casts but computes nothing; None for any other operation.

    Args:
      primitive: its name.
      view: the operand.
      params: of the equation.
      value: its result, where the operand has a value.
    """
    axes = view.axes
    match primitive:
        case "convert_element_type" if jnp.issubdtype(params["new_dtype"], jnp.floating):
            return dataclasses.replace(view, value=value, dtype=np.dtype(params["new_dtype"]))
        case "copy" | "copy_p" | "name" | "sharding_constraint" | "optimization_barrier" | "pvary" | "pcast":
            pass
        case "transpose":
            axes = tuple(view.axes[p] for p in params["permutation"])
        case "squeeze":
            axes = tuple(a for i, a in enumerate(view.axes) if i not in params["dimensions"])
        case "broadcast_in_dim" if math.prod(params["shape"]) == math.prod(view.shape):
            where = dict(zip(params["broadcast_dimensions"], view.axes, strict=True))
            axes = tuple(where.get(d, ()) for d in range(len(params["shape"])))
        case "reshape" if params.get("dimensions") is None:
            return _reshaped(view, tuple(params["new_sizes"]), value)
        case _:
            return None
    return dataclasses.replace(view, value=value, axes=axes)


def _reshaped(view: View, new: tuple[int, ...], value: Any) -> View | None:
    """The view after a reshape, its factors cut further; None where an axis would mix parts of two that do not fit."""
    order = [f for axis in view.axes for f in axis if view.factors[f] != 1]
    pieces = refine([view.factors[f] for f in order], new)
    if pieces is None:
        return None
    cut = dict(zip(order, pieces, strict=True))
    factors: list[int] = []
    ids: dict[int, tuple[int, ...]] = {}
    for f, size in enumerate(view.factors):
        parts = cut.get(f, [size])
        ids[f] = tuple(range(len(factors), len(factors) + len(parts)))
        factors += parts
    axes = group_axes(factors, [i for f in order for i in ids[f]], new)
    stack = tuple(i for f in view.stack for i in ids[f])
    return dataclasses.replace(view, value=value, factors=tuple(factors), stack=stack, axes=axes)


def group_axes(factors: Sequence[int], order: Iterable[int], shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Which factors make up each axis of a shape, where they lie in ``order``; those of size 1 belong to none.

    >>> group_axes((2, 1, 3, 4), range(4), (6, 4))
    ((0, 2), (3,))
    """
    rest = [i for i in order if factors[i] != 1]
    axes: list[tuple[int, ...]] = []
    for size in shape:
        axis: list[int] = []
        while math.prod(factors[i] for i in axis) < size:
            axis.append(rest.pop(0))
        axes.append(tuple(axis))
    return tuple(axes)
