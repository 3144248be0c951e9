# SPDX-License-Identifier: Apache-2.0
"""The decoder that serving runs: that of `awq_jax.models`, with fused products, cut over a mesh axis where asked."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from awq_jax.models import Decoder, DecoderConfig, KVCache
from awq_jax.models.linear import Linear
from awq_jax.models.mlp import Mlp
from awq_jax.models.params import merge
from awq_jax.serving.attention import CachedAttention
from awq_jax.serving.block import added, through
from awq_jax.serving.cache import SlotCache
from awq_jax.serving.chain import chained, chained_logits, is_chain
from awq_jax.serving.fuse import FUSED
from awq_jax.serving.mlp import GatedMlp

__all__ = ["last_logits", "serving_decoder"]


class _RowParallel(Linear):
    """A linear whose k is cut over a mesh axis: products of the shares are added up, then the bias."""

    axis: str

    def completed(self, product: Array) -> Array:
        return super().completed(jax.lax.psum(product, self.axis))


def serving_decoder(config: DecoderConfig, params: Mapping[str, Any], axis: str | None = None) -> Decoder:
    """The decoder over parameters as `fuse` leaves them; to be made and used within one trace.

    Args:
      config: of the model; under ``axis`` that of one share (`awq_jax.serving.sharding.local_config`).
      params: nested dict, fused or not.
      axis: mesh axis over which heads and the MLP's width are cut, inside `jax.shard_map`.

    Raises:
      ValueError: parameters and config disagree.
    """
    fused = [
        [(module, name, parts) for module, name, parts in FUSED if name in params["layers"][str(index)].get(module, {})]
        for index in range(config.num_layers)
    ]
    widths: dict[tuple[int, str], list[int]] = {}

    def build() -> Decoder:
        model = Decoder(config, rngs=nnx.Rngs(0))
        if "lm_head" in params:  # its own, a quantized copy of a tied embedding, or one share of it
            columns = params["lm_head"]["kernel"].shape[-1]
            model.lm_head = nnx.data(_linear(config.hidden_size, columns, bias=False))
        for index, layer in enumerate(model.layers):
            for module, name, parts in fused[index]:
                owner: Any = getattr(layer, module)
                linears = [getattr(owner, part) for part in parts]
                widths[index, name] = [linear.kernel.get_value().shape[1] for linear in linears]
                for part in parts:
                    delattr(owner, part)
                k = linears[0].kernel.get_value().shape[0]
                setattr(owner, name, _linear(k, sum(widths[index, name]), bias=linears[0].bias is not None))
            layer.attn.__class__ = CachedAttention
            if type(layer.mlp) is Mlp:
                layer.mlp.__class__ = GatedMlp
            if axis is not None:
                _add_up(layer.attn.o, axis)
                _add_up(layer.mlp.down, axis)  # pyright: ignore[reportAttributeAccessIssue]  # no `Moe` under an axis
        return model

    model = merge(build, params)
    for index, layer in enumerate(model.layers):
        for module, name, parts in fused[index]:
            owner = getattr(layer, module)
            for part, columns in zip(parts, _columns(getattr(owner, name), widths[index, name]), strict=True):
                setattr(owner, part, columns)
    return model


def _linear(k: int, n: int, *, bias: bool) -> Linear:
    return Linear(k, n, bias=bias, dtype=jnp.float32, rngs=nnx.Rngs(0))


def _add_up(linear: Linear, axis: str) -> None:
    linear.__class__ = _RowParallel
    linear.axis = axis  # pyright: ignore[reportAttributeAccessIssue]


def _columns(linear: Linear, widths: list[int]) -> list[Callable[[Array], Array]]:
    """The parts of a fused linear as functions of x; the product is traced once for each x."""
    held: list[Any] = []

    def part(start: int, stop: int) -> Callable[[Array], Array]:
        def columns(x: Array) -> Array:
            if not held or held[0] is not x:
                held[:] = [x, linear(x)]
            return held[1][..., start:stop]

        return columns

    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return [part(end - width, end) for end, width in zip(ends, widths, strict=True)]


def last_logits(
    model: Decoder,
    tokens: Int[Array, "b t"],
    cache: SlotCache,
    last: Int[Array, " b"],
    axis: str | None = None,
) -> tuple[Float[Array, "b v"], KVCache]:
    """Logits of one position of each row, and the cache; the head sees no other position.

    Where the head's columns are cut over an axis, they are this share's columns, and -inf where padding lies.

    Args:
      model: from `serving_decoder`.
      tokens: they continue the cache.
      cache: earlier positions.
      last: index into the tokens of each row.
      axis: mesh axis over which the head's columns are cut.
    """
    positions = jnp.arange(tokens.shape[1]) + cache.lengths[:, None]
    h, waiting = model.embed(tokens, positions), None
    if is_chain(model, h):
        stream, written = chained(model, h, positions, cache)
        return chained_logits(model, stream), cache.after(written, 1)
    written = []
    for index, layer in enumerate(model.layers):
        h, waiting, held = through(layer, h, waiting, positions, cache.layer(index))
        written.append(held)
    take = lambda x: x if x.shape[1] == 1 else jnp.take_along_axis(x, last[:, None, None], axis=1)
    normed = added(model.norm, take(h), None if waiting is None else take(waiting))[1]
    logits = model.logits(normed)[:, 0]
    if axis is not None and model.lm_head is not None:
        columns = jax.lax.axis_index(axis) * logits.shape[-1] + jnp.arange(logits.shape[-1])
        logits = jnp.where(columns < model.config.vocab_size, logits, -jnp.inf)
    return logits, cache.after(written, tokens.shape[1])
