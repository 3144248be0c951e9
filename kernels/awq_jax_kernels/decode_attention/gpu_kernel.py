# SPDX-License-Identifier: Apache-2.0
"""What one block of `decode_attention` does on a Hopper GPU.

A row of the cache, the key or value of one head and position, is spread over `row` lanes of a warp with eight channels
each, so a warp reads 32 / row positions at a time. Each such team of lanes keeps its own maximum, sum and weighted
values of the positions that it saw, as flash attention does; teams are put together over lanes, then over the warps of
a block, then over the blocks of a cluster.
"""

import dataclasses
import math
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from awq_jax_kernels.decode_attention.form import Form
from awq_jax_kernels.mosaic_gpu import lanes
from awq_jax_kernels.mosaic_gpu.registers import asm, const

__all__ = ["Plan", "body"]

VECTOR = 8  # channels of a lane
DEEP = 4  # rows of keys and of values that a lane asks for before it waits
NOTHING = -1e30  # a maximum over no positions, whose weight beside any other is 0 without an invalid difference
RESIDENT = {2: 132}  # blocks of clusters of two that an H100 holds at once
FEWER = 100  # of larger clusters, which don't tile its groups of 16 to 18 processors


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of one call."""

    form: Form
    turned: bool

    @property
    def queries(self) -> int:
        """Query heads that one key head serves."""
        return self.form.heads // self.form.kv

    @property
    def row(self) -> int:
        """Lanes to a row of the cache."""
        return self.form.d // VECTOR

    @property
    def warps(self) -> int:
        """Of a block; with many queries a thread needs more of the registers."""
        return 16 if self.queries <= 4 else 8

    @property
    def teams(self) -> int:
        """Positions that a block reads at a time."""
        return self.warps * 32 // self.row

    @property
    def split(self) -> int:
        """Blocks that share a head: as many as run at once, and no more than there are positions for."""
        heads, useful = self.form.batch * self.form.kv, self.form.span / self.teams
        fitting = (s for s in (8, 6, 4, 3, 2) if s * heads <= RESIDENT.get(s, FEWER) and s <= useful)
        return next(fitting, 1)

    @property
    def outputs(self) -> int:
        """Elements of y of one key head."""
        return self.queries * self.form.d

    @property
    def scratch(self) -> list[tuple[int, ...]]:
        """Shared float32: values, maxima and sums of each warp, and those of each block of the cluster."""
        return [
            (self.warps * self.outputs,), (self.warps * self.queries,), (self.warps * self.queries,),
            (self.split * self.outputs,), (self.split * self.queries,), (self.split * self.queries,),
        ]  # fmt: skip


@dataclasses.dataclass
class State:
    """What a team has seen: for each query the maximum score, the sum of weights, and the weighted values."""

    top: list[Any]
    sum: list[Any]
    values: list[Any]

    def flat(self) -> list[Any]:
        return [*self.top, *self.sum, *self.values]

    @classmethod
    def of(cls, flat: Any) -> "State":
        third = len(flat) // 3
        return cls(list(flat[:third]), list(flat[third : 2 * third]), list(flat[2 * third :]))


def body(plan: Plan, *args: ir.Value) -> None:
    """All of a block's threads."""
    qkv, lengths, *rest = args
    turns, rest = (rest[:2], rest[2:]) if plan.turned else (None, rest)
    k, v, y, *scratch, head = rest
    block = _Block(plan, head)
    length = llvm.extractelement(lanes.read_integers(lengths, block.sequence, 1), const(0))
    queries, key, value = block.projected(qkv, turns, k)
    state = block.begin(queries, key, value, length)
    state = block.seen(state, queries, k, v, length)
    block.keep(k, v, key, value, length)
    block.combine(state, scratch, y)


