# SPDX-License-Identifier: Apache-2.0
"""What is chosen under a capacity is what trying everything finds."""

import itertools
import math

import numpy as np
import pytest

from awq_jax._allocate import allocate


def best_of_all(costs: list[list[int]], losses: list[list[float]], capacity: int) -> float:
    tried = itertools.product(*(range(len(row)) for row in costs))
    sums = ((sum(row[at] for row, at in zip(costs, picked, strict=True)), picked) for picked in tried)
    return min(
        (sum(row[at] for row, at in zip(losses, picked, strict=True)) for cost, picked in sums if cost <= capacity),
        default=math.inf,
    )


def drawn(rng: np.random.Generator) -> tuple[list[list[int]], list[list[float]], int]:
    units, unit = int(rng.integers(1, 6)), int(rng.integers(1, 50))
    weights = (unit * rng.integers(1, 9, units)).tolist()
    costs = [[count * bits for bits in (2, 3, 4, 8)] for count in weights]
    losses = rng.exponential(1.0, (units, 4)) * 4.0 ** -np.array([2, 3, 4, 8])
    least, most = sum(row[0] for row in costs), sum(row[-1] for row in costs)
    return costs, losses.tolist(), int(rng.integers(least, most + 2))


def test_it_is_the_optimum(rng: np.random.Generator):
    for _ in range(60):
        costs, losses, capacity = drawn(rng)
        picked = allocate(costs, losses, capacity)
        assert sum(row[at] for row, at in zip(costs, picked, strict=True)) <= capacity
        found = sum(row[at] for row, at in zip(losses, picked, strict=True))
        assert found == pytest.approx(best_of_all(costs, losses, capacity), rel=1e-12)


def test_a_small_table_still_keeps_the_capacity(rng: np.random.Generator):
    for _ in range(60):
        costs, losses, capacity = drawn(rng)
        picked = allocate(costs, losses, capacity, cells=7)
        assert sum(row[at] for row, at in zip(costs, picked, strict=True)) <= capacity


def test_what_is_not_finite_is_never_chosen():
    assert allocate([[2, 3], [2, 3]], [[math.inf, 1.0], [1.0, math.nan]], 100) == (1, 0)
    with pytest.raises(ValueError, match="finite loss"):
        allocate([[2, 3]], [[math.inf, 1.0]], 2)


def test_equal_losses_take_the_first_choice():
    assert allocate([[2, 4], [2, 4]], [[1.0, 1.0], [0.0, 0.0]], 8) == (0, 0)


def test_too_little_room_is_refused():
    with pytest.raises(ValueError, match="the cheapest choices cost 5 together, more than 4"):
        allocate([[2, 9], [3, 9]], [[1.0, 0.0], [1.0, 0.0]], 4)
