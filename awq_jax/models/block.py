# SPDX-License-Identifier: Apache-2.0
"""One layer: attention and MLP, their norms, and the stream that they are added to."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from awq_jax.models.attention import Attention
from awq_jax.models.cache import LayerCache
from awq_jax.models.config import DecoderConfig
from awq_jax.models.linear import Tap
from awq_jax.models.moe import mlp_of
from awq_jax.models.norm import Norm

__all__ = ["Block"]


class Block(nnx.Module):
    """One layer, given its own config (`DecoderConfig.of_layer`).

    Norms that a config does not have are None: ``input_norm`` before attention, ``post_norm`` before the MLP,
    ``attn_out_norm`` and ``mlp_out_norm`` after them.
    """

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        norm = lambda wanted: Norm(config, config.hidden_size, dtype=dtype) if wanted else None
        before, after = config.norm_placement != "after", config.norm_placement != "before"
        self.input_norm = norm(before)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.attn_out_norm = norm(after)
        self.post_norm = norm(before and not config.one_norm)
        self.mlp = mlp_of(config, dtype=dtype, rngs=rngs)
        self.mlp_out_norm = norm(after)
        self.config = config

    def __call__(
        self,
        h: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        *,
        cache: LayerCache | None = None,
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """The stream after this layer, and its cache with the new positions."""
        x = _apply(self.input_norm, h)
        attended, cache = self.attn(x, positions, cache=cache, tap=tap)
        attended = _apply(self.attn_out_norm, attended)
        if not self.config.parallel:
            h, attended = h + attended, None
        if not self.config.one_norm:
            x = _apply(self.post_norm, h)
        out = _apply(self.mlp_out_norm, self.mlp(x, tap=tap))
        return h + out if attended is None else h + attended + out, cache


def _apply(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)
