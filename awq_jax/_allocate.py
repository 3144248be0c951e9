# SPDX-License-Identifier: Apache-2.0
"""One choice for each of many things, the smallest sum of losses whose costs fit: a knapsack, solved exactly."""

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["allocate"]

_CELLS = 200_000  # of the table; finer costs than that are rounded up, so that what is chosen always fits


def allocate(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], capacity: int, *, cells: int = _CELLS
) -> tuple[int, ...]:
    """Which choice each unit takes, by dynamic programming over the room that is left.

    ``table[r]`` is the smallest sum of losses of the units so far in room r, counted in the costs' common divisor. The
    answer is the optimum, not one on the convex hull, as long as the table has a cell for each multiple of the divisor.
    Ties go to the choice that stands first, and to less room: the answer is the same on every machine.

    Args:
      costs: whole numbers, of each choice of each unit.
      losses: of the same; infinite where a choice is not to be taken.
      capacity: what the costs may add up to.
      cells: of the table at most.

    Returns:
      An index into the choices of every unit.

    Raises:
      ValueError: not even the cheapest choices fit, or a unit has no choice whose loss is finite.

    >>> allocate([[3, 4], [3, 4]], [[5.0, 1.0], [9.0, 8.0]], capacity=7)
    (1, 0)
    """
    least = [min(row) for row in costs]
    room = capacity - sum(least)
    if room < 0:
        raise ValueError(f"the cheapest choices cost {sum(least)} together, more than {capacity}.")
    extra = [[cost - low for cost in row] for row, low in zip(costs, least, strict=True)]
    room = min(room, sum(map(max, extra)))
    cell = math.gcd(*(cost for row in extra for cost in row)) or 1
    cell *= max(1, math.ceil(room / cell / cells))
    width = room // cell + 1
    steps = [[-(-cost // cell) for cost in row] for row in extra]
    table = np.zeros(width)
    picked = np.zeros((len(steps), width), np.int8)
    for unit, (row, lost) in enumerate(zip(steps, losses, strict=True)):
        best = np.full(width, np.inf)
        for choice, (step, loss) in enumerate(zip(row, lost, strict=True)):
            if step < width:
                total = np.concatenate([np.full(step, np.inf), table[: width - step]]) + loss
                better = total < best  # False where the loss is NaN
                best[better], picked[unit, better] = total[better], choice
        table = best
    at = int(np.argmin(table))
    if not np.isfinite(table[at]):
        raise ValueError("nothing that fits has a finite loss.")
    chosen = []
    for unit in reversed(range(len(steps))):
        chosen.append(int(picked[unit, at]))
        at -= steps[unit][chosen[-1]]
    return tuple(reversed(chosen))
