# SPDX-License-Identifier: Apache-2.0
"""Asking the second-level cache for the weights that the next product reads, while memory would be idle.

Between two products of a decode step lie small operations that wait for one another and leave memory alone, and then a
launch, first bytes and last sums of the product itself. What is asked for meanwhile comes at the cache's rate later.
"""

import math

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from awq_jax_kernels.mosaic_gpu.registers import asm, const, element_pointer

__all__ = ["BLOCKS", "LIMIT", "fetch_ahead"]

BLOCKS = 96  # that ask, beside those that compute: one lane asks for one chunk at a time
LIMIT = 24 << 20  # bytes; of an H100's 50 MB either half holds what its own processors read
CHUNK = 4096  # bytes of one instruction
PARTS = 6  # of an array, all begun at once, since a split product starts in two or three places


def fetch_ahead(refs: list[ir.Value], limit: int, worker: ir.Value, workers: int, threads: int) -> None:
    """Ask for the beginnings of arrays in device memory, small ones whole; every thread of `workers` blocks calls this.

    Args:
      refs: the arrays. Nothing is read into the program, and nothing changes.
      limit: bytes in all.
      worker: number of this block, int32.
      workers: blocks that share the work.
      threads: of a block.
    """
    # Neighbouring chunks go to different blocks: a processor issues these instructions one lane after the other.
    lane = arith.addi(arith.muli(mgpu.thread_idx(), const(workers)), worker)
    left = limit
    for ref in sorted(refs, key=_bytes):
        size = _bytes(ref) // CHUNK * CHUNK
        parts = 1 if size <= left else PARTS
        each = size // parts // CHUNK * CHUNK
        chunks = min(size, left) // parts // CHUNK
        left -= chunks * parts * CHUNK
        for turn in range(math.ceil(chunks * parts / (workers * threads))):
            i = arith.addi(lane, const(turn * workers * threads))
            with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, i, const(chunks * parts))):
                within, part = arith.divui(i, const(parts)), arith.remui(i, const(parts))
                offset = arith.addi(arith.muli(part, const(each)), arith.muli(within, const(CHUNK)))
                at = element_pointer(ref, offset, ir.IntegerType.get_signless(8))
                address = llvm.ptrtoint(ir.IntegerType.get_signless(64), at)
                asm(f"cp.async.bulk.prefetch.L2.global [$0], {CHUNK};", "l", address)


def _bytes(ref: ir.Value) -> int:
    kind = ir.MemRefType(ref.type)
    return math.prod(kind.shape) * mgpu.bytewidth(kind.element_type)
