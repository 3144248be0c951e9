# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts: a router sends each token to a few of many MLPs."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from awq_jax._experts import ExpertRows, ragged_matmul
from awq_jax.models.config import DecoderConfig
from awq_jax.models.linear import Linear, Tap
from awq_jax.models.mlp import Mlp, activate

__all__ = ["Moe", "mlp_of"]


class StackedLinear(nnx.Module):
    """A linear for each expert; kernel ``[e, k, n]`` is an array or a `QTensor`."""

    def __init__(self, experts: int, k: int, n: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (experts, k, n), dtype) * k**-0.5)

    def __call__(self, rows: Float[Array, "r k"], sizes: Int32[Array, " e"]) -> Float[Array, "r n"]:
        return ragged_matmul(rows, self.kernel.get_value(), sizes)


class Experts(nnx.Module):
    """The gated MLP of every expert."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        e, d, inner = config.num_experts, config.hidden_size, config.expert_size
        self.gate = StackedLinear(e, d, inner, dtype=dtype, rngs=rngs)
        self.up = StackedLinear(e, d, inner, dtype=dtype, rngs=rngs)
        self.down = StackedLinear(e, inner, d, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self, rows: Float[Array, "r d"], token: Int[Array, " r"], sizes: Int32[Array, " e"], *, tap: Tap | None
    ) -> Float[Array, "r d"]:
        """Rows sorted by expert, through the MLP of their own."""
        y = activate(self.config, self.gate(rows, sizes)) * self.up(rows, sizes)
        if tap:
            tap("mlp/experts/down", ExpertRows(rows=y, token=token, sizes=sizes))
        return self.down(y, sizes)


class Moe(nnx.Module):
    """``sum of p[e] * expert[e](x)`` over the experts that the router likes best, p its softmax.

    A shared expert, where there is one, sees every token: ``sigmoid(shared_gate(x)) * shared(x)`` is added.
    """

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        c = config
        self.router = Linear(c.hidden_size, c.num_experts, bias=False, dtype=dtype, rngs=rngs)
        self.experts = Experts(c, dtype=dtype, rngs=rngs)
        inner = c.shared_expert_size
        self.shared = Mlp(c, dtype=dtype, rngs=rngs, inner=inner, name="mlp/shared") if inner else None
        self.shared_gate = Linear(c.hidden_size, 1, bias=False, dtype=dtype, rngs=rngs) if inner else None
        self.config = config

    def __call__(self, x: Float[Array, "b t d"], *, tap: Tap | None = None) -> Float[Array, "b t d"]:
        """What the mixture adds to the stream."""
        if tap:
            for name in ("router", "experts/gate", "experts/up"):
                tap(f"mlp/{name}", x)
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self._route(tokens)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        token = order // self.config.experts_per_token
        sizes = jnp.bincount(chosen.reshape(-1), length=self.config.num_experts).astype(jnp.int32)
        y = self.experts(tokens[token], token, sizes, tap=tap) * weights.reshape(-1)[order, None]
        out = jnp.zeros_like(tokens).at[token].add(y).reshape(x.shape)
        if self.shared is None or self.shared_gate is None:
            return out
        if tap:
            tap("mlp/shared_gate", x)
        return out + jax.nn.sigmoid(self.shared_gate(x)) * self.shared(x, tap=tap)

    def _route(self, tokens: Float[Array, "m d"]) -> tuple[Float[Array, "m k"], Int[Array, "m k"]]:
        """Weights and indices of the chosen experts."""
        p = jax.nn.softmax(self.router(tokens).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(p, self.config.experts_per_token)
        if self.config.normalize_experts:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return weights.astype(tokens.dtype), chosen


def mlp_of(config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> Mlp | Moe:
    """The MLP of a layer, or its mixture."""
    return Moe(config, dtype=dtype, rngs=rngs) if config.num_experts else Mlp(config, dtype=dtype, rngs=rngs)
