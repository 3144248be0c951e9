# SPDX-License-Identifier: Apache-2.0
"""Vectors that one thread holds, in float32 whatever memory has, and what threads of a warp or block sum together."""

from collections.abc import Callable
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from awq_jax_kernels.mosaic_gpu.registers import asm, const, element_pointer

__all__ = [
    "PLAIN", "SCALAR", "add", "block_sum", "call", "dot", "each", "exp2", "float_instruction", "fma",
    "maximum", "multiply", "parts", "read", "read_integers", "reduce_lanes", "rounded", "scaled", "send", "splat",
    "total", "value", "vector_of", "write", "write_if",
]  # fmt: skip

PLAIN = plgpu.RefType()
SCALAR = plgpu.Layout.WG_SPLAT(())


def call(body: Callable[..., None], refs: Any, *scalars: Any) -> None:
    """Run ``body(*refs, *scalars)`` in every thread, on memory references and 32-bit integers of MLIR."""

    @plgpu.inline_mgpu(arg_types=(PLAIN,) * len(refs) + (SCALAR,) * len(scalars))
    def run(_: Any, *args: Any) -> None:
        body(*args[: len(refs)], *(scalar.registers.flat[0] for scalar in args[len(refs) :]))

    run(*refs, *scalars)


def value(number: float) -> ir.Value:
    """A float32 constant."""
    return arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), number))


def splat(scalar: ir.Value, count: int) -> ir.Value:
    """A vector of one float32."""
    return vector.broadcast(ir.VectorType.get((count,), ir.F32Type.get()), scalar)


def _element(ref: ir.Value) -> ir.Type:
    return ir.MemRefType(ref.type).element_type


def read(ref: ir.Value, index: ir.Value, count: int) -> ir.Value:
    """`count` neighbours of a memory reference from the flat index on, as float32, in loads of up to 16 bytes."""
    element = _element(ref)
    kind = ir.VectorType.get((count,), element)
    alignment = min(16, count * mgpu.bytewidth(element))
    loaded = llvm.load(kind, element_pointer(ref, index, element), alignment=alignment)
    return loaded if element == ir.F32Type.get() else arith.extf(ir.VectorType.get((count,), ir.F32Type.get()), loaded)


def read_integers(ref: ir.Value, index: ir.Value, count: int) -> ir.Value:
    """`count` 32-bit integers from the flat index on."""
    element = _element(ref)
    return llvm.load(ir.VectorType.get((count,), element), element_pointer(ref, index, element), alignment=4)


def rounded(wide: ir.Value, ref: ir.Value) -> ir.Value:
    """The vector as memory of this reference's type would give it back."""
    element = _element(ref)
    if element == ir.F32Type.get():
        return wide
    return arith.extf(wide.type, arith.truncf(ir.VectorType.get(ir.VectorType(wide.type).shape, element), wide))


def write(ref: ir.Value, index: ir.Value, wide: ir.Value) -> None:
    """Round a vector and put it at the flat index."""
    element, shape = _element(ref), ir.VectorType(wide.type).shape
    kept = wide if element == ir.F32Type.get() else arith.truncf(ir.VectorType.get(shape, element), wide)
    alignment = min(16, shape[0] * mgpu.bytewidth(element))
    llvm.store(kept, element_pointer(ref, index, element), alignment=alignment)


def write_if(condition: ir.Value, ref: ir.Value, index: ir.Value, wide: ir.Value) -> None:
    """`write` of two 32-bit words to device memory where the condition holds, without a branch.

    Behind a branch that the assembler takes for divergent it leaves loops' bookkeeping to every thread.
    """
    element, i32 = _element(ref), ir.IntegerType.get_signless(32)
    kept = arith.truncf(ir.VectorType.get(ir.VectorType(wide.type).shape, element), wide)
    words = vector.bitcast(ir.VectorType.get((2,), i32), kept)
    at = llvm.ptrtoint(ir.IntegerType.get_signless(64), element_pointer(ref, index, element))
    text = "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.v2.b32 [$0], {$1, $2}; }"
    asm(text, "l,r,r,r", at, *(llvm.extractelement(words, const(i)) for i in range(2)), arith.extui(i32, condition))


def send(ref: ir.Value, index: ir.Value, rank: ir.Value, number: ir.Value) -> None:
    """Put one float32 into shared memory of the block `rank` of this cluster, at the flat index."""
    i32 = ir.IntegerType.get_signless(32)
    own = llvm.ptrtoint(i32, element_pointer(ref, index, ir.F32Type.get()))
    there = asm("mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", own, rank, result=i32)
    asm("st.shared::cluster.f32 [$0], $1;", "r,f", there, number)


add, multiply = arith.addf, arith.mulf
maximum = arith.maximumf
fma = llvm.intr_fma


def parts(wide: ir.Value) -> list[ir.Value]:
    """A vector's elements."""
    return [llvm.extractelement(wide, const(i)) for i in range(ir.VectorType(wide.type).shape[0])]


def vector_of(elements: list[ir.Value]) -> ir.Value:
    """The vector of some float32."""
    return vector.from_elements(ir.VectorType.get((len(elements),), ir.F32Type.get()), elements)


def total(wide: ir.Value) -> ir.Value:
    """The sum of a vector's elements, in pairs."""
    terms = parts(wide)
    while len(terms) > 1:
        terms = [add(a, b) for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def scaled(wide: ir.Value, factor: ir.Value) -> ir.Value:
    """A vector times one float32."""
    return multiply(wide, splat(factor, ir.VectorType(wide.type).shape[0]))


def dot(a: ir.Value, b: ir.Value) -> ir.Value:
    """The sum of products of two vectors' elements, in one chain of fused operations."""
    result = value(0.0)
    for x, y in zip(parts(a), parts(b), strict=True):
        result = fma(x, y, result)
    return result


def each(function: Callable[[ir.Value], ir.Value], wide: ir.Value) -> ir.Value:
    """A function of every element of a vector."""
    return vector_of([function(part) for part in parts(wide)])


def float_instruction(name: str, operand: ir.Value) -> ir.Value:
    """One PTX instruction on a float32, such as ``rsqrt.approx.f32``."""
    result: Any = llvm.inline_asm(ir.F32Type.get(), [operand], f"{name} $0, $1;", "=f,f", has_side_effects=False)
    return result


def exp2(x: ir.Value) -> ir.Value:
    """2 to the x, within 2 units of the last place."""
    return float_instruction("ex2.approx.ftz.f32", x)


def reduce_lanes(x: ir.Value, combine: Any, first: int, last: int) -> ir.Value:
    """Combine a float32 over lanes whose numbers differ in the bits first..last/2; all of them get the result."""
    distance = first
    while distance < last:
        x = combine(x, mgpu.utils.shfl_bfly(x, distance))
        distance *= 2
    return x


def block_sum(x: ir.Value, scratch: ir.Value) -> ir.Value:
    """The sum of a float32 over all threads of a block; `scratch` is shared float32 with one place for each warp."""
    warps = ir.MemRefType(scratch.type).shape[0]
    of_warp = reduce_lanes(x, add, 1, 32)
    thread = mgpu.thread_idx()
    first = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(thread, const(32)), const(0))
    with mgpu.when(first):
        write(scratch, arith.shrui(thread, const(5)), splat(of_warp, 1))
    asm("bar.sync 0;", "")
    terms = [total(read(scratch, const(4 * i), 4)) for i in range(warps // 4)]
    while len(terms) > 1:
        terms = [add(terms[0], terms[1]), *terms[2:]]
    return terms[0]
