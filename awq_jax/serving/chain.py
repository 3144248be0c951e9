# SPDX-License-Identifier: Apache-2.0
"""A step of single tokens as a chain of products, with only attention between them: for weights in a GPU's tile order.

Norms, sums and gates are done by the products that they follow or precede (`awq_jax_kernels.stream`).
"""

from typing import Any, cast

from jaxtyping import Array, Float, Int

from awq_jax._qtensor import QTensor
from awq_jax.models import Decoder
from awq_jax.models.block import Block
from awq_jax.models.cache import LayerCache
from awq_jax.models.decoder import capped
from awq_jax.models.linear import Linear
from awq_jax.models.norm import Norm
from awq_jax.serving.attention import CachedAttention
from awq_jax.serving.cache import SlotCache
from awq_jax.serving.mlp import GatedMlp
from awq_jax_kernels.gated import ACTIVATIONS
from awq_jax_kernels.int4_matmul.tiles import is_tiled
from awq_jax_kernels.stream import FEW, Stream, add_product, normed, product, start

__all__ = ["chained", "chained_logits", "is_chain"]


def is_chain(model: Decoder, h: Float[Array, "b t d"]) -> bool:
    """Whether the step of these embeddings is a chain of products."""
    rows, tokens, _ = h.shape
    in_range = h.dtype != "float16"  # rows are weighted before they are divided
    return tokens == 1 and rows <= FEW and in_range and all(map(_is_link, model.layers)) and _is_rms(model.norm)


def _is_link(block: Block) -> bool:
    c, attn, mlp = block.config, cast(Any, block.attn), block.mlp
    return (
        c.norm_placement == "before"
        and not c.parallel
        and _is_rms(block.input_norm)
        and _is_rms(block.post_norm)
        and isinstance(attn, CachedAttention)
        and attn.reads_as_it_is()
        and isinstance(mlp, GatedMlp)
        and c.activation in ACTIVATIONS
        and _is_tiled(getattr(attn, "qkv", None), bias=True)
        and _is_tiled(attn.o)
        and _is_tiled(getattr(mlp, "gate_up", None))
        and _is_tiled(mlp.down)
    )


def _is_rms(norm: Norm | None) -> bool:
    return norm is not None and norm.bias is None


def _is_tiled(linear: Any, *, bias: bool = False) -> bool:
    """Whether it is nothing but a product with a weight in tile order, or a bias behind it."""
    if type(linear) is not Linear or not (bias or linear.bias is None):
        return False
    weight = linear.kernel.get_value()
    return isinstance(weight, QTensor) and is_tiled(weight.packed)


def chained(
    model: Decoder, h: Float[Array, "b 1 d"], positions: Int[Array, "b 1"], cache: SlotCache
) -> tuple[Stream, list[LayerCache]]:
    """The stream behind all layers, ready for the last norm, and each layer's cache."""
    norms = [norm for layer in model.layers for norm in (layer.input_norm, layer.post_norm)] + [model.norm]
    stream, written = start(h[:, 0], **_gain(norms[0])), []
    for index, layer in enumerate(model.layers):
        first, second, after = norms[2 * index : 2 * index + 3]
        attn, mlp, held = cast(Any, layer.attn), cast(Any, layer.mlp), cache.layer(index)
        qkv = attn.qkv.completed(_read(stream, attn.qkv, first))
        attended, held = attn.attended(qkv, positions, attn.turned_by(positions), held)
        stream = _add(stream, attended, attn.o, second)
        inner = _read(stream, mlp.gate_up, second, activation=layer.config.activation)
        stream = _add(stream, inner, mlp.down, after)
        written.append(held)
    return stream, written


def chained_logits(model: Decoder, stream: Stream) -> Float[Array, "b v"]:
    """The head's columns, float32."""
    if _is_tiled(model.lm_head):
        return capped(model.config, _read(stream, model.lm_head, model.norm))
    return model.logits(normed(stream, eps=model.norm.eps)[:, None])[:, 0]


def _read(stream: Stream, linear: Any, norm: Any, activation: str | None = None) -> Array:
    weight = linear.kernel.get_value()
    return product(stream, weight.packed, weight.scale, weight.zero, eps=norm.eps, activation=activation)


def _add(stream: Stream, x: Array, linear: Any, norm: Any) -> Stream:
    weight = linear.kernel.get_value()
    return add_product(stream, x, weight.packed, weight.scale, weight.zero, **_gain(norm))


def _gain(norm: Any) -> dict[str, Any]:
    return {"weight": norm.scale.get_value().astype("float32"), "offset": norm.offset}
