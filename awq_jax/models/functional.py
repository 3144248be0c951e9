# SPDX-License-Identifier: Apache-2.0
"""The decoder as pure functions over nested dicts, for work that holds one layer at a time.

Each function merges the parameters it is given into the NNX modules of `layers` and `decoder` while it is traced: there
is one implementation of the mathematics.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from awq_jax.models.attention import Attention
from awq_jax.models.block import Block
from awq_jax.models.config import DecoderConfig
from awq_jax.models.decoder import Decoder, capped
from awq_jax.models.embedding import Embedding
from awq_jax.models.linear import Linear, Tap
from awq_jax.models.moe import mlp_of
from awq_jax.models.norm import Norm
from awq_jax.models.params import merge

__all__ = ["block", "embed", "forward", "head", "part"]

Params = Mapping[str, Any]


def _positions(x: Array) -> Int[Array, "b t"]:
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


def embed(config: DecoderConfig, params: Params, tokens: Int[Array, "*b t"]) -> Float[Array, "*b t d"]:
    """Input of the first layer; params hold ``embed``."""
    build = lambda: Embedding(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
    return merge(build, params["embed"])(tokens, positions)


def block(
    config: DecoderConfig, params: Params, h: Float[Array, "b t d"], *, tap: Tap | None = None
) -> Float[Array, "b t d"]:
    """One layer, on sequences that start at position 0.

    Args:
      config: of the layer, `DecoderConfig.of_layer`.
      params: of one layer: ``input_norm``, ``attn``, ``post_norm``, ``mlp``.
      h: its input. Padding on the right is harmless: attention is causal.
      tap: called while tracing with each linear's path relative to the layer, and its input.
    """
    layer = merge(lambda: Block(config, dtype=jnp.float32, rngs=nnx.Rngs(0)), params)
    return layer(h, _positions(h), tap=tap)[0]


def part(config: DecoderConfig, name: str, params: Params, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Attention ("attn") or MLP ("mlp") of one layer on input that is already normalised."""
    if name == "attn":
        return merge(lambda: Attention(config, dtype=jnp.float32, rngs=nnx.Rngs(0)), params)(x, _positions(x))[0]
    if name == "mlp":
        return merge(lambda: mlp_of(config, dtype=jnp.float32, rngs=nnx.Rngs(0)), params)(x)
    raise ValueError(f"a layer has the parts 'attn' and 'mlp', not {name!r}.")


def head(config: DecoderConfig, params: Params, h: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
    """Logits of the last layer's output; params hold ``norm`` and ``lm_head``, or ``embed`` where the head is tied."""
    h = merge(lambda: Norm(config, config.hidden_size, dtype=jnp.float32), params["norm"])(h)
    if config.tie_embeddings:
        table = merge(lambda: Embedding(config, dtype=jnp.float32, rngs=nnx.Rngs(0)), params["embed"])
        return capped(config, table.attend(h))
    build = lambda: Linear(config.hidden_size, config.vocab_size, bias=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
    return capped(config, merge(build, params["lm_head"])(h))


def forward(config: DecoderConfig, params: Params, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
    """Logits of a whole model given as a nested dict."""
    return Decoder.from_params(config, params)(tokens)
