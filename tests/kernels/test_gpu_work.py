# SPDX-License-Identifier: Apache-2.0
"""What the Hopper kernel's persistent blocks compute: everything once, and as evenly as pairs can have it."""

import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax_kernels.int4_matmul.pallas_gpu import BlockConfig, Ends, work
from awq_jax_kernels.int4_matmul.pallas_gpu.config import MULTIPROCESSORS
from awq_jax_kernels.int4_matmul.pallas_gpu.plan import PAIR, Plan

PAIRS = MULTIPROCESSORS // PAIR


def plan_of(m, k, n, tokens=128, wide=2):
    config = BlockConfig(tokens, wide=wide, deep=1, stages=4, scale_weight=True, persistent=True)
    floats = jnp.dtype("bfloat16")
    return Plan(config, m, k, n, 128, floats, floats, tiles=True, zeros=True, ends=Ends())


def computed(plan):
    """Every block's items, in order: ``(pair, member, Work)`` with numbers of all items in arrays."""
    pairs = work.grid(plan)["grid"][0]
    count = np.asarray(work.rounds(plan, jnp.arange(pairs)))
    pair, member, i = (a.reshape(-1) for a in np.meshgrid(range(pairs), range(PAIR), range(max(count)), indexing="ij"))
    there = i < count[pair]
    pair, member, i = (jnp.asarray(a[there], jnp.int32) for a in (pair, member, i))
    return pair, member, work.of_round(plan, pair, member, i)


SHAPES = [
    (8, 256, 256), (128, 4096, 14336), (256, 8192, 8192), (1000, 4096, 14336), (1024, 4096, 14336), (4096, 384, 14336),
    (4096, 512, 8192), (130, 1152, 16896), (8448, 256, 512),
]  # fmt: skip


@pytest.mark.parametrize("m, k, n", SHAPES)
def test_every_step_of_every_tile_is_taken_once(m, k, n):
    plan = plan_of(m, k, n)
    _, _, item = computed(plan)
    taken = np.zeros((*plan.tiles_of_y, k // 128), int)
    for at_m, at_n, first, steps in zip(item.block_m, item.block_n, item.first, item.steps, strict=True):
        taken[at_m, at_n, int(first) : int(first + steps)] += 1
    assert (taken == 1).all()


@pytest.mark.parametrize("m, k, n", SHAPES)
def test_a_block_counts_the_steps_that_it_has_taken(m, k, n):
    pair, member, item = computed(plan_of(m, k, n))
    block = np.asarray(pair * PAIR + member)
    for b in np.unique(block):
        steps, before = np.asarray(item.steps)[block == b], np.asarray(item.before)[block == b]
        assert (before == np.cumsum(steps) - steps).all()


@pytest.mark.parametrize("m, k, n", SHAPES)
def test_only_the_last_tile_is_shared_and_by_both(m, k, n):
    pair, member, item = computed(plan_of(m, k, n))
    (alone, _), (shared, halves) = item.ends
    assert halves.split == PAIR and (np.asarray(alone) != np.asarray(shared)).all()
    last = {int(p): int(b) for p, b in zip(pair, item.before, strict=True)}  # the highest comes last
    for p, b, is_shared in zip(pair, item.before, shared, strict=True):
        assert not is_shared or int(b) == last[int(p)]
    of_member = [np.asarray(shared)[np.asarray(member) == r] for r in range(PAIR)]
    assert (of_member[0] == of_member[1]).all()


@pytest.mark.parametrize("m, k, n", SHAPES)
def test_no_pair_has_two_tiles_more_than_another(m, k, n):
    plan = plan_of(m, k, n)
    rows, columns = plan.tiles_of_y
    pair, _, item = computed(plan)
    of_pair = np.bincount(np.asarray(pair), np.asarray(item.steps)) / (k // 128)
    assert of_pair.max() == -(-rows * columns // PAIRS) and of_pair.min() >= of_pair.max() - 1


def test_the_last_round_of_a_large_product_is_halved():
    """448 tiles are 3.4 rounds of 132 blocks: four where each tile has one block, three and a half here."""
    _, _, item = computed(plan_of(1024, 4096, 14336))
    assert max(np.asarray(item.before + item.steps)) == 3.5 * 32
