# SPDX-License-Identifier: Apache-2.0
"""A layer as serving runs it: what is added to the stream waits for the norm that reads the sum."""

from typing import Any

from jaxtyping import Array, Float, Int

from awq_jax.models.block import Block
from awq_jax.models.cache import LayerCache
from awq_jax.models.norm import Norm
from awq_jax_kernels.add_norm import add_norm

__all__ = ["added", "through"]


def through(
    block: Block,
    h: Float[Array, "b t d"],
    waiting: Float[Array, "b t d"] | None,
    positions: Int[Array, "b t"],
    cache: LayerCache,
) -> tuple[Array, Array | None, Any]:
    """What `Block` computes of ``h + waiting``: the stream, what is still to be added to it, and the cache.

    Blocks of another build than norm, attention, norm, MLP run as they are.
    """
    c, first, second = block.config, block.input_norm, block.post_norm
    if c.norm_placement != "before" or c.parallel or first is None or second is None:
        h, cached = block(h if waiting is None else h + waiting, positions, cache=cache)
        return h, None, cached
    h, x = added(first, h, waiting)
    attended, cached = block.attn(x, positions, cache=cache)
    h, x = added(second, h, attended)
    return h, block.mlp(x), cached


def added(norm: Norm, h: Float[Array, "b t d"], delta: Float[Array, "b t d"] | None) -> tuple[Array, Array]:
    """``s = h + delta`` and its norm; of single tokens one operation."""
    if norm.bias is not None or h.shape[1] > 1:
        total = h if delta is None else h + delta
        return total, norm(total)
    rows = lambda x: None if x is None else x[:, 0]
    weight = norm.scale.get_value().astype("float32")
    both = add_norm(h[:, 0], rows(delta), weight, eps=norm.eps, offset=norm.offset)
    return both[0][:, None], both[1][:, None]
