# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the TPU kernel: tuned where someone has tuned, derived elsewhere."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax

from awq_jax_kernels.chips import Tpu, tpu_of
from awq_jax_kernels.int4_matmul.tuned_table import tuned_rows

__all__ = [
    "WHOLE",
    "BlockConfig",
    "Variant",
    "choose",
    "derive",
    "for_tpu",
    "here",
    "resident",
    "tuned_key",
    "vmem_bytes",
]

WHOLE = 5 << 20
"""Bytes of codes up to which a weight is a single block for few rows, whose tiles are unrolled."""
Variant = Literal["A", "B", "D", "E", "F", "G"]


@dataclass(frozen=True)
class BlockConfig:
    """How the TPU kernel cuts its work.

    Attributes:
      variant: how codes become operands. A, B and D multiply the codes and scale the partial sums of each group; E,
        F and G scale the weights to bfloat16 first, F in float32 arithmetic, G without zero points. See `unpack`.
      bm: rows of x in a block; all of them where m is smaller.
      bn: columns of the weight in a block, a multiple of 128; the rows are all k.
      tile: columns that are computed at a time, so that their sums stay in registers.
      chunk: rows that E, F and G scale at a time, a multiple of 128.
      by_tile: every block comes in tiles, each waited for by itself, where x and y are in VMEM (`resident`); else the
        first block alone does.
      buffers: blocks of the weight in VMEM; all but one are on their way while one is computed.
      splits: shares of the columns that are written back one after the other, each while the next is computed.
      cores: 2 splits the columns over the cores of a megacore.
      vmem_mib: what the compiler may use.
      interpret: run the kernel's Python on any platform. True, or a `pltpu.InterpretParams`.
    """

    variant: Variant = "B"
    bm: int = 256
    bn: int = 128
    tile: int = 128
    chunk: int = 128
    by_tile: bool = False
    buffers: int = 3
    splits: int = 1
    cores: int = 1
    vmem_mib: int = 14
    interpret: Any = False


def choose(m: int, k: int, n: int, g: int, *, zeros: bool, exact: bool) -> BlockConfig:
    """The tuned config of the device that is being traced for, or a derived one.

    Args:
      m, k, n, g: rows of x, rows and columns of the weight, rows of a group.
      zeros: the weight has zero points.
      exact: x has more than eight bits, so weights may not be rounded to bfloat16.
    """
    tpu = here()
    return (
        derive(m, k, n, g, tpu=None, exact=exact) if tpu is None else for_tpu(tpu, m, k, n, g, zeros=zeros, exact=exact)
    )


def for_tpu(tpu: Tpu, m: int, k: int, n: int, g: int, *, zeros: bool, exact: bool) -> BlockConfig:
    """`choose` for a given TPU."""
    tuned = None if exact else tuned_rows(tpu.name).get(tuned_key(m, k, n, g, zeros))
    config = BlockConfig(**tuned) if tuned else derive(m, k, n, g, tpu=tpu, exact=exact)
    if m > 16:
        return config
    # In a decode step XLA keeps activations and the weights that it fetches ahead in what is left of VMEM.
    needed = max(16, -(-2 * vmem_bytes(config, m, k, n, g) >> 20))
    return dataclasses.replace(config, vmem_mib=min(config.vmem_mib, needed))


def derive(m: int, k: int, n: int, g: int, *, tpu: Tpu | None, exact: bool) -> BlockConfig:
    """A config from sizes alone.

    Blocks of one to three megabytes: large enough to hide what a step costs, small enough that the last one, which is
    computed after all bytes have come, is a few percent. Without a device, one that every generation can compile.
    """
    variant: Variant = "B"
    if tpu is not None:
        wide = m > 64 and not exact
        if tpu.fp8_mxu and (m <= 32 or exact):
            variant = "D"
        elif tpu.bf16_vpu:
            variant = "B" if exact else "G" if 64 < m <= 256 and not tpu.fp8_mxu else "E"
        else:
            variant = "F" if wide else "A" if g % 128 == 0 else "B"
    cores = 2 if tpu is not None and tpu.megacore and n % 256 == 0 else 1
    chunk = next((c for c in (512, 256) if k % c == 0 and c % g == 0), g if g % 128 == 0 else 128)
    base = BlockConfig(variant, chunk=chunk, cores=cores, vmem_mib=14 if tpu is None else tpu.vmem_mib * 7 // 8)
    few = m <= 16 and cores == 1
    if (
        few and tpu is not None and k * n // 2 <= WHOLE
    ):  # a share of a weight: a turn of a loop costs more than it brings
        tile = next((t for t in (512, 256, 128) if n % t == 0 and n <= 8 * t), 0)
        config = dataclasses.replace(base, bm=16, bn=n, tile=tile, by_tile=True, buffers=1)
        if tile and vmem_bytes(config, m, k, n, g) <= config.vmem_mib << 20:
            return config
    for bm in (512, 256, 128, 64, 32, 16):
        for bn in (1024, 512, 256, 128):
            blocks = n // (bn * cores)
            splits = max(s for s in (1, 2, 3, 4, 6, 7, 8) if (m > 32 and blocks % s == 0 and blocks > s) or s == 1)
            by_tile = few and splits == 1 and blocks <= 8  # of more, the last ends soon enough
            config = dataclasses.replace(base, bm=bm, bn=bn, tile=min(bn, 256), by_tile=by_tile, splits=splits)
            small = bn == 128 or k * bn <= 3 << 21
            if n % (bn * cores) == 0 and small and vmem_bytes(config, m, k, n, g) <= config.vmem_mib << 20:
                return config
    return dataclasses.replace(base, bm=16, buffers=2)


def resident(config: BlockConfig, m: int, k: int, n: int) -> bool:
    """Whether all of x and y lie in VMEM, where the operations around a decode step's products leave and want them.

    Copies of blocks would wait for two latencies of HBM more, which a product of a share of a weight notices.
    """
    room = (5 if config.vmem_mib >= 16 else 1) << 20
    return config.cores == config.splits == 1 and m <= config.bm and 2 * m * (k + n) <= room


def vmem_bytes(config: BlockConfig, m: int, k: int, n: int, g: int) -> int:
    """About what a config holds in VMEM: x and y twice, the ring, what is made of x, and values in flight."""
    bm = -(-min(config.bm, m) // 16) * 16
    held = 2 * bm * (k + n // config.cores // config.splits) * 2 + config.buffers * config.bn * (k // 2 + 3 * k // g)
    of_x = (
        (bm * k * 4 if config.variant in "ABDG" else 0)
        + (bm * k * 2 if config.variant == "A" else 0)
        + 3 * bm * k // g * 2
    )
    return held + of_x + config.tile * (config.chunk * 8 + k // g * 12) + bm * config.tile * 16


def here() -> Tpu | None:
    """The TPU that is being traced for: that of an abstract mesh, or this process's own."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    if device is not None:
        return tpu_of(device.device_kind)
    return tpu_of(jax.devices()[0].device_kind) if jax.default_backend() == "tpu" else None


def tuned_key(m: int, k: int, n: int, g: int, zeros: bool) -> str:
    """The row of a tuned table: m rounded up to a power of two from 16, the rest exact."""
    return f"m{max(16, 1 << (m - 1).bit_length())} k{k} n{n} g{g} {'zeros' if zeros else 'symmetric'}"
