# SPDX-License-Identifier: Apache-2.0
"""How long a product takes on a TPU that is not here: the compiler's schedule against the bytes that must move.

For the kernel, whose copies and core overlap::

    fill  = latency + block of x / BW + latency + first piece of the weight / BW
    drain = latency + last share of y / BW
    t     = fill + max(core, rest of the bytes / BW + core / steps, flops / peak) + drain

Between the operations of a decode step x and y lie in VMEM (``inside``; libtpu puts them there): fill is one latency
and the first piece of the weight, and there is no drain. Where blocks are waited for by tile, a tile takes the place of
a step.

A core-bound kernel waits for first pieces, a copy-bound one computes its last block after the last byte. `core` comes
from the same program without its weight copies: libtpu's static profile plays the scheduled instructions, with the
matrix unit's stalls; its waits for x and y, at 982 bytes a cycle, are taken off. Without a profile (v4, v7x) `core` is
the scheduled bundles of the loop times its steps, a lower bound. Starting the copies of a step takes 70 bundles more,
by comparison of the two schedules. `latency` is libtpu's own 600 cycles. With two buffers instead of three, no copy is
under way while the next one starts, and each step waits for a latency. BW is the data sheet's rate, of which a chip
reaches about 92 percent; the bound that speed-ups are compared with uses the same rate.

For XLA's programs ``t = max(cycles, bytes / BW, flops / peak)`` with the cycles that XLA itself expects of its
operations, each operand counted once and temporaries twice.
"""

from dataclasses import dataclass
from typing import Any

from awq_jax_kernels.aot.schedule import LATENCY_CYCLES, profile_waits
from awq_jax_kernels.aot.tpu import Compiled
from awq_jax_kernels.chips import TPUS, Tpu
from awq_jax_kernels.int4_matmul.config import BlockConfig, resident

__all__ = ["Cost", "bf16_bound_us", "kernel_cost", "xla_cost"]

_COPY_CYCLES = 70


@dataclass(frozen=True)
class Cost:
    """Microseconds of one product, and what they are made of.

    Attributes:
      us: the whole.
      core_us: of the core's own work; for XLA's programs with their copies.
      hbm_us: bytes over the rate.
      fill_us: what nothing hides, first and last blocks.
      temp_bytes: HBM beside operands and results.
      source: "cycles" (profile), "bundles" (schedule) or "estimate" (XLA's own).
    """

    us: float
    core_us: float
    hbm_us: float
    fill_us: float
    temp_bytes: int
    source: str


def bf16_bound_us(generation: str, m: int, k: int, n: int) -> float:
    """The least a bfloat16 product can take: ``max(bytes / BW, flops / peak)``.

    >>> round(bf16_bound_us("v6e", 16, 4096, 14336), 1)
    72.0
    """
    tpu = TPUS[generation]
    return max(2 * (m * k + k * n + m * n) / tpu.hbm_gb_s, _flops_ns(tpu, m, k, n)) / 1e3


def _flops_ns(tpu: Tpu, m: int, k: int, n: int) -> float:
    return 2 * m * k * n / tpu.bf16_tflop_s / 1e3


def kernel_cost(
    generation: str,
    config: BlockConfig,
    still: Compiled,
    m: int,
    k: int,
    n: int,
    g: int,
    *,
    zeros: bool,
    inside: bool = False,
) -> Cost:
    """The model of the module's docstring.

    Args:
      generation: key of `TPUS`.
      config: of the kernel.
      still: the compiled program without weight copies.
      m, k, n, g: the product's sizes.
      zeros: the weight has zero points.
      inside: x and y lie in VMEM; `still` is then compiled so too.
    """
    tpu = TPUS[generation]
    bm = -(-min(config.bm, m) // 16) * 16
    row_blocks, steps = -(-m // bm), n // config.bn // min(config.cores, tpu.cores)
    steps, fills = steps * row_blocks, row_blocks
    x = 0.0 if inside else bm * k * 2
    y = 0.0 if inside and config.cores == 1 else bm * n * 2 / config.splits  # two cores have no VMEM in common
    core, source = _core_ns(tpu, still, steps)
    if source == "cycles":
        core -= sum(profile_waits(copied) for copied in (x, y) if copied) / tpu.clock_ghz
    by_tile = config.by_tile and resident(config, m, k, n)
    turns = steps * (config.bn // config.tile if by_tile else 1)  # what is waited for, one after the other
    core += _COPY_CYCLES * turns / tpu.clock_ghz
    column = k / 2 + k // g * (3 if zeros else 2)
    all_bytes = row_blocks * (column * n + x + y * config.splits)
    piece = column * config.tile * min(config.cores, tpu.cores)
    latency = LATENCY_CYCLES / tpu.clock_ghz
    fill = fills * (latency + piece / tpu.hbm_gb_s) + (latency + x / tpu.hbm_gb_s if x else 0.0)
    drain = latency + y / tpu.hbm_gb_s if y else 0.0
    rest = (all_bytes - x - y - fills * piece) / tpu.hbm_gb_s
    waits = 0.0 if config.buffers > 2 else latency * (steps - fills)
    total = fill + max(core, rest + waits + core / turns, _flops_ns(tpu, m, k, n)) + drain
    return Cost(total / 1e3, core / 1e3, all_bytes / tpu.hbm_gb_s / 1e3, (fill + drain) / 1e3, still.temp_bytes, source)


def _core_ns(tpu: Tpu, compiled: Compiled, steps: int) -> tuple[float, str]:
    name = compiled.kernels[0]
    if compiled.cycles and name in compiled.cycles:
        return compiled.cycles[name] / tpu.clock_ghz, "cycles"
    *outer, inner = (compiled.bundles or {})[name]
    return (sum(outer) + inner * steps) / tpu.clock_ghz, "bundles"


def xla_cost(generation: str, compiled: Compiled, m: int, k: int, n: int) -> Cost | None:
    """The model for a program without kernels; None if it does not compile."""
    if compiled.error:
        return None
    tpu = TPUS[generation]
    core = compiled.estimated_cycles / tpu.clock_ghz
    hbm = (compiled.argument_bytes + compiled.output_bytes + 2 * compiled.temp_bytes) / tpu.hbm_gb_s
    total = max(core, hbm, _flops_ns(tpu, m, k, n))
    return Cost(total / 1e3, core / 1e3, hbm / 1e3, 0.0, compiled.temp_bytes, "estimate")


def program(name: str, **arguments: Any) -> Any:
    """One of `awq_jax_kernels.bench.programs` by name."""
    from awq_jax_kernels.aot.program import Program

    return Program(f"awq_jax_kernels.bench.programs:{name}", arguments)
