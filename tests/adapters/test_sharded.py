# SPDX-License-Identifier: Apache-2.0
"""Statistics, scales and served outputs inside the user's own parallelism: those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from awq_jax import adapt, all_reduce
from tests.adapters.models import D, mlp, mlp_params
from tests.adapters.served import RECIPE, distance

MESH = functools.partial(jax.make_mesh, (8,), ("i",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(1).standard_normal((8, 16, D)), jnp.float32)


@pytest.fixture(scope="module")
def table(x):
    return adapt.propose(mlp, mlp_params(), x)


@pytest.fixture(scope="module")
def one(x, table):
    return verbs(mlp_params(), adapt.observing(mlp, table)(mlp_params(), x)[1], table)


def verbs(params, stats, table):
    """(stats, scales and losses by group)."""
    results = adapt.quantize_params(params, stats, table, RECIPE).results
    return stats, [(result.scale, result.losses, result.index) for result in results]


def reduced(table):
    """What a step of data-parallel training adds: observe its share, reduce over the axis."""

    def step(params, x):
        _, stats = adapt.observing(mlp, table)(params, x)
        return {path: all_reduce(s, "i") for path, s in stats.items()}

    return step


def by_pmap(params, x, table):
    stats = jax.pmap(reduced(table), axis_name="i", in_axes=(None, 0))(params, x[:, None])
    return jax.tree.map(lambda leaf: leaf[3], stats)


def by_shard_map(params, x, table):
    step = jax.shard_map(reduced(table), mesh=MESH(), in_specs=(P(), P("i")), out_specs=P())
    return jax.jit(step)(params, x)


def by_placement(params, x, table, of_kernel, of_x):
    place = lambda leaf: jax.device_put(leaf, NamedSharding(MESH(), of_kernel if leaf.ndim == 2 else P()))
    params = jax.tree.map(place, params)
    return jax.jit(adapt.observing(mlp, table))(params, jax.device_put(x, NamedSharding(MESH(), of_x)))[1]


def by_explicit_axes(params, x, table):
    """Sharding in types: a sum over a sharded axis has to say where it goes."""
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Explicit,))
    place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        rows = lambda leaf: place(leaf, P("i", None) if leaf.ndim == 2 else P())
        stats = jax.jit(adapt.observing(mlp, table))(jax.tree.map(rows, params), place(x, P("i")))[1]
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), stats)


WAYS = {
    "explicit": by_explicit_axes,
    "pmap": by_pmap,
    "shard_map": by_shard_map,
    "data": functools.partial(by_placement, of_kernel=P(), of_x=P("i")),
    "tensor": functools.partial(by_placement, of_kernel=P(None, "i"), of_x=P()),
    "fsdp": functools.partial(by_placement, of_kernel=P("i", None), of_x=P("i")),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_scales_are_those_of_one_device(x, table, one, way):
    wanted, groups = one
    stats = WAYS[way](mlp_params(), x, table)
    for path, statistic in stats.items():
        np.testing.assert_array_equal(statistic.count, wanted[path].count)
        np.testing.assert_allclose(statistic.abs_sum, wanted[path].abs_sum, rtol=1e-6)
    for (scale, losses, index), (scale1, losses1, index1) in zip(
        verbs(mlp_params(), stats, table)[1], groups, strict=True
    ):
        assert index == index1
        np.testing.assert_allclose(scale, scale1, rtol=1e-6)
        np.testing.assert_allclose(losses, losses1, rtol=1e-3)  # one weight across a tie changes a column's error


def test_served_under_shard_map_and_with_sharded_columns(x, table, one):
    stats, _ = one
    qparams, _ = adapt.quantize(mlp_params(), stats, table, RECIPE)
    wanted = adapt.serve(mlp)(qparams, x)
    over_data = jax.shard_map(adapt.serve(mlp), mesh=MESH(), in_specs=(P(), P("i")), out_specs=P("i"))
    assert distance(jax.jit(over_data)(qparams, x), wanted) < 1e-5
    columns = lambda leaf: jax.device_put(leaf, NamedSharding(MESH(), P(None, "i") if leaf.ndim == 2 else P()))
    assert distance(jax.jit(adapt.serve(mlp))(jax.tree.map(columns, qparams), x), wanted) < 1e-5
