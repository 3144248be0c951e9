# SPDX-License-Identifier: Apache-2.0
"""How a kernel of any shape is a stack of matrices: which of its axes are contracted, which are outputs."""

import dataclasses
import math
from collections.abc import Sequence

from jaxtyping import Array

__all__ = ["Layout", "refine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A kernel's axes, cut into factors and sorted by what a product does with them.

    ``matrix(w)`` is ``[*lead, k, n]``: leading axes are stacked layers and experts, ``k`` are the contracted axes and
    ``n`` the output axes, each in the order in which the kernel stores them.

    Attributes:
      shape: of the kernel as its owner holds it.
      factors: sizes of its axes after cutting them where a reshape does, in order.
      stack: factors that a scan goes along, outermost first.
      batch: factors that the product maps over: experts.
      contract: factors that are summed over.
      out: factors that remain.

    >>> attention = Layout(shape=(8, 2, 4), factors=(8, 2, 4), contract=(0,), out=(1, 2))
    >>> attention.matrix(jnp.ones((8, 2, 4))).shape
    (8, 8)
    """

    shape: tuple[int, ...]
    factors: tuple[int, ...]
    stack: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    contract: tuple[int, ...]
    out: tuple[int, ...]

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes of the matrix."""
        return self.sizes((*self.stack, *self.batch))

    @property
    def k(self) -> int:
        """Rows of the matrix."""
        return math.prod(self.sizes(self.contract))

    @property
    def n(self) -> int:
        """Columns of the matrix."""
        return math.prod(self.sizes(self.out))

    @property
    def order(self) -> tuple[int, ...]:
        """All factors, in the order of the matrix."""
        return (*self.stack, *self.batch, *self.contract, *self.out)

    def sizes(self, factors: Sequence[int]) -> tuple[int, ...]:
        """Of some factors."""
        return tuple(self.factors[f] for f in factors)

    def matrix(self, kernel: Array) -> Array:
        """``[*lead, k, n]`` of a kernel of this shape."""
        return kernel.reshape(self.factors).transpose(self.order).reshape(*self.lead, self.k, self.n)

    def kernel(self, matrix: Array) -> Array:
        """Inverse of `matrix`."""
        back = [self.order.index(f) for f in range(len(self.factors))]
        return matrix.reshape(self.sizes(self.order)).transpose(back).reshape(self.shape)

    def describe(self) -> str:
        """For a report, for example ``256 x 512``, or ``8 of 256 x 512`` where there are leading axes."""
        many = f"{math.prod(self.lead)} of " if self.lead else ""
        return f"{many}{self.k} x {self.n}"


def refine(old: Sequence[int], new: Sequence[int]) -> list[list[int]] | None:
    """Cut axes of sizes ``old`` so that axes of sizes ``new`` are runs of the pieces.

    Returns:
      The pieces of every old axis, or None where a new axis would take a part of an old one that does not divide it.
      Pieces of size 1 are left out.

    >>> refine((6, 4), (2, 12)), refine((6, 4), (4, 6))
    ([[2, 3], [4]], None)
    """
    pieces: list[list[int]] = [[] for _ in old]
    wanted = [size for size in new if size != 1]
    want = wanted.pop(0) if wanted else 1
    for index, size in enumerate(old):
        left = size
        while left > 1:
            piece = math.gcd(left, want)
            if piece == 1 or (piece != left and piece != want):
                return None
            pieces[index].append(piece)
            left, want = left // piece, want // piece
            if want == 1:
                want = wanted.pop(0) if wanted else 1
    return pieces
