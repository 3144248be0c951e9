# SPDX-License-Identifier: Apache-2.0
"""Static facts of one product: its sizes, its blocks, and the shared memory they need."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from awq_jax_kernels.int4_matmul.pallas_gpu import combine
from awq_jax_kernels.int4_matmul.pallas_gpu.config import CHANNELS, BlockConfig
from awq_jax_kernels.int4_matmul.pallas_gpu.ends import PART, Ends
from awq_jax_kernels.int4_matmul.pallas_gpu.fragment import UNIT

__all__ = ["MATRIX", "PAIR", "PLAIN", "SCALAR", "Plan", "swizzled"]

PAIR = 2  # persistent blocks that share an odd tile

SCALAR = plgpu.Layout.WG_SPLAT(())
MATRIX = plgpu.Layout.WGMMA
PLAIN = plgpu.RefType()


def swizzled(bits: int) -> tuple[Any, ...]:
    """The 128-byte swizzle over tiles of eight rows."""
    return (plgpu.TilingTransform((8, 1024 // bits)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of one call."""

    config: BlockConfig
    m: int
    k: int
    n: int
    g: int
    dtype: Any
    scale_dtype: Any
    tiles: bool  # the weight is in tile order
    zeros: bool
    ends: Ends

    @property
    def strip(self) -> int:
        """Channels of a block."""
        return CHANNELS * self.config.wide

    @property
    def columns(self) -> int:
        """Columns of y: half of the weight's where one half gates the other."""
        return self.n // 2 if self.ends.activation is not None else self.n

    @property
    def apart(self) -> int:
        """Channels from one place of a block to the next: neighbours, or a gate and what it gates."""
        return CHANNELS if self.ends.activation is None else self.n // 2

    @property
    def each(self) -> int:
        """Channels from one block to the next."""
        return self.strip if self.ends.activation is None else CHANNELS

    @property
    def out(self) -> Any:
        """Shapes of the results."""
        y = jax.ShapeDtypeStruct((self.m, self.columns), self.dtype)
        return (y, y, jax.ShapeDtypeStruct((self.m, self.n // PART), jnp.float32)) if self.ends.adds else y

    @property
    def rows(self) -> int:
        """Rows of scales in a step."""
        return max(1, self.config.step // self.g)

    @property
    def sharing(self) -> combine.Sharing:
        """Who holds parts of one tile."""
        return combine.Sharing(self.config.tokens, self.config.wide, self.config.deep, self.config.split)

    @property
    def halves(self) -> combine.Sharing:
        """The same of a tile that a pair of persistent blocks shares."""
        return dataclasses.replace(self.sharing, split=PAIR)

    @property
    def tiles_of_y(self) -> tuple[int, int]:
        """Rows and columns of tiles, of which a block computes one at a time."""
        return -(-self.m // self.config.tokens), self.n // self.strip

    def mail_in_ring(self, sharing: combine.Sharing) -> bool:
        """Whether partial results travel through the drained ring: for many tokens there is no room beside it."""
        c = self.config
        return c.tokens >= 64 and 4 * math.prod(combine.mail_shape(sharing)) <= 2 * c.stages * c.tokens * c.step

    @property
    def scratch(self) -> dict[str, Any]:
        """Shared memory: the ring, its barriers, and the partial results."""
        c = self.config
        if self.tiles:
            codes = plgpu.SMEM((c.stages, c.wide, c.step // UNIT, 4, 256), jnp.int32)
        else:
            codes = plgpu.SMEM((c.stages, c.wide, c.step // 2, CHANNELS), jnp.int8, transforms=swizzled(8))
        scratch = {
            "xs": plgpu.SMEM((c.stages, c.tokens, c.step), self.dtype, transforms=swizzled(16)),
            "ws": codes,
            "ss": plgpu.SMEM((c.stages, c.wide, self.rows, CHANNELS), self.scale_dtype),
            "barriers": plgpu.SMEM((2 * c.stages, 2), jnp.int32),
        }
        if self.zeros:
            scratch["zs"] = plgpu.SMEM((c.stages, c.wide, self.rows, CHANNELS), jnp.int8)
        sharing = self.halves if c.persistent else self.sharing
        if not self.mail_in_ring(sharing):
            scratch["mail"] = plgpu.SMEM(combine.mail_shape(sharing), jnp.float32)
        return scratch
