# SPDX-License-Identifier: Apache-2.0
"""The number format of one stored linear, as config and headers tell it."""

import dataclasses
from typing import Any

from awq_jax._qtensor import QTensor

__all__ = ["Scheme", "form"]


@dataclasses.dataclass(frozen=True, order=True)
class Scheme:
    """A number format.

    Attributes:
      bits: of a code.
      group_size: rows that share a scale, -1 for the whole column.
      symmetric: whether zeros are fixed in the middle; False also where only the tensors themselves could tell.
      activations: what multiplies the weight, as in `awq_jax.QuantSpec`: "float", or int8 by "token" or by "tensor".
    """

    bits: int
    group_size: int
    symmetric: bool
    activations: str = "float"

    @classmethod
    def of(cls, leaf: Any) -> "Scheme | None":
        """That of a parameter in memory; None for a dense one."""
        if not isinstance(leaf, QTensor):
            return None
        return cls(leaf.bits, leaf.group_size, leaf.zero is None, leaf.activations)

    def rows(self, k: int) -> int:
        """Rows of a group in a weight of k rows."""
        return k if self.group_size == -1 else self.group_size


def form(bits: int, group_size: int, *, symmetric: bool = False, activations: str = "float") -> str:
    """What people read about a number format.

    >>> form(4, 128), form(3, -1, symmetric=True), form(8, -1, symmetric=True, activations="token")
    ('int4 g128', 'int3 column symmetric', 'int8 x int8 by token')
    """
    if activations != "float":
        return f"int{bits} x int8 by {activations}"  # which has symmetric columns
    group = "column" if group_size == -1 else f"g{group_size}"
    return f"int{bits} {group}" + (" symmetric" if symmetric else "")
