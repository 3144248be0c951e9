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
      arrived: semaphores ``[buffers, arrays]`` of whole blocks.
      arrived_first: semaphores ``[pieces, arrays]`` of the first block's pieces.
      expert: index of the weight among ``e``.
      base: column that block 0 starts at.
      still: copy nothing.
    """

    arrays: Sequence[Any]
    slots: Sequence[Any]
    arrived: Any
    arrived_first: Any
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

    def start(self, block: Any) -> None:
        """Send for a block; the one that was in its slot must be done with."""
        for copy in self._block(block):
            copy.start()

    def wait(self, block: Any) -> None:
        """Wait for a block that was sent for."""
        for copy in self._block(block):
            copy.wait()

    def start_piece(self, piece: int, width: int) -> None:
        """Send for columns ``piece * width`` and on of block 0."""
        for copy in self._copies(piece * width, width, 0, piece * width, self.arrived_first.at[piece]):
            copy.start()

    def wait_piece(self, piece: int, width: int) -> None:
        """Wait for a piece of block 0."""
        for copy in self._copies(piece * width, width, 0, piece * width, self.arrived_first.at[piece]):
            copy.wait()

    def _slot(self, block: Any) -> Any:
        return jax.lax.rem(jnp.asarray(block, jnp.int32), jnp.int32(self.buffers))

    def _block(self, block: Any) -> list[Any]:
        slot, bn = self._slot(block), self.slots[0].shape[2]
        return self._copies(block * bn, bn, slot, 0, self.arrived.at[slot])

    def _copies(self, start: Any, width: int, slot: Any, at: int, arrived: Any) -> list[Any]:
        place = pl.ds(pl.multiple_of(self.base + start, width), width)
        pairs = [] if self.still else enumerate(zip(self.arrays, self.slots, strict=True))
        return [
            pltpu.make_async_copy(array.at[self.expert, :, place], into.at[slot, :, pl.ds(at, width)], arrived.at[t])
            for t, (array, into) in pairs
        ]
