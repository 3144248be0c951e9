# SPDX-License-Identifier: Apache-2.0
"""Quantize a Flax Linen decoder whose layers are stacked by `nn.scan` and whose MLPs are mixtures of experts.

    python examples/linen_scan.py

One search serves all layers of the stack; every expert has a scale of its own where its own product absorbs it.

On a CPU (jax 0.10.2) the five groups are found, experts' up -> down among them; 7 kernels are searched and 2 left in
floating point as asked; 2.90 MB become 0.56 MB. The model is random: the relative error of its logits, 0.29, says only
that the machinery holds.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from awq_jax import QuantSpec, Recipe
from awq_jax import linen as awq

D, HEADS, INNER, EXPERTS, VOCAB = 64, 4, 128, 4, 256


class Experts(nn.Module):
    """Each token goes through its best expert."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Weighted outputs of the chosen experts."""
        kernel = lambda name, *shape: self.param(name, nn.initializers.lecun_normal(batch_axis=(0,)), shape)
        gate, up = kernel("gate", EXPERTS, D, INNER), kernel("up", EXPERTS, D, INNER)
        down = kernel("down", EXPERTS, INNER, D)
        scores = jax.nn.softmax(nn.Dense(EXPERTS, use_bias=False, name="router")(x))
        chosen = jnp.where(scores == scores.max(-1, keepdims=True), scores, 0.0)
        h = jax.nn.silu(jnp.einsum("btd,edf->ebtf", x, gate)) * jnp.einsum("btd,edf->ebtf", x, up)
        return jnp.einsum("ebtd,bte->btd", jnp.einsum("ebtf,efd->ebtd", h, down), chosen)


class Layer(nn.Module):
    """Attention and experts."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """The stream after this layer; nothing is stacked."""
        h = nn.RMSNorm(name="norm1")(x)
        q, k, v = (nn.DenseGeneral((HEADS, D // HEADS), name=name)(h) for name in "qkv")
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + nn.DenseGeneral(D, axis=(-2, -1), name="o")(attended)
        return x + Experts(name="experts")(nn.RMSNorm(name="norm2")(x)), None


class Decoder(nn.Module):
    """Six layers in one scan."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits."""
        x = nn.Embed(VOCAB, D, name="embed")(tokens)
        stack = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=6)
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(VOCAB, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


def main() -> None:
    """Propose, observe, quantize, serve."""
    rng = np.random.default_rng(0)
    batches = [jnp.asarray(rng.integers(0, VOCAB, (4, 64)), jnp.int32) for _ in range(4)]
    module = Decoder()
    variables = module.init(jax.random.key(0), batches[0])
    table = awq.propose(module, variables, batches[0][:2])
    print(table, end="\n\n")
    stats = awq.observe(module, variables, batches, table)
    recipe = Recipe(quant=QuantSpec(group_size=32), overrides=(("*router*", None), ("head", None)))
    quantized, coverage = awq.quantize(variables, stats, table, recipe)
    print(coverage, end="\n\n")
    dense = module.apply(variables, batches[0])
    logits = jax.jit(awq.serve(module))(quantized, batches[0])
    print(f"relative error of the logits {float(jnp.linalg.norm(logits - dense) / jnp.linalg.norm(dense)):.4f}")


if __name__ == "__main__":
    main()
