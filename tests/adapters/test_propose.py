# SPDX-License-Identifier: Apache-2.0
"""Groups in trees of any naming, and a proof that does not let a wrong one pass."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from awq_jax import adapt
from awq_jax import nnx as modules
from awq_jax.adapt import Group
from tests.adapters.models import D
from tests.adapters.served import rules


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((4, 10, D)), jnp.float32)


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape) * shape[0] ** -0.5, jnp.float32)


def test_a_sequence_of_modules(x):
    """A module's number says its place, not its layer."""
    linear = lambda i, *shape: nnx.Linear(*shape, rngs=nnx.Rngs(i))
    layers = nnx.RMSNorm(D, rngs=nnx.Rngs(0)), linear(1, D, 64), nnx.relu, linear(2, 64, D), jnp.tanh, linear(3, D, D)
    table = modules.propose(nnx.Sequential(*layers), x)
    assert rules(table) == {"layers/0/scale": {"layers/1/kernel"}, "layers/1/kernel": {"layers/3/kernel"}}
    assert {group.producer: group.bias for group in table.groups}["layers/1/kernel"] == "layers/1/bias"


def test_sequences_inside_layers(x):
    """The layer becomes a star, the place stays."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.mlp = nnx.Sequential(nnx.Linear(D, D, rngs=rngs), nnx.relu, nnx.Linear(D, D, rngs=rngs))

        def __call__(self, x):
            return x + self.mlp(x)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])

        def __call__(self, x):
            return self.blocks[1](self.blocks[0](x))

    table = modules.propose(Model(nnx.Rngs(0)), x)
    assert rules(table) == {"blocks/*/mlp/layers/0/kernel": {"blocks/*/mlp/layers/2/kernel"}}
    assert len(list(table.instances())) == 4


def test_a_list_of_pairs(rng, x):
    """Weights and biases without names: the bias is found by its size and by what happens."""
    shapes = ((D, 64), (64, 48), (48, D))
    params = [(normal(rng, *shape), normal(rng, shape[1], 1)[:, 0]) for shape in shapes]

    def mlp(params, x):
        *inner, (w, b) = params
        for v, c in inner:
            x = jax.nn.relu(x @ v + c)
        return x @ w + b

    table = adapt.propose(mlp, params, x)
    assert rules(table) == {"0/0": {"1/0"}, "1/0": {"2/0"}}
    assert {group.bias for group in table.groups if group.producer} == {"0/1", "1/1"}


def test_numbers_behind_names(rng, x):
    """As Linen names the modules of a loop."""
    block = lambda: {
        "RMSNorm_0": {"scale": jnp.exp(normal(rng, D, 1)[:, 0])},
        "Dense_0": {"kernel": normal(rng, D, D)},
        "Dense_1": {"kernel": normal(rng, D, D)},
        "Dense_2": {"kernel": normal(rng, D, D)},
    }
    params = {f"Block_{i}": block() for i in range(2)}

    def program(params, x):
        for p in params.values():
            h = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True)) * p["RMSNorm_0"]["scale"]
            x = x + (jnp.tanh(h @ p["Dense_0"]["kernel"]) * (h @ p["Dense_1"]["kernel"])) @ p["Dense_2"]["kernel"]
        return x

    assert rules(adapt.propose(program, params, x)) == {
        "Block_*/RMSNorm_0/scale": {"Block_*/Dense_0/kernel", "Block_*/Dense_1/kernel"},
        "Block_*/Dense_1/kernel": {"Block_*/Dense_2/kernel"},
    }


def test_equal_numbers_of_different_places(rng, x):
    """The first norm and the first kernel belong together; the second ones do not."""
    gain = lambda: jnp.exp(normal(rng, D, 1)[:, 0])
    params = {
        f"Block_{i}": {f"Norm_{j}": {"scale": gain()} for j in range(2)}
        | {f"Dense_{j}": {"kernel": normal(rng, D, D)} for j in range(4)}
        for i in range(2)
    }

    def program(params, x):
        for p in params.values():
            w = lambda j, p=p: p[f"Dense_{j}"]["kernel"]
            x = x + jnp.tanh((x * p["Norm_0"]["scale"]) @ w(0)) @ w(1)
            x = x + jnp.tanh((x * p["Norm_1"]["scale"]) @ w(2)) @ w(3)
        return x

    assert rules(adapt.propose(program, params, x)) == {
        "Block_*/Norm_0/scale": {"Block_*/Dense_0/kernel"},
        "Block_*/Norm_1/scale": {"Block_*/Dense_2/kernel"},
    }


def hidden_reader(params, x, weight: Any = 1.0):
    """What the gain scales is read by the residual too."""
    h = x * params["norm"]["gain"]
    return h @ params["fc"]["kernel"] + weight * h


WRONG = Group(producer="norm/gain", sinks=("fc/kernel",))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_small_mistakes_are_found_in_every_dtype(rng, x, dtype):
    """Powers of two round nothing, so what moves by a few percent is wrong in bfloat16 too."""
    params = {"norm": {"gain": jnp.ones(D)}, "fc": {"kernel": normal(rng, D, D)}}
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    program = lambda p, x: hidden_reader(p, x, weight=jnp.asarray(0.1, dtype))
    x = x.astype(dtype)
    table = adapt.propose(program, params, x)
    assert rules(table) == {}
    assert 0.06 < adapt.verify(program, params, (x,), table.with_groups(WRONG)) < 0.5


def test_gains_that_stand_for_one_more_prove_exactly(rng, x):
    """Also in bfloat16, where ``1 + gain`` of any gain would be rounded."""
    params = {"norm": {"gain": 0.1 * normal(rng, D, 1)[:, 0]}, "fc": {"kernel": normal(rng, D, D)}}
    params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, x))
    program = lambda p, x: (x * (1 + p["norm"]["gain"])) @ p["fc"]["kernel"]
    table = adapt.propose(program, params, x)
    assert {group.offset for group in table.groups} == {1.0}
    assert adapt.verify(program, params, (x,), table) == 0.0


@pytest.mark.parametrize("value", [-jnp.inf, jnp.nan])
def test_outputs_that_are_not_finite_prove_nothing(rng, x, value):
    """Masked logits are minus infinity, and the difference of two of them is no number."""
    params = {"norm": {"gain": jnp.ones(D)}, "fc": {"kernel": normal(rng, D, D)}}
    masked = lambda p, x: hidden_reader(p, x).at[:, 0].set(value)
    assert rules(adapt.propose(masked, params, x)) == {}
    with pytest.raises(ValueError, match="none of its outputs is finite"):
        adapt.propose(lambda p, x: hidden_reader(p, x) * value, params, x)


def test_what_proves_nothing_is_refused(rng, x):
    params = {"norm": {"gain": jnp.ones(D)}, "fc": {"kernel": normal(rng, D, D)}}
    with pytest.raises(ValueError, match="it returns no floating outputs; let it return logits"):
        adapt.propose(lambda p, x: jnp.argmax(hidden_reader(p, x), -1), params, x)
    params["fc"]["kernel"] = params["fc"]["kernel"].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="none of its outputs is finite, and 'fc/kernel' holds numbers that are not"):
        adapt.propose(hidden_reader, params, x)
