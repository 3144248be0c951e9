# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from awq_jax import QuantSpec, adapt, quantize
from awq_jax.adapt.kernel import is_kernel
from awq_jax.train import apply_adapters, apply_updates, frozen_mask, init_adapters, merge_adapters
from tests.adapters.models import INNER, D, mlp, mlp_params
from tests.adapters.served import dense, distance, quantized

SERVED = adapt.serve(mlp)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(1).standard_normal((8, 10, D)), jnp.float32)


@pytest.fixture(scope="module")
def base(x):
    return quantized(mlp, mlp_params(), x)[1]


@pytest.fixture(scope="module")
def adapters(base):
    made = init_adapters(jax.random.key(0), base, rank=4)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32), made)


def loss(adapters, base, x):
    return jnp.mean(SERVED(apply_adapters(base, adapters), x) ** 2)


def test_new_adapters_change_nothing(x, base):
    fresh = init_adapters(jax.random.key(0), base, rank=4)
    assert {path: leaf["a"].shape for path, leaf in fresh.items()} == {
        "gate/w": (D, 4),
        "up/w": (D, 4),
        "down/w": (INNER, 4),
    }
    np.testing.assert_allclose(SERVED(apply_adapters(base, fresh), x), SERVED(base, x), rtol=1e-6, atol=1e-6)


def test_apart_is_merged(x, base, adapters):
    merged = merge_adapters(base, adapters)
    assert not any(map(is_kernel, jax.tree.leaves(merged, is_leaf=is_kernel)))
    assert distance(SERVED(apply_adapters(base, adapters), x), mlp(merged, x)) < 1e-5
    wanted = dense(base)["down"]["w"] + 4.0 * adapters["down/w"]["a"] @ adapters["down/w"]["b"]
    np.testing.assert_allclose(merged["down"]["w"], wanted, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_a_dense_base(x, base, adapters):
    """Oracle: the same loss with the base dequantized and the product written out, differentiated by jax alone."""
    stands_for = dense(base)

    def written_out(adapters):
        kernels = {
            path: stands_for[path.split("/")[0]]["w"] + 4.0 * leaf["a"] @ leaf["b"] for path, leaf in adapters.items()
        }
        swap = lambda name, leaf: {**leaf, "w": kernels[f"{name}/w"]} if "w" in leaf else leaf
        return jnp.mean(mlp({name: swap(name, leaf) for name, leaf in stands_for.items()}, x) ** 2)

    got, wanted = jax.grad(loss)(adapters, base, x), jax.grad(written_out)(adapters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, wanted)


@pytest.mark.parametrize("how", ["jit", "remat", "vmap", "scan", "shard_map", "grad in scan"])
def test_under_transformations(x, base, adapters, how):
    wanted = jax.grad(loss)(adapters, base, x)
    mean = lambda tree: jax.tree.map(lambda leaf: leaf.mean(0), tree)
    one = lambda batch: jax.grad(loss)(adapters, base, batch)
    if how == "jit":
        got = jax.jit(jax.grad(loss))(adapters, base, x)
    elif how == "remat":
        got = jax.grad(jax.checkpoint(loss))(adapters, base, x)
    elif how == "vmap":
        got = mean(jax.vmap(one)(x[:, None]))
    elif how == "scan":
        got = mean(jax.lax.scan(lambda _, batch: (None, one(batch)), None, x[:, None])[1])
    elif how == "grad in scan":
        total = lambda a: jax.lax.scan(lambda s, b: (s + loss(a, base, b), None), jnp.float32(0), x[:, None])[0] / 8
        got = jax.grad(total)(adapters)
    else:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        local = lambda a, b, x: jax.lax.pmean(loss(a, b, x), "data")
        total = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
        got = jax.jit(jax.grad(total))(adapters, base, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), got, wanted)


def test_training_beats_the_frozen_base_and_merging_keeps_it(x, base):
    """The adapters are taught to undo the rounding: the dense model's outputs are the target."""
    target = mlp(mlp_params(), x)
    distill = lambda adapters: jnp.mean((SERVED(apply_adapters(base, adapters), x) - target) ** 2)
    optimizer = optax.adam(1e-2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapters, state):
        update, state = optimizer.update(jax.grad(distill)(adapters), state)
        return optax.apply_updates(adapters, update), state

    adapters = init_adapters(jax.random.key(0), base, rank=8)
    before = float(distill(adapters))
    state = optimizer.init(adapters)
    for _ in range(150):
        adapters, state = step(adapters, state)
    assert float(distill(adapters)) < 0.5 * before
    merged = merge_adapters(base, adapters)
    _, again, coverage = quantized(mlp, merged, x)
    assert coverage.methods == {"awq": 3}
    assert distance(SERVED(again, x), mlp(merged, x)) < 0.2


def test_optax_masked_keeps_no_state_for_codes(base):
    mask = frozen_mask(base)
    assert mask["norm"]["gain"] is True
    assert not any(jax.tree.leaves(mask["down"]["w"]))
    state = optax.masked(optax.adam(1e-3), mask).init(base)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 0]
    assert sum(leaf.size for leaf in moments) == 2 * (D + INNER)  # of the gain and the bias


def test_a_masked_step_on_the_whole_tree(x, base):
    """Gradients of everything, an optimizer of what floats, the tree donated: codes come back as they were."""
    optimizer = optax.masked(optax.adam(1e-2), frozen_mask(base))
    of_tree = lambda params, x: jnp.mean((SERVED(params, x) - 1.0) ** 2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x):
        value, gradient = jax.value_and_grad(of_tree, allow_int=True)(params, x)
        update, state = optimizer.update(gradient, state, params)
        return apply_updates(params, update), state, value

    params = jax.tree.map(jnp.copy, base)
    state, values = optimizer.init(params), []
    for _ in range(5):
        params, state, value = step(params, state, x)
        values.append(float(value))
    assert values[-1] < values[0]
    jax.tree.map(np.testing.assert_array_equal, params["down"]["w"], base["down"]["w"])
    assert (params["norm"]["gain"] != base["norm"]["gain"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"match": "nothing/*"}, "no kernel matches nothing/\\*; kernels are"), ({"rank": 0}, "rank is 0")],
)
def test_mistakes(base, options, message):
    with pytest.raises(ValueError, match=message):
        init_adapters(jax.random.key(0), base, **options)
    with pytest.raises(ValueError, match="the adapter 'elsewhere/w' has no kernel among"):
        apply_adapters(base, {"elsewhere/w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}})


def test_stacked_layers_and_bare_qtensors(rng):
    """A scan over depth with a `QTensor` leaf, as core makes them: adapters have the leading axis too."""
    w = jnp.asarray(rng.standard_normal((3, D, D)) * D**-0.5, jnp.float32)
    params = {"w": quantize(w, QuantSpec(group_size=16))}
    x = jnp.asarray(rng.standard_normal((5, D)), jnp.float32)

    def deep(params, x):
        return jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, params["w"])[0]

    adapters = init_adapters(jax.random.key(0), params, rank=2)
    assert adapters["w"]["a"].shape == (3, D, 2)
    adapters["w"]["b"] = jnp.asarray(rng.standard_normal(adapters["w"]["b"].shape), jnp.float32)
    got = adapt.serve(deep)(apply_adapters(params, adapters), x)
    assert distance(got, deep(merge_adapters(params, adapters), x)) < 1e-5
    gradient = jax.grad(lambda a: adapt.serve(deep)(apply_adapters(params, a), x).sum())(adapters)
    assert gradient["w"]["a"].shape == (3, D, 2)
