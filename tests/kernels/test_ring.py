# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel's ring, in every order that copies and warpgroups can take: nobody reads what has not landed.

A model of `pallas_gpu.pipeline`: one thread asks for copies in turn, copies land in any order, warpgroups take turns
over the steps, and a barrier of two phases tells one use of a slot from the next by a single bit.
"""

import dataclasses
from collections.abc import Iterator

import pytest


@dataclasses.dataclass(frozen=True)
class State:
    """What there is in one moment.

    Attributes:
      asked: copies that were asked for.
      landed: steps whose bytes are there.
      next: for each warpgroup, the step that it waits for or reads.
      reading: for each warpgroup, whether it reads.
    """

    asked: int
    landed: frozenset[int]
    next: tuple[int, ...]
    reading: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Ring:
    """How many slots, warpgroups and steps there are, and whether a reader waits for its slot's last release."""

    stages: int
    deep: int
    steps: int
    careful: bool

    def uses(self, slot: int, steps: frozenset[int] | range) -> int:
        return sum(step % self.stages == slot for step in steps)

    def released(self, s: State) -> frozenset[int]:
        return frozenset(step for step in range(self.steps) if step < s.next[step % self.deep])

    def passes(self, phases: int, use: int) -> bool:
        """A barrier that completed so many phases lets those pass that wait for the phase `use`: one bit says so."""
        return phases % 2 != use % 2

    def sees(self, s: State, step: int) -> bool:
        """Whether a warpgroup passes its barriers to read a step."""
        slot, use = step % self.stages, step // self.stages
        if self.careful and use and not self.passes(self.uses(slot, self.released(s)), use - 1):
            return False
        return self.passes(self.uses(slot, s.landed), use)

    def moves(self, s: State) -> Iterator[State]:
        slot, use = s.asked % self.stages, s.asked // self.stages
        if s.asked < self.steps and (not use or self.passes(self.uses(slot, self.released(s)), use - 1)):
            yield dataclasses.replace(s, asked=s.asked + 1)
        for step in set(range(s.asked)) - s.landed:
            yield dataclasses.replace(s, landed=s.landed | {step})
        for turn, step in enumerate(s.next):
            change = lambda x, value, turn=turn: (*x[:turn], value, *x[turn + 1 :])
            if s.reading[turn]:
                yield dataclasses.replace(s, next=change(s.next, step + self.deep), reading=change(s.reading, False))
            elif step < self.steps and self.sees(s, step):
                yield dataclasses.replace(s, reading=change(s.reading, True))

    def states(self) -> set[State]:
        """Everything that can be."""
        first = State(0, frozenset(), tuple(range(self.deep)), (False,) * self.deep)
        seen, waiting = {first}, [first]
        while waiting:
            s = waiting.pop()
            if self.too_early(s):
                continue  # what comes of it is of no use
            new = set(self.moves(s)) - seen
            seen |= new
            waiting += new
        return seen

    def too_early(self, s: State) -> bool:
        return any(reading and step not in s.landed for step, reading in zip(s.next, s.reading, strict=True))


RINGS = [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (4, 2), (5, 2), (3, 3), (4, 3)]


@pytest.mark.parametrize(("stages", "deep"), RINGS)
def test_nobody_reads_early_and_all_is_read(stages, deep):
    ring = Ring(stages, deep, 2 * stages + deep, careful=stages % deep != 0)
    states = ring.states()
    assert not any(map(ring.too_early, states))
    stuck = [s for s in states if not any(True for _ in ring.moves(s))]
    assert [min(s.next) >= ring.steps and len(s.landed) == ring.steps for s in stuck] == [True]


@pytest.mark.parametrize(("stages", "deep"), [(stages, deep) for stages, deep in RINGS if stages % deep])
def test_the_release_before_is_needed_where_warpgroups_take_turns_in_a_slot(stages, deep):
    ring = Ring(stages, deep, 2 * stages + deep, careful=False)
    assert any(map(ring.too_early, ring.states()))
