# SPDX-License-Identifier: Apache-2.0
"""The ring of shared-memory slots between the warp that fetches and the warpgroups that multiply.

Slot ``i % stages`` holds step i: a strip of codes, the tokens' activations, scales and zeros. Two barriers guard it,
`full` (all bytes have landed) and `free` (all readers are done). One elected lane issues every copy of a step and
announces their bytes in a single arrival, and a reader warp releases with a single arrival: Pallas's own barriers
take 128 arrivals a copy, and on an H100 four copies a step at 128 each were what bounded the kernel.

A barrier tells its phase by parity alone: who waits for a phase passes as well while the one before it is still under
way. So nobody may wait who does not know that the one before is complete (`wait_full`).
"""

import dataclasses
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from awq_jax_kernels.mosaic_gpu.registers import asm, const, element_pointer

__all__ = ["Copy", "fetch", "initialize", "release", "wait_full"]

WARPS = 4  # in a warpgroup


@dataclasses.dataclass(frozen=True)
class Copy:
    """One bulk copy of a step: a window of `source` into the slot's part of `target`.

    Attributes:
      source: device memory.
      target: shared memory with a leading axis of slots, or of slots and parts.
      window: for an index value of the step, ``(start, size)`` or one index for each axis of source.
      tile: the swizzled tile that shared memory is divided into, or None.
      part: index on the second axis of target, or None.
    """

    source: ir.Value
    target: ir.Value
    window: Any
    tile: tuple[int, int] | None = None
    part: int | None = None

    @property
    def bytes(self) -> int:
        """Size of one step's copy; rows past the end of `source` count, they arrive as zeros."""
        shape = ir.MemRefType(self.target.type)
        count = 1
        for size in shape.shape[1 if self.part is None else 2 :]:
            count *= size
        return count * mgpu.bytewidth(shape.element_type)

    def issue(self, ctx: Any, slot: ir.Value, step: ir.Value, barrier: ir.Value, lane: ir.Value) -> None:
        """Start the copy from the lane that the predicate picks."""
        where = (slot,) if self.part is None else (slot, self.part)
        ctx.async_copy(
            src_ref=self.source,
            dst_ref=mgpu.memref_slice(self.target, where),
            gmem_slice=tuple(mgpu.ds(*part) if isinstance(part, tuple) else part for part in self.window(step)),
            gmem_transform=() if self.tile is None else mgpu.TileTransform(self.tile),
            swizzle=None if self.tile is None else 128,
            barrier=mgpu.BarrierRef(barrier, const(0), const(0), 1),
            arrive=False,
            predicate=lane,
        )


def _full(barriers: ir.Value, slot: ir.Value) -> ir.Value:
    return element_pointer(barriers, slot, ir.IntegerType.get_signless(64))


def _free(barriers: ir.Value, slot: ir.Value) -> ir.Value:
    stages = ir.MemRefType(barriers.type).shape[0] // 2
    return element_pointer(barriers, arith.addi(slot, const(stages)), ir.IntegerType.get_signless(64))


def _wait(barrier: ir.Value, parity: ir.Value) -> None:
    loop = "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra again; }"
    asm(loop, "r,r", llvm.ptrtoint(ir.IntegerType.get_signless(32), barrier), parity)


def initialize(barriers: ir.Value, readers: int) -> None:
    """Set up int32 ``[2 * stages, 2]``, 64 bits a barrier: one arrival fills a slot, one a reading warp frees it."""
    stages = ir.MemRefType(barriers.type).shape[0] // 2
    first = arith.cmpi(arith.CmpIPredicate.eq, mgpu.thread_idx(), const(0))
    with mgpu.when(first):
        for i in range(2 * stages):
            at = llvm.ptrtoint(ir.IntegerType.get_signless(32), _full(barriers, const(i)))
            asm("mbarrier.init.shared::cta.b64 [$0], $1;", "r,r", at, const(1 if i < stages else WARPS * readers))
        asm("fence.mbarrier_init.release.cluster;", "")
    asm("bar.sync 0;", "")


def fetch(ctx: Any, barriers: ir.Value, copies: list[Copy], first: ir.Value, steps: ir.Value, before: ir.Value) -> None:
    """Fill the ring with steps ``first .. first + steps``; called by a warpgroup, of which one lane does it.

    The block has had `before` steps of other tiles, and the ring goes on from there.

    The loop belongs to that lane alone. Were the other lanes to wait for free slots beside it, the compiler could
    unroll a short loop and run the two apart, and a lane that falls behind waits for a phase that has come and gone.
    """
    stages = ir.MemRefType(barriers.type).shape[0] // 2
    index, i32 = ir.IndexType.get(), ir.IntegerType.get_signless(32)
    warp = arith.remui(arith.shrui(mgpu.thread_idx(), const(5)), const(WARPS))
    with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, warp, const(0))):
        lane = nvvm.elect_sync()
        total = const(sum(copy.bytes for copy in copies))
        with mgpu.when(lane):

            @mgpu.fori(steps, [])
            def _(i: ir.Value, carry: list[Any]) -> list[Any]:
                count = arith.addi(before, i)
                slot, use = arith.remui(count, const(stages)), arith.divui(count, const(stages))
                again = arith.cmpi(arith.CmpIPredicate.ugt, use, const(0))
                with mgpu.when(again):
                    _wait(_free(barriers, slot), arith.andi(arith.subi(use, const(1)), const(1)))
                full = _full(barriers, slot)
                at = llvm.ptrtoint(i32, full)
                asm("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "r,r", at, total)
                step = arith.index_cast(index, arith.addi(first, i))
                for copy in copies:
                    copy.issue(ctx, arith.index_cast(index, slot), step, full, lane)
                return carry

        asm("bar.warp.sync 0xffffffff;", "")


def wait_full(barriers: ir.Value, step: ir.Value, deep: int) -> None:
    """Wait until all bytes of a step, counted from this block's first, are in its slot.

    Where `deep` does not divide the slots, a slot goes from one reader to the next, and copies land in any order: a
    reader can be here while what the slot held before, another's, has not landed. Parity would let it through, to stale
    bytes. So it first waits until the other has released the slot, which the copy that it wants waits for anyway. In
    the first round that is the phase before a barrier's first, which counts as complete.
    """
    stages = ir.MemRefType(barriers.type).shape[0] // 2
    slot, use = arith.remui(step, const(stages)), arith.divui(step, const(stages))
    if stages % deep:
        _wait(_free(barriers, slot), arith.andi(arith.subi(use, const(1)), const(1)))
    _wait(_full(barriers, slot), arith.andi(use, const(1)))


def release(barriers: ir.Value, step: ir.Value) -> None:
    """Give back the slot of a step: one arrival a warp, once all its lanes are done."""
    stages = ir.MemRefType(barriers.type).shape[0] // 2
    at = llvm.ptrtoint(ir.IntegerType.get_signless(32), _free(barriers, arith.remui(step, const(stages))))
    lane = arith.remui(mgpu.thread_idx(), const(32))
    asm("bar.warp.sync 0xffffffff;", "")
    with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, lane, const(0))):
        asm("mbarrier.arrive.shared::cta.b64 _, [$0];", "r", at)
