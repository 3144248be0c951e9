# SPDX-License-Identifier: Apache-2.0
"""How one product is cut into blocks, and which cut is taken when none is given."""

import dataclasses

__all__ = ["BlockConfig"]


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Block sizes of the fused kernel.

    Attributes:
      tokens: rows of x in a block, 8..128, a multiple of 8.
      wide: warpgroups side by side, 128 channels each.
      deep: warpgroups that take turns over the steps of the same channels.
      split: blocks of a cluster that share the contraction, 1..8.
      step: contraction steps fetched at once, a multiple of 64.
      stages: slots of the ring.
      scale_weight: scale the codes (rounded to the dtype of x) and not the float32 results.
      dependent_launch: start before the kernel in front has drained (needs JAX 0.11).
    """

    tokens: int = 16
    wide: int = 1
    deep: int = 4
    split: int = 1
    step: int = 128
    stages: int = 8
    scale_weight: bool = False
    dependent_launch: bool = False

    @property
    def readers(self) -> int:
        """Warpgroups that multiply."""
        return self.wide * self.deep

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread for the readers and for the fetching warpgroup, of 65536 in all."""
        return {1: (232, 40), 2: (232, 40), 3: (152, 40), 4: (112, 24)}[self.readers]
