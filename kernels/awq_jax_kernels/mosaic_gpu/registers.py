# SPDX-License-Identifier: Apache-2.0
"""The few words of MLIR that the rest is written in: constants, pointers and single PTX instructions."""

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

__all__ = ["asm", "const", "element_pointer", "load_words", "pure"]


def const(value: int) -> ir.Value:
    """A 32-bit constant, given signed or unsigned."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value - (1 << 32) if value >= 1 << 31 else value))


def pure(instruction: str, *operands: ir.Value) -> Any:
    """One PTX instruction on 32-bit registers, free to be moved or merged."""
    i32 = ir.IntegerType.get_signless(32)
    slots = ", ".join(f"${i}" for i in range(len(operands) + 1))
    constraints = ",".join(["=r"] + ["r"] * len(operands))
    return llvm.inline_asm(i32, list(operands), f"{instruction} {slots};", constraints, has_side_effects=False)


def asm(text: str, constraints: str, *operands: ir.Value, result: ir.Type | None = None) -> Any:
    """PTX that stays where it is written."""
    kind = ir.Type.parse("!llvm.void") if result is None else result
    return llvm.inline_asm(kind, list(operands), text, constraints, has_side_effects=True)


def element_pointer(ref: ir.Value, offset: ir.Value | int, element: ir.Type) -> ir.Value:
    """The address `offset` elements after the start of a memory reference."""
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [offset], element)


def load_words(pointer: ir.Value, byte: int, words: int) -> list[ir.Value]:
    """`words` 32-bit words at a constant byte offset from a pointer, in one load."""
    i32 = ir.IntegerType.get_signless(32)
    at = mgpu.utils.getelementptr(pointer, [byte], ir.IntegerType.get_signless(8))
    if words == 1:
        return [llvm.load(i32, at, alignment=4)]
    loaded = llvm.load(ir.VectorType.get((words,), i32), at, alignment=4 * words)
    return [llvm.extractelement(loaded, const(i)) for i in range(words)]
