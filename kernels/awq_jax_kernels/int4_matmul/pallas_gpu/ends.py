# SPDX-License-Identifier: Apache-2.0
"""What happens to the sums of a product on their way out: a norm's division, a gate, the addition to a stream.

A norm divides each row by its root mean square, and a product is linear in its rows: so the rows are multiplied as
they are, and the result is divided. The squares that this takes were summed by the kernel that made the rows. What
results meet is read before the first product, while the first codes travel: a read at the end would be waited for.
"""

import dataclasses
import math
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from awq_jax_kernels.int4_matmul.pallas_gpu import combine
from awq_jax_kernels.int4_matmul.pallas_gpu.fragment import lane_channel
from awq_jax_kernels.mosaic_gpu import lanes
from awq_jax_kernels.mosaic_gpu.activation import activated
from awq_jax_kernels.mosaic_gpu.registers import const

__all__ = ["ALONE", "PART", "Ends", "Writer"]

PART = 32  # channels of a warp, whose squares are one partial sum


@dataclasses.dataclass(frozen=True)
class Ends:
    """What is done beside multiplying.

    Attributes:
      eps: rows of x are yet to be divided by their root mean square, to which this is added; None: they are not.
      activation: of the first half of the columns, which the second half is multiplied by; None: they stay.
      adds: y is added to a stream, and what a norm of the sum needs is made.
      offset: of the norm's weight.
    """

    eps: float | None = None
    activation: str | None = None
    adds: bool = False
    offset: float = 0.0

    @property
    def reads(self) -> int:
        """Operands beside those of a product: squares; the stream and the norm's weight."""
        return (self.eps is not None) + 2 * self.adds


ALONE = Ends()
"""A product, and nothing else."""


class Writer:
    """One warpgroup's share of the results: vectors of four channels of one token."""

    def __init__(
        self,
        ends: Ends,
        sharing: combine.Sharing,
        k: int,
        refs: Any,
        turn: ir.Value,
        token: ir.Value,
        channel: ir.Value,
    ):
        """`token` and `channel` are where the block's tile of y begins."""
        self.ends, self.sharing, self.k = ends, sharing, k
        self.reads, self.outs = refs[: ends.reads], refs[ends.reads :]
        self.m, self.n = ir.MemRefType(self.outs[0].type).shape
        column = arith.shli(arith.remui(mgpu.thread_idx(), const(4)), const(1))
        first = arith.muli(combine.holder(sharing, turn), const(sharing.share))
        vectors = [arith.addi(first, const(i)) for i in range(sharing.share)]
        within = [arith.addi(arith.shli(arith.shrui(v, const(1)), const(3)), arith.remui(v, const(2))) for v in vectors]
        below = lambda value, bound: arith.cmpi(arith.CmpIPredicate.slt, value, const(bound))
        tokens = [arith.addi(arith.addi(token, column), row) for row in within]
        self.inside = [
            arith.andi(below(t, self.m), below(v, sharing.tokens // 4)) for t, v in zip(tokens, vectors, strict=True)
        ]
        self.tokens = [arith.minsi(t, const(self.m - 1)) for t in tokens]
        self.channel = arith.addi(channel, lane_channel())
        self.at = [arith.addi(arith.muli(token, const(self.n)), self.channel) for token in self.tokens]

    @staticmethod
    def kept(ends: Ends, sharing: combine.Sharing) -> int:
        """Floats that `read_ahead` gives each thread."""
        return sharing.share * (ends.eps is not None) + 4 * (sharing.share + 1) * ends.adds

    def read_ahead(self) -> list[ir.Value]:
        """What the results meet: factors; the stream's vectors and the norm's weight."""
        kept = [self._factor(self.reads[0], token) for token in self.tokens] if self.ends.eps is not None else []
        if self.ends.adds:
            *_, stream, weight = self.reads
            vectors = [lanes.read(stream, i, 4) for i in self.at] + [lanes.read(weight, self.channel, 4)]
            kept += [part for vector in vectors for part in lanes.parts(vector)]
        return kept

    def _factor(self, squares: ir.Value, token: ir.Value) -> ir.Value:
        """The reciprocal root mean square of a token's row; its eight lanes of a warp share the partial sums."""
        parts = ir.MemRefType(squares.type).shape[1]
        lane = arith.remui(arith.shrui(mgpu.thread_idx(), const(2)), const(8))
        row, none = arith.muli(token, const(parts)), lanes.splat(lanes.value(0.0), 4)
        terms = none
        for i in range(0, parts // 4, 8):
            part = arith.addi(lane, const(i))
            there = arith.cmpi(arith.CmpIPredicate.slt, part, const(parts // 4))
            at = arith.addi(row, arith.shli(arith.minsi(part, const(parts // 4 - 1)), const(2)))
            terms = lanes.add(terms, arith.select(there, lanes.read(squares, at, 4), none))
        mean = lanes.multiply(lanes.reduce_lanes(lanes.total(terms), lanes.add, 4, 32), lanes.value(1.0 / self.k))
        return lanes.float_instruction("rsqrt.approx.f32", lanes.add(mean, lanes.value(self.ends.eps or 0.0)))

    def write(
        self, values: list[ir.Value], kept: list[ir.Value], mail: ir.Value, turn: ir.Value, place: ir.Value
    ) -> None:
        """Finish the sums and write them; rows past the end are not written."""
        if self.ends.eps is not None:
            factors, kept = kept[: len(values)], kept[len(values) :]
            values = [lanes.scaled(value, factor) for value, factor in zip(values, factors, strict=True)]
        if self.ends.activation is not None:
            ups = combine.exchange(self.sharing, values, mail, turn, place)
            values = [
                lanes.multiply(activated(gate, self.ends.activation), up) for gate, up in zip(values, ups, strict=True)
            ]
            first = arith.cmpi(arith.CmpIPredicate.eq, place, const(0))
            self.inside = [arith.andi(first, inside) for inside in self.inside]
        if self.ends.adds:
            return self._add(values, [lanes.vector_of(kept[i : i + 4]) for i in range(0, len(kept), 4)])
        for at, value, inside in zip(self.at, values, self.inside, strict=True):
            lanes.write_if(inside, self.outs[0], at, value)

    def _add(self, values: list[ir.Value], met: list[ir.Value]) -> None:
        """Add to the stream; write the sum, the sum times the norm's weight, and the sum's squares."""
        total, weighted, squares = self.outs
        thread = arith.remui(mgpu.thread_idx(), const(128))
        tile = arith.shrui(self.channel, const(int(math.log2(4 * PART))))
        part = arith.addi(arith.shli(tile, const(2)), arith.shrui(thread, const(5)))
        of_token = arith.cmpi(arith.CmpIPredicate.ult, arith.remui(thread, const(32)), const(4))
        *held, weight = met
        weight = lanes.add(weight, lanes.splat(lanes.value(self.ends.offset), 4))
        for i, value in enumerate(values):
            summed = lanes.rounded(lanes.add(held[i], value), total)
            square = lanes.reduce_lanes(lanes.total(lanes.multiply(summed, summed)), lanes.add, 4, 32)
            with mgpu.when(self.inside[i]):
                lanes.write(total, self.at[i], summed)
                lanes.write(weighted, self.at[i], lanes.multiply(summed, weight))
            with mgpu.when(arith.andi(self.inside[i], of_token)):
                row = arith.muli(self.tokens[i], const(self.n // PART))
                lanes.write(squares, arith.addi(row, part), lanes.splat(square, 1))
