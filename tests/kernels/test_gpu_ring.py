# SPDX-License-Identifier: Apache-2.0
"""The ring of the Hopper kernel in every order in which it can happen: copies land as they like, waits see parity only.

No GPU shows this reliably: a straggling copy is rare, and what it breaks is a run in millions. So the protocol of
`pipeline` and `reader` is stated here a second time, and all of its interleavings are walked.
"""

import functools

import pytest

from awq_jax_kernels.int4_matmul.pallas_gpu import BlockConfig

RIGHT, STALE, STUCK = "right", "bytes of another step", "waits for ever"


def passes(completed, phase):
    """Whether a wait for a phase returns: the one under way must have the other parity."""
    return completed % 2 != phase % 2


@functools.cache
def outcome(stages, deep, steps, late, careful, wide=1):
    """What the worst order leads to.

    Args:
      stages, deep, wide: as in `BlockConfig`; a warpgroup is one reader here.
      steps: of the block.
      late: a reader gives a slot back when it has begun its next step, as `Reader.scaled_weight` does.
      careful: a reader waits for the release of what its slot held before.
    """
    readers = [(turn, False) for turn in range(deep) for _ in range(wide)]  # next step, and whether it is being read
    start = (0, frozenset(), (None,) * stages, (0,) * stages, (0,) * stages, tuple(readers))
    seen, left = {start}, [start]
    while left:
        issued, travelling, held, full, free, at = left.pop()
        following = []
        slot = issued % stages
        if issued < steps and (issued < stages or passes(free[slot] // wide, issued // stages - 1)):
            following.append((issued + 1, travelling | {issued}, held, full, free, at))
        for step in travelling:
            landed = put(held, step % stages, step), put(full, step % stages, full[step % stages] + 1)
            following.append((issued, travelling - {step}, *landed, free, at))
        for i, (step, reading) in enumerate(at):
            slot, use = step % stages, step // stages
            if reading:
                back = step - deep if late else step
                if back >= 0 and held[back % stages] != back:
                    return STALE
                given = put(free, back % stages, free[back % stages] + 1) if back >= 0 else free
                following.append((issued, travelling, held, full, given, put(at, i, (step + deep, False))))
                continue
            released = not careful or stages % deep == 0 or passes(free[slot] // wide, use - 1)
            if step < steps and released and passes(full[slot], use):
                if held[slot] != step:
                    return STALE
                following.append((issued, travelling, held, full, free, put(at, i, (step, True))))
        if not following and (issued < steps or travelling or min(at)[0] < steps):
            return STUCK
        left += [new for new in following if new not in seen]
        seen.update(following)
        assert len(seen) < 1_000_000
    return RIGHT


def put(values, index, value):
    return (*values[:index], value, *values[index + 1 :])


RINGS = [(stages, deep) for deep in (1, 2, 3) for stages in range(1, 6)]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("stages, deep", RINGS)
def test_what_a_config_allows_is_right_in_every_order(stages, deep, late):
    allowed = BlockConfig(8, deep=deep, stages=stages, scale_weight=late).problem(4096, 256, 128) is None
    assert allowed == (stages >= deep + late)
    assert (outcome(stages, deep, 2 * stages + 2, late, True) == RIGHT) or not allowed


@pytest.mark.parametrize("stages", [3, 4, 7])
def test_two_warpgroups_side_by_side(stages):
    """Seven slots and sixteen steps are a gate's product of 16 rows by 4096 channels."""
    assert outcome(stages, 2, 16, False, True, wide=2) == RIGHT


def test_why_a_reader_waits_for_the_release_of_another():
    """Seven slots between two readers read stale bytes, or wait for ever, as soon as a copy is five steps late."""
    assert outcome(7, 2, 9, False, careful=False) == STALE
    assert outcome(8, 2, 10, False, careful=False) == RIGHT, "a slot is always the same reader's"


def test_why_a_ring_needs_a_slot_for_each_reader():
    assert outcome(2, 2, 6, True, careful=True) == STUCK
    assert outcome(2, 3, 6, False, careful=True) == STALE
