# SPDX-License-Identifier: Apache-2.0
"""What the kernel costs on a TPU that is not here: the compiler's schedule against the bytes of the cache.

The model is that of `awq_jax_kernels.bench.cost`::

    fill  = latency + qkv / BW + latency + first block of k and v / BW
    drain = latency + y / BW
    t     = fill + max(core, rest of the bytes / BW + turn) + drain
    core  = fixed + turn * turns

Inside a step qkv and y lie in VMEM; neither waits for HBM. A turn of the loop computes a few blocks. `fixed`
and `turn` come from the static profiles of two programs without copies, one twice as long as the other; without a
profile (v4, v7x) they are scheduled bundles. The kernel runs on one core: of a megacore it gets half the rate.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from awq_jax_kernels.aot.program import Program
from awq_jax_kernels.aot.schedule import LATENCY_CYCLES, profile_waits
from awq_jax_kernels.aot.tpu import compile_programs
from awq_jax_kernels.chips import TPUS
from awq_jax_kernels.decode_attention import pallas_tpu
from awq_jax_kernels.decode_attention.form import Form

__all__ = ["Core", "attention", "core_of", "microseconds"]


@dataclasses.dataclass(frozen=True)
class Core:
    """Cycles of the kernel's own work: outside its loop, for one turn of it; and whether a profile says so."""

    fixed: float
    turn: float
    profiled: bool


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


def core_of(generation: str, form: Form) -> Core:
    """What the core does for a form, whatever the positions.

    Raises:
      RuntimeError: the kernel does not compile.
    """
    size = 4 * pallas_tpu.plan_of(form).positions
    sizes = [dataclasses.replace(form, positions=n, span=n) for n in (size, 2 * size)]
    make = lambda f: Program("awq_jax_kernels.decode_attention.cost:attention", {**vars(f), "still": True})
    one, two = compile_programs([make(f) for f in sizes], generation)
    if error := one.error or two.error:
        raise RuntimeError(f"{generation} {form}: {error}")
    (name,) = one.kernels
    if one.cycles and two.cycles and name in one.cycles and name in two.cycles:
        first, second = _turns(sizes[0]), _turns(sizes[1])
        turn = (two.cycles[name] - one.cycles[name]) / (second - first)
        waits = sum(map(profile_waits, _rows(form)))
        return Core(max(0.0, one.cycles[name] - first * turn - waits), turn, True)
    *outer, inner = (one.bundles or {})[name]
    return Core(sum(outer), inner, False)


def microseconds(generation: str, form: Form, core: Core, *, inside: bool = False) -> float:
    """Of one call that reads the whole span; `inside` a step, where qkv and y lie in VMEM."""
    tpu, plan = TPUS[generation], pallas_tpu.plan_of(form)
    rate, latency = tpu.hbm_gb_s / tpu.cores, LATENCY_CYCLES / tpu.clock_ghz
    at_rest = 0.0 if inside else 2 * latency + sum(_rows(form)) / rate
    block = 2 * plan.rows * (form.d * jnp.dtype(form.dtype).itemsize + (4 if form.dtype == "int8" else 0))
    rest = (form.batch * -(-form.span // plan.positions) - 1) * block
    busy = max(core.fixed + core.turn * _turns(form), rest / rate * tpu.clock_ghz + core.turn)
    return (at_rest + latency + block / rate + busy / tpu.clock_ghz) / 1e3


def _turns(form: Form) -> int:
    plan = pallas_tpu.plan_of(form)
    return plan.items // plan.at_once


def _rows(form: Form) -> tuple[int, int]:
    """Bytes of qkv and of y."""
    wide = 2 * form.batch * form.d
    return wide * (form.heads + 2 * form.kv), wide * form.heads
