# SPDX-License-Identifier: Apache-2.0
"""`decode_attention` as one Mosaic kernel for TPUs; this file plans it, `tpu_kernel` is the kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32

from awq_jax_kernels.decode_attention.form import Cache, Form
from awq_jax_kernels.decode_attention.tpu_kernel import Plan, kernel

__all__ = ["blocks", "decode_attention", "launch", "plan_of", "refusal"]

_TILE = {"bfloat16": 16, "int8": 32}  # rows that a tile of the cache packs


def refusal(form: Form, dtype: Any) -> str | None:
    """Why the kernel can't take operands of this form, or None if it can."""
    if str(dtype) != "bfloat16":
        return f"qkv is {dtype}, not bfloat16"
    if form.dtype not in _TILE:
        return f"the cache is {form.dtype}, not bfloat16 or int8"
    if form.d % 128:
        return f"heads have {form.d} channels, not a multiple of 128"
    if form.kv > 64 or form.kv & (form.kv - 1):
        return f"{form.kv} kv heads are not a power of two up to 64"
    if form.positions % (128 // min(form.kv, 128)) or form.positions * form.kv < 128:
        return f"{form.positions} positions of {form.kv} heads are no multiple of 128 rows"
    return None


def plan_of(form: Form) -> Plan:
    """How the kernel cuts its work: blocks of 1024 rows, which is 256 KB of bfloat16 keys, or 256 positions if less."""
    rows, most = form.positions * form.kv, min(1024, 256 * form.kv)
    size = next(size for size in (1024, 512, 256, 128) if size <= most and rows % size == 0)
    return Plan(form=form, rows=size, chunk=max(_TILE[form.dtype], form.kv), at_once=4)


def blocks(form: Form, plan: Plan, lengths: Int32[Array, " b"]) -> tuple[Array, Array, Array, Array]:
    """What to read, sequence after sequence.

    Args:
      form: of the attention.
      plan: its blocks.
      lengths: position of each new token.

    Returns:
      int32: row and block of each item, ``[n]``, how many items there are, ``[1]``, and the lengths, ``[b + 1]``. Past
      the last item the row is b, which is no sequence.
    """
    size, lengths = plan.positions, lengths.astype(jnp.int32)
    last = jnp.minimum(lengths, form.positions - 1) // size
    first = jnp.zeros_like(last) if form.window is None else jnp.maximum(lengths + 1 - form.window, 0) // size
    ends = jnp.cumsum(last - first + 1)
    turn = jnp.arange(plan.items, dtype=jnp.int32)
    row = jnp.sum(turn[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    mine = row[:, None] == jnp.arange(form.batch)
    block = turn + jnp.sum(jnp.where(mine, last - ends + 1, 0), axis=1, dtype=jnp.int32)
    return row, block, ends[-1:].astype(jnp.int32), jnp.pad(lengths, (0, 1))


def decode_attention(
    form: Form, qkv: Array, cache: Cache, lengths: Array, turns: Any, *, interpret: Any = False
) -> tuple[Array, Cache]:
    """See `awq_jax_kernels.decode_attention.decode_attention`; a form that `refusal` accepts."""
    plan = plan_of(form)
    return launch(plan, blocks(form, plan, lengths), qkv, cache, turns, interpret=interpret)


def launch(
    plan: Plan,
    work: tuple[Array, ...],
    qkv: Array,
    cache: Cache,
    turns: Any,
    *,
    interpret: Any = False,
    still: bool = False,
) -> tuple[Array, Cache]:
    """The kernel.

    Args:
      plan: how to cut.
      work: from `blocks`.
      qkv, cache, turns: the operands.
      interpret: run the kernel's Python.
      still: copy nothing and compute every block of the span: what the core's own work costs.
    """
    form = plan.form
    held = [x for x in cache if x is not None]
    small = (qkv, *(turns or ()))
    anywhere, inside = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.VMEM)
    scratch = plan.scratch()
    y, *held = pl.pallas_call(
        functools.partial(kernel, plan=plan, turned=turns is not None, names=tuple(scratch), still=still),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(work),
            grid=(1,),
            in_specs=[[inside] * len(small), [anywhere] * len(held)],
            out_specs=[inside, *[anywhere] * len(held)],
            scratch_shapes=[list(scratch.values())],
        ),
        out_shape=[
            _like((form.batch, form.heads * form.d), qkv.dtype, qkv),
            *(_like(x.shape, x.dtype, x) for x in held),
        ],
        input_output_aliases={len(work) + len(small) + i: 1 + i for i in range(len(held))},
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
        name="decode_attention",
    )(*work, list(small), held)
    k, v, *scales = held
    k_scale, v_scale = scales or (None, None)
    return y, (k, v, k_scale, v_scale)


def _like(shape: tuple[int, ...], dtype: Any, operand: Any) -> jax.ShapeDtypeStruct:
    """A result that varies over the mesh axes that an operand varies over, as `jax.shard_map` wants to know."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(operand).manual_axis_type)
