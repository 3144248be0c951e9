# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel's fetching lane, but that one step's copies come last of the ring's first round.

Copies land in any order, and a straggler is rare; here it is made. A reader that takes another's bytes for its own is
then far enough ahead to do so: the result is wrong, or never comes.
"""

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from awq_jax_kernels.int4_matmul.pallas_gpu import pipeline
from awq_jax_kernels.mosaic_gpu.registers import asm, const

__all__ = ["fetch"]


def fetch(
    late: int, ctx: Any, barriers: ir.Value, copies: list[Any], first: ir.Value, steps: ir.Value, before: ir.Value
) -> None:
    """As `pipeline.fetch`; `late` is a step of the first round, and all of that round are taken to be there."""
    stages = ir.MemRefType(barriers.type).shape[0] // 2
    index, i32 = ir.IndexType.get(), ir.IntegerType.get_signless(32)
    equal = lambda a, b: arith.cmpi(arith.CmpIPredicate.eq, a, b)
    warp = arith.remui(arith.shrui(mgpu.thread_idx(), const(5)), const(pipeline.WARPS))
    with mgpu.when(equal(warp, const(0))):
        lane = nvvm.elect_sync()

        def issue(i: ir.Value) -> None:
            slot, step = arith.remui(i, const(stages)), arith.addi(first, arith.subi(i, before))
            for copy in copies:
                copy.issue(
                    ctx,
                    arith.index_cast(index, slot),
                    arith.index_cast(index, step),
                    pipeline._full(barriers, slot),
                    lane,
                )

        with mgpu.when(lane):

            @mgpu.fori(steps, [])
            def _(i: ir.Value, carry: list[Any]) -> list[Any]:
                i = arith.addi(before, i)
                slot, use = arith.remui(i, const(stages)), arith.divui(i, const(stages))
                with mgpu.when(arith.cmpi(arith.CmpIPredicate.ugt, use, const(0))):
                    pipeline._wait(pipeline._free(barriers, slot), arith.andi(arith.subi(use, const(1)), const(1)))
                at = llvm.ptrtoint(i32, pipeline._full(barriers, slot))
                total = const(sum(copy.bytes for copy in copies))
                asm("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "r,r", at, total)
                with mgpu.when(arith.cmpi(arith.CmpIPredicate.ne, i, const(late))):
                    issue(i)
                with mgpu.when(equal(i, const(stages - 1))):
                    for _ in range(10):
                        asm("nanosleep.u32 10000;", "")  # the others have used up what they were given
                    issue(const(late))
                return carry

        asm("bar.warp.sync 0xffffffff;", "")
