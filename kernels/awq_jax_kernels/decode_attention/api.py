# SPDX-License-Identifier: Apache-2.0
"""`decode_attention`: the attention of one new token per sequence over a cache that it is written to."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int32

from awq_jax_kernels.decode_attention import cudnn, pallas_gpu, pallas_tpu, reference
from awq_jax_kernels.decode_attention.form import Cache, Form, form_of

__all__ = ["decode_attention"]


def decode_attention(
    qkv: Float[Array, "b w"],
    cache: Cache,
    lengths: Int32[Array, " b"],
    turns: tuple[Float[Array, "b d"], Float[Array, "b d"]] | None = None,
    *,
    heads: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    span: int | None = None,
    ahead: Sequence[Any] = (),
    implementation: Literal["tpu", "gpu", "cudnn", "reference"] | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "b v"], Cache]:
    """Write each sequence's new key and value to its cache, and let its query see what the cache then holds.

    ``y = softmax(cap(q k' scale)) v`` over positions 0 to length, or the last ``window`` of them; each kv head serves
    heads / kv query heads. Codes stand for ``code * scale``, with ``scale = max|x| / 127`` of a head and position.

    Args:
      qkv: ``[b, (heads + 2 kv) d]``: query heads, key heads, value heads.
      cache: (k, v, k_scale, v_scale): ``[b, s kv, d]``, floating or int8; row ``i kv + j`` is head j of position i.
        Scales of int8 are float32 ``[b, 1, s kv]``, else None.
      lengths: int32 ``[b]``, position of the new token. One past the end is not written, and sees all of the cache.
      turns: factors of q and k and of q and k with halves of their channels exchanged, float32 ``[b, d]``: cosine and
        signed sine of a rotary embedding.
      heads: query heads.
      scale: of the scores.
      window: positions that are seen, the new one among them; None is all.
      softcap: cap of the scores, ``cap tanh(score / cap)``.
      span: positions that may be read, more than any length; None is all. The kernel reads what a length asks for.
      ahead: arrays that what follows reads, such as a weight; a GPU's cache is asked for their beginnings. They change
        nothing of the result.
      implementation: "tpu", "gpu", "cudnn" or "reference"; a refusal is then an error. None takes the kernel of the
        platform that the program is lowered for, if it takes the operands; a GPU's, or cuDNN where that refuses, only
        where this process has one.
      interpret: run the kernel's Python on any platform.

    Returns:
      ``[b, heads d]`` in the dtype of qkv, and the cache; donate the old one, and it is written where it lies.

    Raises:
      ValueError: shapes that disagree, or operands that the kernel named does not take.

    >>> import jax.numpy as jnp
    >>> cache = (jnp.zeros((1, 4, 2)), jnp.zeros((1, 4, 2)), None, None)  # four positions of one head
    >>> y, (k, v, *_) = decode_attention(jnp.array([[1., 0, 2, 0, 3, 4]]), cache, jnp.array([0]), heads=1, scale=1.0)
    >>> y.tolist(), k[0, 0].tolist()
    ([[3.0, 4.0]], [2.0, 0.0])
    """
    form = form_of(qkv, cache, lengths, turns, heads=heads, scale=scale, window=window, softcap=softcap, span=span)
    operands = (qkv, cache, lengths, turns)
    if implementation == "reference":
        return reference.decode_attention(form, *operands)
    kernels = {
        "tpu": (pallas_tpu.refusal, functools.partial(pallas_tpu.decode_attention, form, interpret=interpret)),
        "gpu": (pallas_gpu.refusal, functools.partial(pallas_gpu.decode_attention, form)),
        "cudnn": (cudnn.refusal, functools.partial(cudnn.decode_attention, form)),
    }
    if implementation is not None:
        refusal, kernel = kernels[implementation]
        if reason := refusal(form, qkv.dtype):
            raise ValueError(f"no kernel takes qkv {qkv.dtype}{list(qkv.shape)} and a cache of {form.dtype}: {reason}.")
        return kernel(*operands, *(ahead if implementation == "gpu" else ()))
    default = functools.partial(reference.decode_attention, form)
    named = {"tpu": ("tpu",)} | ({"cuda": ("gpu", "cudnn")} if jax.default_backend() == "gpu" else {})
    chosen = {
        platform: name
        for platform, names in named.items()
        for name in names[::-1]
        if not kernels[name][0](form, qkv.dtype)
    }
    if not chosen:
        return default(*operands)
    taken = {platform: kernels[name][1] if name == "gpu" else _alone(kernels[name][1]) for platform, name in chosen.items()}
    ahead = ahead if "gpu" in chosen.values() else ()
    return jax.lax.platform_dependent(*operands, *ahead, default=_alone(default), **taken)


def _alone(function: Any) -> Any:
    """The function without what a GPU's cache is asked for."""
    return lambda qkv, cache, lengths, turns, *_: function(qkv, cache, lengths, turns)
