# SPDX-License-Identifier: Apache-2.0
"""`decode_attention` on Hopper GPUs in one launch, for few sequences: rotate, keep, attend.

A cluster of blocks shares the positions of one key head, and what each found travels through shared memory to the first
of them. The kernel itself is `gpu_kernel`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from awq_jax_kernels.decode_attention.form import Cache, Form
from awq_jax_kernels.decode_attention.gpu_kernel import Plan, body
from awq_jax_kernels.mosaic_gpu import lanes, launch
from awq_jax_kernels.mosaic_gpu.device import unsuitable

__all__ = ["decode_attention", "refusal"]

MOST = 128  # key heads of all sequences; of more, cuDNN's kernel fills the chip as well


def refusal(form: Form, dtype: Any) -> str | None:
    """Why the kernel can't take operands of this form, or None if it can."""
    if str(dtype) not in ("bfloat16", "float16") or form.dtype != str(dtype):
        return f"qkv is {dtype} and the cache {form.dtype}; both must be bfloat16 or float16"
    if form.d not in (64, 128, 256):
        return f"heads have {form.d} channels, not 64, 128 or 256"
    if form.heads // form.kv > 8:
        return f"{form.heads // form.kv} query heads to a key head are more than 8"
    if form.softcap is not None:
        return "scores are capped"
    if form.batch * form.kv > MOST:
        return f"{form.batch} sequences of {form.kv} key heads are more than {MOST} heads"
    if form.positions * form.kv * form.d * form.batch >= 1 << 31:
        return "the cache has more elements than 32-bit offsets reach"
    return unsuitable()


@functools.partial(jax.jit, static_argnums=0)  # one lowering for all layers
def decode_attention(form: Form, qkv: Array, cache: Cache, lengths: Array, turns: Any) -> tuple[Array, Cache]:
    """See `awq_jax_kernels.decode_attention.decode_attention`."""
    plan = Plan(form, turned=turns is not None)

    def run(*refs: Any) -> None:
        lanes.call(functools.partial(body, plan), refs, lax.axis_index("head"))

    call = launch.kernel(
        run,
        name="decode_attention",
        out=jax.ShapeDtypeStruct((form.batch, form.heads * form.d), qkv.dtype),
        scratch=tuple(plgpu.SMEM(shape, jnp.float32) for shape in plan.scratch),
        grid=(form.batch * form.kv,),
        grid_names=("head",),
        cluster=(plan.split,),
        cluster_names=("split",),
        num_threads=plan.warps // 4,
        thread_name="warpgroup",
    )
    k, v = jax.new_ref(cache[0]), jax.new_ref(cache[1])
    y = call(qkv, lengths, *(turns or ()), k, v)
    return y, (jax.freeze(k), jax.freeze(v), None, None)
