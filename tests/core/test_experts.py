# SPDX-License-Identifier: Apache-2.0
"""A mixture's statistics, products and scales are those of its experts taken one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import QTensor, QuantSpec, SearchSpec, dequantize, observe, quantize
from awq_jax._experts import ExpertRows, observe_experts, ragged_matmul, without_starved
from awq_jax._plan import GroupPlan, LayerPlan
from awq_jax._quantize import quantize_layer
from awq_jax.families import Group, Linear

E, K, N, INNER = 4, 8, 6, 16
SIZES = np.array([5, 0, 17, 2], np.int32)


@pytest.fixture
def sent(rng):
    """Rows of four experts, one of which gets none; tokens in any order."""
    rows = rng.normal(size=(SIZES.sum(), K)).astype(np.float32)
    token = rng.permutation(SIZES.sum()).astype(np.int32)
    return ExpertRows(rows=jnp.asarray(rows), token=jnp.asarray(token), sizes=jnp.asarray(SIZES))


def of(expert):
    start = int(SIZES[:expert].sum())
    return slice(start, start + int(SIZES[expert]))


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_each_row_meets_its_own_weight(rng, sent, bits):
    weight = jnp.asarray(rng.normal(size=(E, K, N)), jnp.float32)
    if bits:
        weight = quantize(weight, QuantSpec(bits=bits, group_size=4))
    got = jax.jit(ragged_matmul)(sent.rows, weight, sent.sizes)
    for expert in range(E):
        one = weight[expert]
        dense = np.asarray(dequantize(one) if isinstance(one, QTensor) else one, np.float64)
        wanted = np.asarray(sent.rows[of(expert)], np.float64) @ dense
        np.testing.assert_allclose(got[of(expert)], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_more_than_a_tile_meet_their_own_weight(rng, bits):
    sizes = np.array([300, 0, 700, 24], np.int32)
    x = jnp.asarray(rng.normal(size=(sizes.sum(), K)), jnp.float32)
    weight = quantize(jnp.asarray(rng.normal(size=(E, K, N)), jnp.float32), QuantSpec(bits=bits, group_size=4))
    got = jax.jit(ragged_matmul)(x, weight, jnp.asarray(sizes))
    wanted = np.einsum("mk,mkn->mn", x, np.repeat(np.asarray(dequantize(weight)), sizes, axis=0))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_statistics_are_those_of_each_experts_rows(rng, sent):
    mask = rng.random(SIZES.sum()) < 0.7
    got = jax.jit(lambda x, mask: observe_experts(x, mask, histogram=True))(sent, jnp.asarray(mask))
    for expert in range(E):
        keep = jnp.asarray(mask[np.asarray(sent.token)[of(expert)]])
        wanted = observe(sent.rows[of(expert)], keep, histogram=True)
        one = jax.tree.map(lambda leaf, at=expert: leaf[at], got)
        for name in ("count", "abs_sum", "abs_max", "gram", "histogram"):
            np.testing.assert_allclose(getattr(one, name), getattr(wanted, name), rtol=1e-5, atol=1e-5)


def test_an_expert_that_few_tokens_reach_is_rounded_to_nearest_and_the_others_are_searched(rng, sent):
    spec = QuantSpec(group_size=-1)
    params = {
        "up": {"kernel": jnp.asarray(rng.normal(size=(E, N, K)), jnp.float32)},
        "down": {"kernel": jnp.asarray(rng.normal(size=(E, K, N)), jnp.float32)},
    }
    group = Group(Linear("up"), ("down",), per_expert=True)
    plan = LayerPlan(
        groups=(GroupPlan(group=group, specs=(spec,), tie=None, clip=(True,)),), search=SearchSpec(expert_tokens=5)
    )
    stats = {"down": observe_experts(sent)}
    done = jax.jit(lambda p, s: quantize_layer(p, s, plan))(params, stats)
    index = np.asarray(done.results[0].index)
    for expert in range(E):
        alone = quantize(params["down"]["kernel"][expert], spec)
        same = np.array_equal(done.params["down"]["kernel"].packed[expert], alone.packed)
        if SIZES[expert] < 5:
            assert index[expert] == 0 and same
            np.testing.assert_array_equal(done.params["up"]["kernel"][expert], params["up"]["kernel"][expert])
        else:
            assert index[expert] > 0 and not same


def test_starving_leaves_statistics_of_one_linear_alone(rng):
    stats = observe(jnp.asarray(rng.normal(size=(3, K)), jnp.float32))
    assert without_starved(stats, 100) is stats
