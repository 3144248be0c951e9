# SPDX-License-Identifier: Apache-2.0
"""What the kernel costs on a TPU that is not here: the compiler's schedule of a block against the bytes of the cache.

The model is that of `awq_jax_kernels.bench.cost`::

    fill  = latency + qkv / BW + latency + first block of k and v / BW
    drain = latency + y / BW
    t     = fill + max(core, rest of the bytes / BW + core / blocks) + drain

`core` is the static profile of the kernel without its copies, for all blocks of the span, less its own waits for qkv
and y; without a profile (v4, v7x) the scheduled bundles of the loop times the blocks. The kernel runs on one core. Of a
megacore it gets half the rate.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from awq_jax_kernels.aot.program import Program
from awq_jax_kernels.aot.tpu import Compiled, compile_programs
from awq_jax_kernels.chips import TPUS
from awq_jax_kernels.decode_attention import pallas_tpu
from awq_jax_kernels.decode_attention.form import Form

__all__ = ["attention", "compiled", "microseconds"]

_LATENCY_CYCLES = 600
_PROFILE_BYTES = 982


def attention(still: bool = False, **fields: Any) -> tuple[Any, Any]:
    """The kernel over a `Form` with these fields, and the shapes of its operands."""
    form = Form(**fields)
    plan = pallas_tpu.plan_of(form)
    of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    rows = form.positions * form.kv
    held = [of((form.batch, rows, form.d), form.dtype)] * 2
    scales = [of((form.batch, 1, rows), "float32") if form.dtype == "int8" else None] * 2
    turns = (of((form.batch, form.d), "float32"),) * 2
    qkv = of((form.batch, (form.heads + 2 * form.kv) * form.d), "bfloat16")
    work = tuple(of((n,), "int32") for n in (plan.items, plan.items, 1, form.batch + 1))
    return functools.partial(pallas_tpu.launch, plan, still=still), (work, qkv, (*held, *scales), turns)


def compiled(generation: str, form: Form) -> Compiled:
    """The kernel without copies, compiled for the cost of its core."""
    program = Program("awq_jax_kernels.decode_attention.cost:attention", {**vars(form), "still": True})
    return compile_programs([program], generation)[0]


def microseconds(generation: str, form: Form) -> float:
    """Of one call that reads the whole span.

    Raises:
      RuntimeError: the kernel does not compile.
    """
    still, tpu, plan = compiled(generation, form), TPUS[generation], pallas_tpu.plan_of(form)
    if still.error:
        raise RuntimeError(f"{generation} {form}: {still.error}")
    blocks = form.batch * -(-form.span // plan.positions)
    rate = tpu.hbm_gb_s / tpu.cores
    y, x = 2 * form.batch * form.heads * form.d, 2 * form.batch * (form.heads + 2 * form.kv) * form.d
    block = 2 * plan.rows * (form.d * jnp.dtype(form.dtype).itemsize + (4 if form.dtype == "int8" else 0))
    (name,) = still.kernels
    if still.cycles and name in still.cycles:
        core = still.cycles[name] - 2 * _LATENCY_CYCLES - (x + y) / _PROFILE_BYTES
    else:
        *outer, inner = (still.bundles or {})[name]
        core = sum(outer) + inner * blocks
    core, latency = core / tpu.clock_ghz, _LATENCY_CYCLES / tpu.clock_ghz
    fill, drain = 2 * latency + (x + block) / rate, latency + y / rate
    return (fill + max(core, (blocks - 1) * block / rate + core / blocks) + drain) / 1e3
