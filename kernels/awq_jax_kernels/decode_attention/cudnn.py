# SPDX-License-Identifier: Apache-2.0
"""`decode_attention` by cuDNN's flash attention, through `jax.nn`: the cache is read once, where it lies.

XLA's own two products want a head's keys together, and copy the cache for it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from awq_jax_kernels.decode_attention import reference
from awq_jax_kernels.decode_attention.form import Cache, Form

__all__ = ["decode_attention", "refusal"]

LEAST = 4  # sequences; for fewer XLA's products are quicker: 6.9 us against 10.0 on an H100, one sequence of 1024


def refusal(form: Form, dtype: Any) -> str | None:
    """Why cuDNN is not asked for operands of this form, or None."""
    if jax.default_backend() != "gpu":
        return "this process has no GPU"
    if str(dtype) not in ("bfloat16", "float16") or form.dtype != str(dtype):
        return f"qkv is {dtype} and the cache {form.dtype}; both must be bfloat16 or float16"
    if form.batch < LEAST:
        return f"{form.batch} sequences are too few to gain"
    if form.d % 8 or form.d > 128:
        return f"heads have {form.d} channels, not a multiple of 8 up to 128"
    if form.window is not None or form.softcap is not None:
        return "windows and capped scores are not asked of it"
    if getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ()):
        return "inside shard_map it was never tried"
    return None


def decode_attention(form: Form, qkv: Array, cache: Cache, lengths: Array, turns: Any) -> tuple[Array, Cache]:
    """See `awq_jax_kernels.decode_attention.decode_attention`."""
    q, (k, v, *scales) = reference.written(form, qkv, cache, lengths, turns)
    held = lambda x: x.reshape(form.batch, form.positions, form.kv, form.d)
    seen = jnp.minimum(lengths + 1, form.span)
    y = jax.nn.dot_product_attention(
        q[:, None],
        held(k),
        held(v),
        scale=form.scale,
        query_seq_lengths=jnp.ones_like(seen),
        key_value_seq_lengths=seen,
        implementation="cudnn",
    )
    return y.reshape(form.batch, -1), (k, v, *scales)
