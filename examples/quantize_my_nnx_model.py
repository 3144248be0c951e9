# SPDX-License-Identifier: Apache-2.0
"""Quantize a Flax NNX model of your own: einsum attention with grouped queries, a gated MLP, nothing rewritten.

    python examples/quantize_my_nnx_model.py

The model is random, so its numbers mean nothing but that the machinery holds: the table that is found, and the distance
of the quantized model's logits from the dense one's, by round to nearest and by the search.

On a CPU (jax 0.10.2): five groups, grouped-query attention recognised ("2 heads, each read 2 times"). Relative error of
the logits by round to nearest 0.4357, by AWQ 0.3790 (27 weights searched, one better off rounded, the head left alone);
2.89 MB become 0.85 MB.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from awq_jax import QuantSpec, Recipe, SearchSpec, rule
from awq_jax import nnx as awq

D, HEADS, KV, HEAD, INNER, VOCAB = 128, 4, 2, 32, 256, 512


class Attention(nnx.Module):
    """Kernels of three axes, as many code bases have them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q = nnx.Einsum("btd,dnh->btnh", (D, HEADS, HEAD), rngs=rngs)
        self.k = nnx.Einsum("btd,dnh->btnh", (D, KV, HEAD), rngs=rngs)
        self.v = nnx.Einsum("btd,dnh->btnh", (D, KV, HEAD), rngs=rngs)
        self.o = nnx.Einsum("btnh,nhd->btd", (HEADS, HEAD, D), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Causal."""
        return self.o(jax.nn.dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True))


class Block(nnx.Module):
    """Pre-norm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1, self.attn, self.norm2 = nnx.RMSNorm(D, rngs=rngs), Attention(rngs), nnx.RMSNorm(D, rngs=rngs)
        self.gate, self.up = (nnx.Linear(D, INNER, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(INNER, D, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The stream after this layer."""
        x = x + self.attn(self.norm1(x))
        h = self.norm2(x)
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))


class Model(nnx.Module):
    """Four blocks."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(4)])
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        self.head = nnx.Linear(D, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def main() -> None:
    """Propose, observe, quantize, compare."""
    model, rng = Model(nnx.Rngs(0)), np.random.default_rng(0)
    for block in model.blocks:  # a few channels that stick out, as trained models have them
        for norm in (block.norm1, block.norm2):
            norm.scale = nnx.Param(jnp.asarray(np.exp(rng.standard_normal(D)), jnp.float32))
    batches = [jnp.asarray(rng.integers(0, VOCAB, (4, 64)), jnp.int32) for _ in range(4)]
    held = jnp.asarray(rng.integers(0, VOCAB, (4, 64)), jnp.int32)

    table = awq.propose(model, batches[0][:2])
    print(table, end="\n\n")
    stats = awq.observe(model, batches, table)
    keep_head = (("head", None),)
    recipes = {
        "round to nearest": SearchSpec(rules=(rule("identity"),), clip_ratios=()),
        "AWQ": SearchSpec(),
    }
    dense = model(held)
    for name, search in recipes.items():
        recipe = Recipe(quant=QuantSpec(group_size=64), search=search, overrides=keep_head)
        quantized, coverage = awq.quantize(model, stats, table, recipe)
        logits = nnx.jit(lambda m, t: m(t))(quantized, held)
        error = jnp.linalg.norm(logits - dense) / jnp.linalg.norm(dense)
        print(f"{name}: relative error of the logits {float(error):.4f}; {str(coverage).splitlines()[0]}")


if __name__ == "__main__":
    main()
