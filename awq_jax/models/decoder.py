# SPDX-License-Identifier: Apache-2.0
"""One decoder-only transformer in Flax NNX, configured by a family's table."""

from collections.abc import Mapping
from typing import Any, overload

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from awq_jax.models.block import Block
from awq_jax.models.cache import KVCache
from awq_jax.models.config import DecoderConfig
from awq_jax.models.embedding import Embedding
from awq_jax.models.linear import Linear
from awq_jax.models.norm import Norm
from awq_jax.models.params import dict_of, merge

__all__ = ["Decoder", "capped", "param_shapes", "params_of"]


class Decoder(nnx.Module):
    """Embedding, layers, final norm, head.

    Args:
      config: shapes and mechanisms.
      rngs: for random weights; `from_params` needs none.
      dtype: of the parameters, and of the residual stream that follows from the embedding.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.embed = Embedding(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(config.of_layer(i), dtype=dtype, rngs=rngs) for i in range(config.num_layers)])
        self.norm = Norm(config, config.hidden_size, dtype=dtype)
        head = lambda: Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, rngs=rngs)
        self.lm_head = None if config.tie_embeddings else head()

    @classmethod
    def from_params(cls, config: DecoderConfig, params: Mapping[str, Any]) -> "Decoder":
        """Build from a nested dict of arrays and `QTensor` kernels; no random weight is ever made.

        Raises:
          ValueError: a parameter is missing, unknown, or has a shape that the config does not imply.
        """
        return merge(lambda: cls(config, rngs=nnx.Rngs(0)), params)

    @overload
    def __call__(
        self, tokens: Int[Array, "b t"], *, cache: None = None, positions: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t v"]: ...
    @overload
    def __call__(
        self, tokens: Int[Array, "b t"], *, cache: KVCache, positions: Int[Array, "b t"] | None = None
    ) -> tuple[Float[Array, "b t v"], KVCache]: ...
    def __call__(
        self, tokens: Int[Array, "b t"], *, cache: KVCache | None = None, positions: Int[Array, "b t"] | None = None
    ) -> Any:
        """Logits of every position.

        Args:
          tokens: int32 ``[b, t]``.
          cache: earlier positions; the tokens continue them.
          positions: of the tokens; by default 0, 1, … or what continues the cache.

        Returns:
          float32 logits ``[b, t, vocab]``; with a cache, the pair (logits, cache after the tokens).
        """
        start = 0 if cache is None else cache.lengths[:, None]
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]) + start, tokens.shape)
        h = self.embed(tokens, positions)
        written = []
        for index, layer in enumerate(self.layers):
            h, held = layer(h, positions, cache=None if cache is None else cache.layer(index))
            written.append(held)
        logits = self.head(h)
        return logits if cache is None else (logits, cache.after(written, tokens.shape[1]))

    def head(self, h: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Final norm and output projection, float32."""
        return self.logits(self.norm(h))

    def logits(self, h: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Output projection of what is normed, float32."""
        return capped(self.config, self.embed.attend(h) if self.lm_head is None else self.lm_head(h))


def capped(config: DecoderConfig, logits: Float[Array, "*b v"]) -> Float[Array, "*b v"]:
    """Logits in float32, softly held below the model's cap where it has one."""
    logits, cap = logits.astype(jnp.float32), config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def params_of(model: Decoder) -> dict[str, Any]:
    """The parameters as a nested dict with text keys, ``layers/0/attn/q/kernel``: the inverse of `from_params`."""
    return dict_of(model)


def param_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Path and shape of every parameter a dense model of this config has; allocates nothing."""
    from awq_jax._tree import leaves

    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return {path: tuple(leaf.shape) for path, leaf in leaves(dict_of(abstract))}
