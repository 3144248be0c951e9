# SPDX-License-Identifier: Apache-2.0
"""Small models as users write them: NNX with einsum attention, Linen with scanned layers and experts, plain trees."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

D, HEADS, KV, HEAD, INNER, VOCAB = 32, 4, 2, 8, 64, 48


def some_tokens(seed: int = 0, shape: tuple[int, int] = (4, 24)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, shape), jnp.int32)


class Attention(nnx.Module):
    """Grouped-query attention with kernels of three axes."""

    def __init__(self, rngs):
        self.q = nnx.Einsum("btd,dnh->btnh", (D, HEADS, HEAD), rngs=rngs)
        self.k = nnx.Einsum("btd,dnh->btnh", (D, KV, HEAD), rngs=rngs)
        self.v = nnx.Einsum("btd,dnh->btnh", (D, KV, HEAD), (KV, HEAD), rngs=rngs)
        self.o = nnx.LinearGeneral((HEADS, HEAD), D, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.o(jax.nn.dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True))


class Block(nnx.Module):
    """Pre-norm, with a GELU that nothing folds through."""

    def __init__(self, rngs):
        self.norm1, self.attn = nnx.RMSNorm(D, rngs=rngs), Attention(rngs)
        self.norm2 = nnx.LayerNorm(D, rngs=rngs)
        self.up, self.down = nnx.Linear(D, INNER, rngs=rngs), nnx.Linear(INNER, D, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Model(nnx.Module):
    """Two blocks and a tied head; counts its calls, as state that is no parameter."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, tokens):
        self.calls.set_value(self.calls.get_value() + 1)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


class Experts(nn.Module):
    """Every token through its best expert, as einsums with an expert axis."""

    count: int = 4

    @nn.compact
    def __call__(self, x):
        kernel = lambda name, *shape: self.param(name, nn.initializers.lecun_normal(batch_axis=(0,)), shape)
        gate, up = kernel("gate", self.count, D, INNER), kernel("up", self.count, D, INNER)
        down = kernel("down", self.count, INNER, D)
        scores = jax.nn.softmax(nn.Dense(self.count, use_bias=False, name="router")(x))
        chosen = jnp.where(scores == scores.max(-1, keepdims=True), scores, 0.0)
        h = jax.nn.silu(jnp.einsum("btd,edf->ebtf", x, gate)) * jnp.einsum("btd,edf->ebtf", x, up)
        return jnp.einsum("ebtd,bte->btd", jnp.einsum("ebtf,efd->ebtd", h, down), chosen)


class Layer(nn.Module):
    """Attention by `DenseGeneral` and experts."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.RMSNorm(name="norm1")(x)
        q, k, v = (nn.DenseGeneral((HEADS, HEAD), name=name)(h) for name in "qkv")
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + nn.DenseGeneral(D, axis=(-2, -1), name="o")(attended)
        return x + Experts(name="experts")(nn.RMSNorm(name="norm2")(x)), None


class Scanned(nn.Module):
    """Three rematerialized layers whose parameters are stacked along a first axis."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, D, name="embed")(tokens)
        stack = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(VOCAB, name="head")(nn.RMSNorm(name="norm")(x))


def mlp_params(seed: int = 0) -> dict[str, dict[str, jax.Array]]:
    """A gated MLP behind a norm, in a plain tree, with a few large channels."""
    rng = np.random.default_rng(seed)
    gain = np.exp(rng.standard_normal(D))
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape) * shape[0] ** -0.5, jnp.float32)
    return {
        "norm": {"gain": jnp.asarray(gain, jnp.float32)},
        "gate": {"w": normal(D, INNER)},
        "up": {"w": normal(D, INNER), "b": normal(INNER)},
        "down": {"w": normal(INNER, D)},
    }


def mlp(params, x):
    """``x + down(silu(gate(h)) * up(h))`` with ``h`` the normalised x."""
    h = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * params["norm"]["gain"]
    inner = jax.nn.silu(h @ params["gate"]["w"]) * (h @ params["up"]["w"] + params["up"]["b"])
    return x + inner @ params["down"]["w"]
