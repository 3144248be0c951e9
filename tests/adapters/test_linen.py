# SPDX-License-Identifier: Apache-2.0
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import linen as awq
from awq_jax import search_scale
from awq_jax.adapt.kernel import QKernel
from tests.adapters.models import HEAD, HEADS, INNER, D, Scanned, some_tokens
from tests.adapters.served import RECIPE, dense, distance, rules

ROUTER = dataclasses.replace(RECIPE, overrides=(("*router*", None),))


@pytest.fixture(scope="module")
def variables():
    return Scanned().init(jax.random.key(0), some_tokens())


@pytest.fixture(scope="module")
def table(variables):
    return awq.propose(Scanned(), variables, some_tokens())


@pytest.fixture(scope="module")
def stats(variables, table):
    return awq.observe(Scanned(), variables, [some_tokens(seed) for seed in range(2)], table)


@pytest.fixture(scope="module")
def quantized(variables, stats, table):
    return awq.quantize(variables, stats, table, ROUTER)


def test_groups_of_a_scanned_stack_with_experts(table):
    assert rules(table) == {
        "layers/norm1/scale": {f"layers/{name}/kernel" for name in "qkv"},
        "layers/v/kernel": {"layers/o/kernel"},
        "layers/norm2/scale": {f"layers/experts/{name}" for name in ("gate", "up", "router/kernel")},
        "layers/experts/up": {"layers/experts/down"},
        "norm/scale": {"head/kernel"},
    }


def test_layouts(table):
    assert table.weights["layers/q/kernel"].lead == (3,)
    assert (table.weights["layers/q/kernel"].k, table.weights["layers/q/kernel"].n) == (D, HEADS * HEAD)
    assert (table.weights["layers/o/kernel"].k, table.weights["layers/o/kernel"].n) == (HEADS * HEAD, D)
    assert table.weights["layers/experts/down"].lead == (3, 4)


def test_served_by_the_modules_own_code(variables, quantized):
    qvariables, coverage = quantized
    tokens = some_tokens(9)
    got = jax.jit(awq.serve(Scanned()))(qvariables, tokens)
    assert distance(got, Scanned().apply(dense(qvariables), tokens)) < 2e-5
    assert {linear.path for linear in coverage.linears if linear.method == "float"} == {
        "layers/experts/router/kernel",
        "embed/embedding",
    }
    assert len(coverage.linears) == 10
    assert qvariables["params"]["layers"]["experts"]["down"].weight.packed.shape == (3, 4, INNER // 2, D)


def test_one_search_over_the_depth_is_a_search_for_each_layer(variables, stats, table, quantized):
    """Layer 1's scale of the stack is what the core verb finds for it alone."""
    from awq_jax.adapt import quantize_params

    outcome = quantize_params(variables["params"], stats, table, ROUTER)
    for instance, result in zip(table.instances(), outcome.results, strict=True):
        if instance.producer == "layers/norm1/scale":
            one = jax.tree.map(lambda leaf: leaf[1], stats[table.source[instance.sinks[0]]])
            kernels = [
                table.weights[path].matrix(variables["params"]["layers"][path.split("/")[1]]["kernel"])[1]
                for path in instance.sinks
            ]
            alone = search_scale(one, kernels, ROUTER.search, ROUTER.quant)
            np.testing.assert_allclose(result.losses[1], alone.losses, rtol=1e-4)
            np.testing.assert_allclose(result.scale[1], alone.scale, rtol=1e-5)
            return
    raise AssertionError("no such group")


def test_experts_have_scales_of_their_own(variables, stats, table):
    from awq_jax.adapt import quantize_params

    results = quantize_params(variables["params"], stats, table, ROUTER).results
    found = {i.producer: r for i, r in zip(table.instances(), results, strict=True)}
    assert found["layers/experts/up"].scale.shape == (3, 4, INNER)
    assert found["layers/norm2/scale"].scale.shape == (3, D)
    assert (found["layers/experts/up"].loss <= found["layers/experts/up"].rtn_loss).all()


def test_an_expert_that_no_token_reaches_is_counted(table, variables, stats):
    idle = "layers/experts/down"
    none = jax.tree.map(lambda leaf: leaf.at[:, 2].set(0), stats[idle])
    qvariables, coverage = awq.quantize(variables, {**stats, idle: none}, table, ROUTER)
    linear = next(linear for linear in coverage.linears if linear.path == idle)
    assert "25% of its layers or experts saw no token" in linear.reason
    assert jnp.isfinite(awq.serve(Scanned())(qvariables, some_tokens())).all()


def test_other_collections_and_keywords(rng):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = True):
            x = nn.BatchNorm(use_running_average=not train, name="bn")(x)
            return nn.Dense(16, name="out")(nn.Dropout(0.5, deterministic=not train)(x))

    x = jnp.asarray(rng.standard_normal((20, D)), jnp.float32)
    variables = Net().init(jax.random.key(0), x, train=False)
    table = awq.propose(Net(), variables, x, train=False)
    assert rules(table) == {"bn/scale": {"out/kernel"}}
    stats = awq.observe(Net(), variables, [x], table, train=False)
    qvariables, _ = awq.quantize(variables, stats, table, RECIPE)
    y = awq.serve(Net())(qvariables, x, train=False)
    assert distance(y, Net().apply(dense(qvariables), x, train=False)) < 1e-5
    rngs = {"dropout": jax.random.key(1)}
    y, updated = awq.serve(Net())(qvariables, x, mutable=["batch_stats"], rngs=rngs)
    wanted, expected = Net().apply(dense(qvariables), x, mutable=["batch_stats"], rngs=rngs)
    assert distance(y, wanted) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, updated, expected)


def test_partitioned_parameters_are_unboxed(rng):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(16, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))(x)

    x = jnp.asarray(rng.standard_normal((8, D)), jnp.float32)
    variables = Net().init(jax.random.key(0), x)
    table = awq.propose(Net(), variables, x)
    qvariables, _ = awq.quantize(variables, awq.observe(Net(), variables, [x], table), table, RECIPE)
    assert isinstance(qvariables["params"]["Dense_0"]["kernel"], QKernel)
    assert jnp.isfinite(awq.serve(Net())(qvariables, x)).all()


def test_without_params():
    with pytest.raises(ValueError, match=r"hold no 'params', only \['batch_stats'\]"):
        awq.propose(Scanned(), {"batch_stats": {}}, some_tokens())
