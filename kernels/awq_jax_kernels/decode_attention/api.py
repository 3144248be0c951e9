# SPDX-License-Identifier: Apache-2.0
"""`decode_attention`: the attention of one new token per sequence over a cache that it is written to."""

import functools
from typing import Any, Literal

from jaxtyping import Array, Float, Int32

from awq_jax_kernels.decode_attention import cudnn, pallas_gpu, pallas_tpu, reference
from awq_jax_kernels.decode_attention.form import Cache, form_of
from awq_jax_kernels.dispatch import Way, cuda, dispatch

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
    ways = {
        "tpu": Way(
            functools.partial(pallas_tpu.refusal, form, qkv.dtype),
            functools.partial(pallas_tpu.decode_attention, form, interpret=interpret),
            "tpu",
        ),
        "gpu": Way(
            functools.partial(pallas_gpu.refusal, form, qkv.dtype),
            functools.partial(pallas_gpu.decode_attention, form),
            cuda(),
        ),
        "cudnn": Way(
            functools.partial(cudnn.refusal, form, qkv.dtype), functools.partial(cudnn.decode_attention, form), cuda()
        ),
        "reference": Way(lambda: None, functools.partial(reference.decode_attention, form)),
    }
    what = f"decode_attention takes qkv {qkv.dtype}{list(qkv.shape)} and a cache of {form.dtype}"
    return dispatch(implementation, ways, "reference", (qkv, cache, lengths, turns), what)