class _Block:
    """One block: the key head `head` of all sequences' heads, the part `rank` of its positions."""

    def __init__(self, plan: Plan, head: ir.Value):
        self.plan, self.head = plan, head
        kv = const(plan.form.kv)
        self.sequence, self.of_kv = arith.divui(head, kv), arith.remui(head, kv)
        self.rank = const(0)
        if plan.split > 1:
            self.rank = arith.index_cast(ir.IntegerType.get_signless(32), gpu.cluster_block_id(gpu.Dimension.x))
        self.thread = mgpu.thread_idx()
        self.team = arith.divui(self.thread, const(plan.row))
        self.channel = arith.muli(arith.remui(self.thread, const(plan.row)), const(VECTOR))

    def projected(self, qkv: Any, turns: Any, like: Any) -> tuple[list[Any], Any, Any]:
        """This lane's channels of the new token: queries and key, turned, and value."""
        f = self.plan.form
        start = arith.muli(self.sequence, const((f.heads + 2 * f.kv) * f.d))
        first = arith.muli(self.of_kv, const(self.plan.queries))
        numbers = [arith.addi(first, const(i)) for i in range(self.plan.queries)]
        numbers += [arith.addi(self.of_kv, const(f.heads)), arith.addi(self.of_kv, const(f.heads + f.kv))]
        at = [arith.addi(start, arith.muli(number, const(f.d))) for number in numbers]
        *turning, value = [lanes.read(qkv, arith.addi(i, self.channel), VECTOR) for i in at]
        if turns is not None:
            other = arith.remui(arith.addi(self.channel, const(f.d // 2)), const(f.d))
            pairs = [lanes.read(qkv, arith.addi(i, other), VECTOR) for i in at[:-1]]
            factor = arith.addi(arith.muli(self.sequence, const(f.d)), self.channel)
            cosine, sine = (lanes.read(part, factor, VECTOR) for part in turns)
            turn = lambda x, pair: lanes.rounded(lanes.fma(pair, sine, lanes.multiply(x, cosine)), like)
            turning = [turn(x, pair) for x, pair in zip(turning, pairs, strict=True)]
        *queries, key = turning
        return queries, key, value

    def score(self, query: Any, key: Any) -> Any:
        """The score of one position in units of log 2, the same in all lanes of its team."""
        product = lanes.reduce_lanes(lanes.dot(query, key), lanes.add, 1, self.plan.row)
        return lanes.multiply(product, lanes.value(self.plan.form.scale * math.log2(math.e)))

    def is_new_seen(self, length: Any) -> Any:
        """Whether the cache has room for the new token."""
        return arith.cmpi(arith.CmpIPredicate.ult, length, const(self.plan.form.positions))

    def begin(self, queries: list[Any], key: Any, value: Any, length: Any) -> State:
        """Nothing, but the new token itself in the first team of the cluster."""
        number = arith.addi(self.team, arith.muli(self.rank, const(self.plan.teams)))
        mine = arith.andi(arith.cmpi(arith.CmpIPredicate.eq, number, const(0)), self.is_new_seen(length))
        choose = lambda a, b: arith.select(mine, a, b)
        top = [choose(self.score(query, key), lanes.value(NOTHING)) for query in queries]
        one, nothing = lanes.value(1.0), lanes.value(0.0)
        values = choose(value, lanes.splat(nothing, VECTOR))
        return State(top, [choose(one, nothing)] * len(queries), [values] * len(queries))

    def seen(self, state: State, queries: list[Any], k: Any, v: Any, length: Any) -> State:
        """With all older positions that are this block's."""
        f, teams, split = self.plan.form, self.plan.teams, self.plan.split
        below = arith.minui(length, const(f.positions))
        start = const(0)
        if f.window is not None:
            start = arith.maxsi(arith.subi(length, const(f.window - 1)), const(0))
        count = arith.maxsi(arith.subi(below, start), const(0))
        each = arith.divui(arith.addi(count, const(split - 1)), const(split))
        begin = arith.addi(start, arith.muli(self.rank, each))
        end = arith.minsi(arith.addi(begin, each), below)
        turns = arith.divui(arith.addi(each, const(teams * DEEP - 1)), const(teams * DEEP))
        before = arith.muli(self.sequence, const(f.positions))
        last = arith.maxsi(arith.subi(end, const(1)), const(0))

        def turn(i: Any, flat: list[Any]) -> list[Any]:
            first = arith.addi(begin, arith.addi(arith.muli(i, const(teams * DEEP)), self.team))
            places = [arith.addi(first, const(teams * j)) for j in range(DEEP)]
            inside = [arith.cmpi(arith.CmpIPredicate.slt, place, end) for place in places]
            near = [arith.addi(before, arith.minsi(place, last)) for place in places]
            rows = [arith.addi(arith.muli(at, const(f.kv)), self.of_kv) for at in near]
            at = [arith.addi(arith.muli(row, const(f.d)), self.channel) for row in rows]
            keys = [lanes.read(k, place, VECTOR) for place in at]
            values = [lanes.read(v, place, VECTOR) for place in at]
            return self._attended(State.of(flat), queries, keys, values, inside).flat()

        return State.of(mgpu.fori(turns, state.flat())(turn).results)

    def _attended(self, state: State, queries: Any, keys: Any, values: Any, inside: Any) -> State:
        """With a few positions more, of which some lie outside and count for nothing."""
        after = State([], [], [])
        for i, query in enumerate(queries):
            scores = [
                arith.select(there, self.score(query, key), lanes.value(NOTHING))
                for key, there in zip(keys, inside, strict=True)
            ]
            top = state.top[i]
            for score in scores:
                top = lanes.maximum(top, score)
            keep = lanes.exp2(arith.subf(state.top[i], top))
            total, weighted = lanes.multiply(state.sum[i], keep), lanes.scaled(state.values[i], keep)
            for score, value in zip(scores, values, strict=True):
                weight = lanes.exp2(arith.subf(score, top))
                total = lanes.add(total, weight)
                weighted = lanes.fma(value, lanes.splat(weight, VECTOR), weighted)
            after.top.append(top)
            after.sum.append(total)
            after.values.append(weighted)
        return after

    def keep(self, k: Any, v: Any, key: Any, value: Any, length: Any) -> None:
        """Write the new key and value to the cache; nobody reads that place in this launch."""
        f = self.plan.form
        number = arith.addi(self.team, arith.muli(self.rank, const(self.plan.teams)))
        first = arith.cmpi(arith.CmpIPredicate.eq, number, const(0))
        with mgpu.when(arith.andi(first, self.is_new_seen(length))):
            place = arith.addi(arith.muli(self.sequence, const(f.positions)), length)
            row = arith.addi(arith.muli(place, const(f.kv)), self.of_kv)
            at = arith.addi(arith.muli(row, const(f.d)), self.channel)
            lanes.write(k, at, key)
            lanes.write(v, at, value)

    def combine(self, state: State, scratch: Any, y: Any) -> None:
        """Put teams, warps and blocks together and write y."""
        plan = self.plan
        values, tops, sums, all_values, all_tops, all_sums = scratch
        state = self._of_warp(state)
        warp = arith.shrui(self.thread, const(5))
        leads = arith.cmpi(arith.CmpIPredicate.ult, arith.remui(self.thread, const(32)), const(plan.row))
        with mgpu.when(leads):
            for i in range(plan.queries):
                of_query = arith.addi(arith.muli(warp, const(plan.queries)), const(i))
                at = arith.addi(arith.muli(of_query, const(plan.form.d)), self.channel)
                lanes.write(values, at, state.values[i])
                lanes.write(tops, of_query, lanes.splat(state.top[i], 1))  # every lane writes the same
                lanes.write(sums, of_query, lanes.splat(state.sum[i], 1))
        asm("bar.sync 0;", "")

        def of_block(output: Any, query: Any) -> None:
            top, total, value = self._merged(plan.warps, values, tops, sums, output, query)
            if plan.split == 1:
                self._finish(y, output, total, value)
                return
            send = lambda box, size, index, x: lanes.send(
                box, arith.addi(arith.muli(self.rank, const(size)), index), const(0), x
            )
            send(all_values, plan.outputs, output, value)
            send(all_tops, plan.queries, query, top)  # all channels of a query send the same
            send(all_sums, plan.queries, query, total)

        self._outputs(of_block)
        if plan.split == 1:
            return
        asm("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;", "")

        def of_cluster(output: Any, query: Any) -> None:
            _, total, value = self._merged(plan.split, all_values, all_tops, all_sums, output, query)
            self._finish(y, output, total, value)

        with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, self.rank, const(0))):
            self._outputs(of_cluster)

    def _of_warp(self, state: State) -> State:
        """Teams of one warp together, in all of its lanes."""
        distance = self.plan.row
        while distance < 32:
            after = State([], [], [])
            for top, total, values in zip(state.top, state.sum, state.values, strict=True):
                over = lambda x, distance=distance: mgpu.utils.shfl_bfly(x, distance)
                highest = lanes.maximum(top, over(top))
                mine = lanes.exp2(arith.subf(top, highest))
                held = lanes.scaled(values, mine)
                after.top.append(highest)
                total = lanes.multiply(total, mine)
                after.sum.append(lanes.add(total, over(total)))
                after.values.append(lanes.add(held, lanes.each(over, held)))
            state, distance = after, 2 * distance
        return state

    def _outputs(self, each: Any) -> None:
        """Call with every output of this thread and its query."""
        threads = 32 * self.plan.warps
        for start in range(0, self.plan.outputs, threads):
            output = arith.addi(self.thread, const(start))
            with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, output, const(self.plan.outputs))):
                each(output, arith.divui(output, const(self.plan.form.d)))

    def _merged(self, parts: int, values: Any, tops: Any, sums: Any, output: Any, query: Any) -> tuple[Any, Any, Any]:
        """Maximum, sum and value of one output over what several wrote."""
        one = lambda ref, index: llvm.extractelement(lanes.read(ref, index, 1), const(0))
        of_query = [arith.addi(query, const(self.plan.queries * part)) for part in range(parts)]
        found = [one(tops, at) for at in of_query]
        top = found[0]
        for other in found[1:]:
            top = lanes.maximum(top, other)
        total = value = lanes.value(0.0)
        for part, (own, at) in enumerate(zip(found, of_query, strict=True)):
            weight = lanes.exp2(arith.subf(own, top))
            total = lanes.fma(one(sums, at), weight, total)
            place = arith.addi(output, const(self.plan.outputs * part))
            value = lanes.fma(one(values, place), weight, value)
        return top, total, value

    def _finish(self, y: Any, output: Any, total: Any, value: Any) -> None:
        of_head = arith.muli(self.head, const(self.plan.outputs))
        quotient = arith.divf(value, total)
        lanes.write(y, arith.addi(of_head, output), lanes.splat(quotient, 1))
