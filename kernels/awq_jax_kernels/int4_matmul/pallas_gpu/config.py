# SPDX-License-Identifier: Apache-2.0
"""How one product is cut into blocks, and which cut is taken when none is given."""

import dataclasses

from awq_jax_kernels.int4_matmul.tuned_table import tuned_rows

__all__ = ["BlockConfig", "choose", "derive", "paired", "tuned_key"]

CHANNELS = 128  # of one warpgroup
MULTIPROCESSORS = 132  # of an H100 or H200


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Block sizes of the fused kernel.

    Attributes:
      tokens: rows of x in a block, 8..128, a multiple of 8.
      wide: warpgroups side by side, 128 channels each.
      deep: warpgroups that take turns over the steps of the same channels.
      split: blocks of a cluster that share the contraction, 1..8.
      step: contraction steps fetched at once, a multiple of 128.
      stages: slots of the ring; a multiple of `deep` saves a wait for each step.
      scale_weight: scale the codes (rounded to the dtype of x) and not the float32 results.
      persistent: as many blocks as the GPU holds take tile after tile; for more tiles than it holds.
    """

    tokens: int = 16
    wide: int = 1
    deep: int = 3
    split: int = 1
    step: int = 128
    stages: int = 9
    scale_weight: bool = False
    persistent: bool = False

    @property
    def readers(self) -> int:
        """Warpgroups that multiply."""
        return self.wide * self.deep

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread for the readers and for the fetching warpgroup, of 65536 in all."""
        return {1: (232, 40), 2: (240, 24), 3: (152, 40), 4: (112, 24)}[self.readers]

    def problem(self, k: int, n: int, g: int) -> str | None:
        """Why these blocks can't cut a ``[k, n]`` weight with groups of g rows, or None."""
        if not (self.tokens in range(8, 129, 8) and self.readers in (1, 2, 3, 4) and self.split in (1, 2, 3, 4, 8)):
            return "needs tokens 8..128 in eights, wide * deep 1..4 and split 1, 2, 3, 4 or 8"
        if self.step % 128 or k % self.step or k // self.step < self.split:
            return f"step={self.step} must be a multiple of 128 that cuts k={k} into split={self.split} parts or more"
        if self.stages < self.deep + self.scale_weight:  # who scales codes holds one and waits for the next
            return f"stages={self.stages} are too few for {self.deep} warpgroups that take turns"
        if n % (CHANNELS * self.wide):
            return f"n={n} is not a multiple of {CHANNELS} * wide={self.wide}"
        if g % self.step and self.step % g:
            return f"step={self.step} and groups of {g} rows don't divide each other"
        if g < 64 and not self.scale_weight:
            return f"groups of {g} rows need scale_weight"
        if self.persistent and (self.deep > 1 or self.split > 1 or k < 2 * self.step):
            return f"persistent blocks come in pairs that share two steps or more of k={k}: deep=1 and split=1"
        if not self.scale_weight and self.tokens * self.readers > 128:
            return f"tokens={self.tokens} with {self.readers} warpgroups need scale_weight: too many registers"
        return None


def choose(m: int, k: int, n: int, g: int, *, exact: bool, device: str = "") -> BlockConfig:
    """The tuned config of a device (``jax.Device.device_kind``), or a derived one.

    Args:
      m, k, n, g: rows of x, rows and columns of the weight, rows of a group.
      exact: scales may not be rounded to the dtype of x.
      device: as JAX names it; an unknown one has no tuned table.
    """
    rows = {} if exact or g != 128 else tuned_rows("nvidia_h200" if "H200" in device else "nvidia_h100")
    tuned = rows.get(tuned_key(m, k, n))
    return BlockConfig(**tuned) if tuned else derive(m, k, n, g, exact=exact)


def derive(m: int, k: int, n: int, g: int, *, exact: bool) -> BlockConfig:
    """A config from sizes alone, by what was measured on an H100 (docs/kernels-gpu.md).

    Up to 32 tokens three warpgroups hide each other's latency and results are scaled in float32, for free. Beyond, the
    accumulators fill the registers, so two warpgroups scale the codes. A weight with few channels is split in three or
    two over k; splits of four leave processors idle, since clusters of four don't tile a GPC.
    """
    tokens = next((t for t in (8, 16, 32, 64) if m <= t), 64 if exact else 128)
    scale_weight = not exact and (tokens > 32 or g < 64)
    if tokens <= 32:
        # Beside nine slots with four rows of float32 scales each, and 32 tokens, there is no room for a split's sums.
        config = BlockConfig(tokens, stages=8 if g < 64 and tokens == 32 else 9, scale_weight=scale_weight)
    elif tokens == 64:
        config = BlockConfig(tokens, deep=2, stages=8, scale_weight=scale_weight)
    elif m > 128 and n % 256 == 0:
        config = BlockConfig(tokens, wide=2, deep=1, stages=4, scale_weight=True)
    else:
        config = BlockConfig(tokens, deep=2, stages=5, scale_weight=True)
    blocks = n // (CHANNELS * config.wide) * -(-m // tokens)
    if config.wide == 2 and blocks > MULTIPROCESSORS and k >= 2 * config.step:
        return dataclasses.replace(config, persistent=True)
    split = next((s for s in (3, 2) if s * blocks <= MULTIPROCESSORS and k >= 512 * s), 1)
    return dataclasses.replace(config, split=split)


def paired(config: BlockConfig) -> BlockConfig:
    """A config for up to 32 rows of x whose blocks hold a gate and what it gates side by side: this one, if it does."""
    if config.wide == 2 and config.deep > 1 and config.split == 1:
        return config
    return dataclasses.replace(config, wide=2, deep=2, split=1, stages=8 if config.tokens <= 16 else 7)


def tuned_key(m: int, k: int, n: int) -> str:
    """The row of a tuned table: m rounded up to a power of two from 8, groups of 128 rows."""
    return f"m{max(8, 1 << (m - 1).bit_length())} k{k} n{n}"
