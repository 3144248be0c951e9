# SPDX-License-Identifier: Apache-2.0
"""A ring in shared memory through which each thread has its own vectors of 16 bytes on their way.

A thread reads what it copied itself, so it waits for its own copies and for no other thread: there is no barrier. All
of it is PTX that stays where it is written, since a compiler does not know that a copy fills what a load reads.
"""

import dataclasses
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from awq_jax_kernels.mosaic_gpu.registers import asm, const, element_pointer

__all__ = ["Ring"]

BYTES = 16


@dataclasses.dataclass(frozen=True)
class Ring:
    """`stages` slots of `vectors` vectors of every thread.

    Attributes:
      shared: int32 ``[stages * vectors * threads * 4]``.
      stages, vectors, threads: its sizes.
      element: type of what is copied, two bytes.
    """

    shared: ir.Value
    stages: int
    vectors: int
    threads: int
    element: Any

    def _address(self, stage: ir.Value) -> ir.Value:
        """Of this thread's first vector in a slot; the next is ``threads`` vectors on."""
        first = arith.addi(arith.muli(stage, const(self.vectors * self.threads)), mgpu.thread_idx())
        base = llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(self.shared))
        return arith.addi(base, arith.muli(first, const(BYTES)))

    def fill(self, turn: ir.Value, count: ir.Value, sources: Any) -> None:
        """Start copying what turn `turn` of `count` reads, if there is one.

        `sources` gives, when called, a (reference, flat index) for every vector. A turn past the last counts as well,
        as turns are waited for by their number.
        """
        to = self._address(arith.remui(turn, const(self.stages)))
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.slt, turn, count)):
            for i, (ref, index) in enumerate(sources()):
                at = llvm.ptrtoint(ir.IntegerType.get_signless(64), element_pointer(ref, index, self.element))
                asm(f"cp.async.cg.shared.global [$0+{i * self.threads * BYTES}], [$1], {BYTES};", "r,l", to, at)
        asm("cp.async.commit_group;", "")

    def take(self, turn: ir.Value) -> list[ir.Value]:
        """This thread's vectors of a turn, in float32, waited for; `stages` - 2 turns behind it may be on their way."""
        asm(f"cp.async.wait_group {self.stages - 2};", "")
        at = self._address(arith.remui(turn, const(self.stages)))
        i32, count = ir.IntegerType.get_signless(32), BYTES // 2
        words = llvm.StructType.get_literal([i32] * 4)
        taken = []
        for i in range(self.vectors):
            text = f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4+{i * self.threads * BYTES}];"
            loaded = asm(text, "=r,=r,=r,=r,r", at, result=words)
            parts = [llvm.extractvalue(i32, loaded, [j]) for j in range(4)]
            narrow = vector.bitcast(
                ir.VectorType.get((count,), self.element), vector.from_elements(ir.VectorType.get((4,), i32), parts)
            )
            taken.append(arith.extf(ir.VectorType.get((count,), ir.F32Type.get()), narrow))
        return taken
