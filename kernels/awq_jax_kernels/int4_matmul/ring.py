# SPDX-License-Identifier: Apache-2.0
"""The columns of a weight, arriving in VMEM ahead of their use."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["Ring"]


@dataclass(frozen=True)
class Ring:
    """Buffers that hold block i of the columns in slot ``i % buffers``, each array of the weight in its own.

    Attributes:
      arrays: in HBM, ``[e, rows, n]`` each.
      slots: in VMEM, ``[buffers, rows, bn]`` each.
      arrived: semaphores ``[buffers, pieces, arrays]``; a block that comes whole has the first piece's.
      expert: index of the weight among ``e``.
      base: column that block 0 starts at.
      still: copy nothing.
    """

    arrays: Sequence[Any]
    slots: Sequence[Any]
    arrived: Any
    expert: Any
    base: Any
    still: bool

    @property
    def buffers(self) -> int:
        """Slots of the ring."""
        return self.slots[0].shape[0]

    def at(self, block: Any) -> list[Any]:
        """The slot of a block."""
        return [slot.at[self._slot(block)] for slot in self.slots]

    def start(self, block: Any, pieces: int = 1) -> None:
        """Send for a block, in pieces; the one that was in its slot must be done with."""
        for piece in range(pieces):
            for copy in self._copies(block, piece, pieces):
                copy.start()

    def wait(self, block: Any, piece: int = 0, pieces: int = 1) -> None:
        """Wait for a piece of a block that was sent for in so many."""
        for copy in self._copies(block, piece, pieces):
            copy.wait()

    def _slot(self, block: Any) -> Any:
        return jax.lax.rem(jnp.asarray(block, jnp.int32), jnp.int32(self.buffers))

    def _copies(self, block: Any, piece: int, pieces: int) -> list[Any]:
        slot, bn = self._slot(block), self.slots[0].shape[2]
        width = bn // pieces
        place = pl.ds(pl.multiple_of(self.base + block * bn + piece * width, width), width)
        inside = pl.ds(piece * width, width)
        pairs = [] if self.still else enumerate(zip(self.arrays, self.slots, strict=True))
        return [
            pltpu.make_async_copy(
                array.at[self.expert, :, place], into.at[slot, :, inside], self.arrived.at[slot, piece, t]
            )
            for t, (array, into) in pairs
        ]
