# SPDX-License-Identifier: Apache-2.0
"""The Mosaic kernel behind `pallas_tpu`.

Blocks of the cache come through a ring of buffers, sequence after sequence and of each no more than its length asks
for. A block is ``[rows, d]``, where row ``i kv + j`` is head j of position i: all query heads are multiplied with all
rows in one product, and the scores of rows of another head are masked away. That is kv times the products that are
needed, on a matrix unit that waits for memory, and saves taking heads apart. New keys and values go into their block
in VMEM once it is there, and the tile that they lie in goes back to the cache.

A block alone is one long chain: product, maximum, exponential, sum, product. So a few blocks are computed side by side,
each with a softmax of its own, and merged into what their sequences have so far.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from awq_jax_kernels.decode_attention.form import Form

__all__ = ["Plan", "kernel"]

_NEVER = -1e30  # a score that is not seen: exp of it is zero, and no infinity is subtracted from another
_LANES = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
      form: of the attention.
      rows: of the cache in a block.
      chunk: rows that are written back for a new position.
      at_once: blocks that are computed side by side, while as many are on their way.
    """

    form: Form
    rows: int
    chunk: int
    at_once: int

    @property
    def buffers(self) -> int:
        """Blocks of k and of v in VMEM."""
        return 2 * self.at_once

    @property
    def heads(self) -> int:
        """Query heads, rounded up to what a register holds."""
        return -(-self.form.heads // 8) * 8

    def of(self, row: Any) -> Any:
        """Where the heads of a sequence lie."""
        return pl.ds(pl.multiple_of(row * self.heads, 8), self.heads)

    @property
    def positions(self) -> int:
        """Of a block."""
        return self.rows // self.form.kv

    @property
    def items(self) -> int:
        """Blocks of all sequences at their longest, rounded up to ``at_once``."""
        most = self.form.batch * -(-self.form.span // self.positions)
        return -(-most // self.at_once) * self.at_once

    def scratch(self) -> dict[str, Any]:
        """What the kernel keeps in VMEM, by name; of k and v side by side where the first axis is 2."""
        f, vmem = self.form, pltpu.VMEM
        cached = jnp.dtype(f.dtype)
        kept = {
            "ring_k": vmem((self.buffers, self.rows, f.d), cached),
            "ring_v": vmem((self.buffers, self.rows, f.d), cached),
            "arrived": pltpu.SemaphoreType.DMA((self.buffers, 4)),
            "written": pltpu.SemaphoreType.DMA((4,)),
            "new": vmem((2, f.batch * self.chunk, f.d), jnp.float32),
            "back": vmem((2, f.batch, self.chunk, f.d), cached),
            "mask": vmem((self.heads, self.rows), jnp.float32),
            # One sequence below the other, and last one that is none.
            "q": vmem(((f.batch + 1) * self.heads, f.d), jnp.float32),
            "sum": vmem(((f.batch + 1) * self.heads, f.d), jnp.float32),
            "total": vmem(((f.batch + 1) * self.heads, f.d), jnp.float32),
        }
        if f.dtype == "int8":
            kept |= {
                "ring_k_scale": vmem((self.buffers, 1, self.rows), jnp.float32),
                "ring_v_scale": vmem((self.buffers, 1, self.rows), jnp.float32),
                "new_scale": vmem((2, f.batch, _LANES), jnp.float32),
                "back_scale": vmem((2, f.batch, 1, _LANES), jnp.float32),
            }
        return kept


def kernel(*refs: Any, plan: Plan, turned: bool, names: tuple[str, ...], still: bool) -> None:
    """The body; one program does all of it."""
    row_of, block_of, count_ref, lengths, small, _, y_ref, *held, scratch = refs
    f, kept = plan.form, dict(zip(names, scratch, strict=True))
    count = row_of.shape[0] if still else count_ref[0]
    copies = _Copies(plan, held, kept, still)

    def send_for(t: Any) -> None:
        pl.when(t < count)(lambda: copies.start(t, row_of[t], block_of[t]))

    for t in range(plan.at_once):
        send_for(t)
    _prepare(small, kept, plan, turned)

    def arrive(t: Any) -> None:
        row, block = row_of[t], block_of[t]
        copies.wait(t, row, block)
        new = (block == _over(jnp.minimum(lengths[row], f.positions - 1), plan.positions)) & (
            lengths[row] < f.positions
        )
        pl.when(new)(lambda: _splice(plan, kept, copies, _slot(plan, t), row, block, lengths[row]))

    def step(turn: Any, so_far: Any) -> Any:
        now = [turn * plan.at_once + i for i in range(plan.at_once)]
        for t in now:
            send_for(t + plan.at_once)
        for t in now:
            pl.when(t < count)(lambda t=t: arrive(t))
        items = [(_slot(plan, t), row_of[t], block_of[t], lengths[row_of[t]]) for t in now]
        for t, one in zip(now, _attend(plan, kept, items), strict=True):
            row = row_of[t]
            same = (t > 0) & (row_of[jnp.maximum(t - 1, 0)] == row)
            so_far = _merged(so_far, one, same)
            kept["total"][plan.of(row)], kept["sum"][plan.of(row)] = so_far[1:]
        return so_far

    nothing = (jnp.zeros((plan.heads, f.d), jnp.float32),) * 3
    jax.lax.fori_loop(0, _over(count + plan.at_once - 1, plan.at_once), step, nothing)
    for head in range(f.heads):
        mine = pl.ds(head, f.batch, stride=plan.heads)
        y_ref[:, head * f.d : (head + 1) * f.d] = (kept["sum"][mine] / kept["total"][mine]).astype(y_ref.dtype)
    for row in range(f.batch):
        pl.when(lengths[row] < f.positions)(lambda row=row: copies.wait_back(row))


class _Copies:
    """Blocks on their way from the cache, and tiles on their way back."""

    def __init__(self, plan: Plan, held: Any, kept: dict[str, Any], still: bool) -> None:
        self.plan, self.held, self.kept, self.still = plan, held, kept, still

    def _incoming(self, t: Any, row: Any, block: Any) -> list[Any]:
        slot, rows = _slot(self.plan, t), self.plan.rows
        names = ("ring_k", "ring_v", "ring_k_scale", "ring_v_scale")
        place = pl.ds(pl.multiple_of(block * rows, rows), rows)
        copies = []
        for i, array in enumerate([] if self.still else self.held):
            part = array.at[row, place] if i < 2 else array.at[row, :, place]
            copies.append(pltpu.make_async_copy(part, self.kept[names[i]].at[slot], self.kept["arrived"].at[slot, i]))
        return copies

    def start(self, t: Any, row: Any, block: Any) -> None:
        for copy in self._incoming(t, row, block):
            copy.start()

    def wait(self, t: Any, row: Any, block: Any) -> None:
        for copy in self._incoming(t, row, block):
            copy.wait()

    def _outgoing(self, row: Any, at: Any, lane: Any) -> list[Any]:
        copies = []
        for i, array in enumerate([] if self.still else self.held):
            place = pl.ds(at, self.plan.chunk) if i < 2 else pl.ds(lane, _LANES)
            part = array.at[row, place] if i < 2 else array.at[row, :, place]
            source = self.kept["back"].at[i, row] if i < 2 else self.kept["back_scale"].at[i - 2, row]
            copies.append(pltpu.make_async_copy(source, part, self.kept["written"].at[i]))
        return copies

    def start_back(self, row: Any, at: Any, lane: Any) -> None:
        for copy in self._outgoing(row, at, lane):
            copy.start()

    def wait_back(self, row: int) -> None:
        for copy in self._outgoing(row, 0, 0):  # of equal size wherever they went
            copy.wait()


def _prepare(small: Any, kept: dict[str, Any], plan: Plan, turned: bool) -> None:
    """Queries and new keys turned, new keys and values repeated down a tile, and which score belongs to which head."""
    f, chunk = plan.form, plan.chunk
    qkv_ref, *turns = small
    lane = jax.lax.broadcasted_iota(jnp.int32, (f.batch, _LANES), 1)

    def part(head: int, turn: bool) -> Any:
        x = qkv_ref[:, head * f.d : (head + 1) * f.d].astype(jnp.float32)
        if turn and turned:
            x = x * turns[0][...] + pltpu.roll(x, f.d // 2, 1) * turns[1][...]
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    for head in range(f.heads):
        kept["q"][pl.ds(head, f.batch, stride=plan.heads)] = part(head, True)
    for which in range(2):
        scales = jnp.zeros((f.batch, _LANES), jnp.float32)
        for j in range(f.kv):
            x = part(f.heads + which * f.kv + j, which == 0)
            if f.dtype == "int8":
                scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30) / 127
                x, scales = jnp.round(x / scale), jnp.where(lane & (f.kv - 1) == j, scale, scales)
            for again in range(chunk // f.kv):
                kept["new"][which, pl.ds(again * f.kv + j, f.batch, stride=chunk)] = x
        if f.dtype == "int8":
            kept["new_scale"][which] = scales
    shape = kept["mask"].shape
    head = _over(jax.lax.broadcasted_iota(jnp.int32, shape, 0), f.heads // f.kv)
    mine = head == jax.lax.broadcasted_iota(jnp.int32, shape, 1) & (f.kv - 1)
    kept["mask"][...] = jnp.where(mine, 0.0, _NEVER)


def _splice(plan: Plan, kept: dict[str, Any], copies: _Copies, slot: Any, row: Any, block: Any, length: Any) -> None:
    """Put the new key and value into their block, and send the tile that they lie in back."""
    f, chunk = plan.form, plan.chunk
    at = length * f.kv
    tile, lanes = (pl.multiple_of(_over(at, size) * size, size) for size in (chunk, _LANES))
    inside = pl.ds(pl.multiple_of(tile - block * plan.rows, chunk), chunk)
    mine = _over(jax.lax.broadcasted_iota(jnp.int32, (chunk, f.d), 0), f.kv) == _over(at - tile, f.kv)
    for i, name in enumerate(("ring_k", "ring_v")):
        held = kept[name][slot, inside, :].astype(jnp.float32)
        both = jnp.where(mine, kept["new"][i, pl.ds(pl.multiple_of(row * chunk, 8), chunk)], held).astype(
            kept[name].dtype
        )
        kept[name][slot, inside, :] = both
        kept["back"][i, row] = both
    if f.dtype == "int8":
        inside = pl.ds(pl.multiple_of(lanes - block * plan.rows, _LANES), _LANES)
        mine = _over(jax.lax.broadcasted_iota(jnp.int32, (1, _LANES), 1), f.kv) == _over(at - lanes, f.kv)
        for i, name in enumerate(("ring_k_scale", "ring_v_scale")):
            both = jnp.where(mine, kept["new_scale"][i, pl.ds(row, 1), :], kept[name][slot, :, inside])
            kept[name][slot, :, inside] = both
            kept["back_scale"][i, row] = both
    copies.start_back(row, tile, lanes)


def _attend(plan: Plan, kept: dict[str, Any], items: list[tuple[Any, Any, Any, Any]]) -> list[tuple[Any, Any, Any]]:
    """The softmax of each block: largest score, sum of exponentials, ``[heads, 1]``, and what they weigh.

    Items are (slot, row, block, length). What is alike in all of them stands side by side, so that one item's products
    run while another's maximum is looked for.
    """
    f, dot = plan.form, functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    k, v = ([kept[name][slot].astype(jnp.bfloat16) for slot, *_ in items] for name in ("ring_k", "ring_v"))
    queries = [kept["q"][plan.of(row)].astype(jnp.bfloat16) for _, row, *_ in items]
    scores = [dot(q, keys, (((1,), (1,)), ((), ()))) for q, keys in zip(queries, k, strict=True)]
    scores = [_seen(plan, kept, x, *item) for x, item in zip(scores, items, strict=True)]
    largest = [jnp.max(x, axis=1, keepdims=True) for x in scores]
    weights = [jnp.exp(x - top) for x, top in zip(scores, largest, strict=True)]
    total = [jnp.sum(x, axis=1, keepdims=True) for x in weights]
    if f.dtype == "int8":
        weights = [x * kept["ring_v_scale"][slot] for x, (slot, *_) in zip(weights, items, strict=True)]
    weighed = [
        dot(x.astype(jnp.bfloat16), values, (((1,), (0,)), ((), ()))) for x, values in zip(weights, v, strict=True)
    ]
    return list(zip(largest, total, weighed, strict=True))


def _seen(plan: Plan, kept: dict[str, Any], scores: Any, slot: Any, _: Any, block: Any, length: Any) -> Any:
    """Scores of a block, scaled, and far below all others where a query does not look."""
    f = plan.form
    scores = scores * (kept["ring_k_scale"][slot] * f.scale if f.dtype == "int8" else f.scale)
    if f.softcap is not None:
        scores = f.softcap * jnp.tanh(scores / f.softcap)
    column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) + block * plan.rows
    seen = column < (length + 1) * f.kv
    if f.window is not None:
        seen &= column >= (length + 1 - f.window) * f.kv
    return jnp.where(seen, scores + kept["mask"][...], _NEVER)


def _merged(so_far: tuple[Any, Any, Any], one: tuple[Any, Any, Any], same: Any) -> tuple[Any, Any, Any]:
    """A block's softmax and that of its sequence so far, if it is of the same one."""
    before = jnp.where(same, so_far[0], _NEVER)
    top = jnp.maximum(before, one[0])
    old, new = jnp.where(same, jnp.exp(before - top), 0.0), jnp.exp(one[0] - top)
    return top, so_far[1] * old + one[1] * new, so_far[2] * old + one[2] * new


def _over(x: Any, size: int) -> Any:
    """``x // size`` of what is not negative: Python's rounding asks for signs."""
    return jax.lax.div(x, jnp.asarray(size, jnp.int32))


def _slot(plan: Plan, t: Any) -> Any:
    return jax.lax.rem(jnp.asarray(t, jnp.int32), plan.buffers)
