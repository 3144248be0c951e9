# SPDX-License-Identifier: Apache-2.0
"""The verbs run unchanged on eight devices, however they are spread, and find what one device finds."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from awq_jax import QTensor, QuantSpec, SearchSpec, all_reduce, observe, quantize, rule, search_scale

TOKENS, K, N, G = 512, 256, 64, 32
EPS = float(np.finfo(np.float32).eps)
SPEC = QuantSpec(group_size=G, scale_dtype="float32")
SEARCH = SearchSpec(rules=(rule("paper", n_grid=6), rule("duo", n_grid=5)))
MESH = functools.partial(jax.make_mesh, (8,), axis_types=(AxisType.Auto,))


@pytest.fixture
def problem(rng):
    """Tokens with a few large channels, and a weight."""
    x = rng.standard_normal((TOKENS, K)) * np.exp(rng.standard_normal(K))
    x[:, rng.choice(K, 6, replace=False)] *= 20
    return jnp.asarray(x, jnp.float32), jnp.asarray(rng.standard_normal((K, N)), jnp.float32)


def verbs(x, w, axis=None):
    """Observe, reduce, search: the whole of a calibration."""
    stats = observe(x, histogram=True)
    stats = stats if axis is None else all_reduce(stats, axis)
    return stats, search_scale(stats, [w], SEARCH, SPEC)


def pmapped(x, w):
    both = jax.pmap(lambda x, w: verbs(x, w, "data"), axis_name="data", in_axes=(0, None))
    stats, result = both(x.reshape(8, -1, K), w)
    for leaf in jax.tree.leaves((stats, result)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))  # every device has the same
    return jax.tree.map(lambda leaf: leaf[5], (stats, result))


def shard_mapped(x, w):
    over_tokens = functools.partial(verbs, axis="data")
    return jax.jit(jax.shard_map(over_tokens, mesh=MESH(("data",)), in_specs=(P("data"), P()), out_specs=P()))(x, w)


def placed(x, w, of_x, of_w):
    """GSPMD: the code knows of no devices, the arrays do."""
    mesh = MESH(("i",))
    return jax.jit(verbs)(jax.device_put(x, NamedSharding(mesh, of_x)), jax.device_put(w, NamedSharding(mesh, of_w)))


SPREAD = {
    "pmap over tokens": pmapped,
    "shard_map over tokens": shard_mapped,
    "jit, sharded tokens": functools.partial(placed, of_x=P("i"), of_w=P()),
    "jit, sharded channels": functools.partial(placed, of_x=P(None, "i"), of_w=P("i")),
    "jit, sharded columns": functools.partial(placed, of_x=P(), of_w=P(None, "i")),
}


@pytest.mark.parametrize("how", SPREAD)
def test_eight_devices_find_what_one_finds(problem, how):
    x, w = problem
    (wanted, one), (got, eight) = jax.jit(verbs)(x, w), SPREAD[how](x, w)
    np.testing.assert_array_equal(got.count, wanted.count)
    np.testing.assert_array_equal(got.abs_max, wanted.abs_max)
    np.testing.assert_array_equal(got.histogram, wanted.histogram)
    # A sum of n terms in another order errs by at most n eps of the sum of their magnitudes; those of X'X are bounded
    # by the norms of its columns.
    np.testing.assert_allclose(got.abs_sum, wanted.abs_sum, rtol=TOKENS * EPS)
    norms = np.sqrt(np.diag(wanted.gram))
    assert (np.abs(got.gram - wanted.gram) <= TOKENS * EPS * np.outer(norms, norms)).all()
    assert eight.index == one.index != 0
    # t is a product of powers no greater than one of such sums, normalised by two of its entries.
    np.testing.assert_allclose(eight.scale, one.scale, rtol=3 * (TOKENS + K) * EPS)
    # Where that moves a weight across a tie, one of the 256 codes of a column changes its error, within half a step.
    np.testing.assert_allclose(eight.losses, one.losses, rtol=1e-3)


@pytest.mark.parametrize("places", [P(None, "i"), P("i", None)], ids=["columns", "rows, whole groups"])
@pytest.mark.parametrize("spec", [SPEC, QuantSpec(group_size=G, symmetric=True), QuantSpec(group_size=G, bits=3)])
def test_sharded_weights_have_the_same_codes_and_stay_where_they_are(problem, places, spec):
    _, w = problem
    placed = NamedSharding(MESH(("i",)), places)
    rounded = jax.jit(quantize, static_argnums=1)
    wanted, got = rounded(w, spec), rounded(jax.device_put(w, placed), spec)
    assert isinstance(got, QTensor)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding.is_equivalent_to(placed, a.ndim)


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")


def collectives(w, places, spec):
    sharded = jax.device_put(w, NamedSharding(MESH(("i",)), places))
    text = jax.jit(quantize, static_argnums=1).lower(sharded, spec).compile().as_text()
    assert text is not None
    return [name for name in COLLECTIVES if name in text]


def test_rounding_sharded_weights_moves_no_data(problem):
    """Groups are whole on every device, so nothing needs to be sent; a group that is not is what would be."""
    _, w = problem
    assert collectives(w, P(None, "i"), SPEC) == []
    assert collectives(w, P("i", None), SPEC) == []
    assert collectives(w, P("i", None), QuantSpec(group_size=-1))


def test_a_scale_found_on_eight_devices_gives_the_codes_of_one(problem):
    x, w = problem
    _, found = SPREAD["jit, sharded columns"](x, w)
    t = jnp.asarray(np.asarray(found.scale))
    fold_and_round = jax.jit(lambda w, t: quantize(w * t[:, None], SPEC))
    wanted = fold_and_round(w, t)
    for places in (P(None, "i"), P("i", None)):
        got = fold_and_round(jax.device_put(w, NamedSharding(MESH(("i",)), places)), t)
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_devices_that_share_outputs_send_each_other_no_weight(problem):
    """What a candidate costs does not depend on the link: sums by channel and losses travel, not errors of weights."""
    x, w = problem
    stats = observe(x)
    shared = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=NamedSharding(MESH(("i",)), P(None, "i")))
    text = jax.jit(lambda w: search_scale(stats, [w], SEARCH, SPEC)).lower(shared).compile().as_text() or ""
    sent = re.findall(
        r"= (.*) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text
    )
    sizes = [
        np.prod([int(n) for n in dims.split(",") if n]) for shapes in sent for dims in re.findall(r"\[(.*?)\]", shapes)
    ]
    assert sizes and max(sizes) <= 2 * K, sent
