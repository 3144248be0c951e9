# SPDX-License-Identifier: Apache-2.0
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from awq_jax import nnx as awq
from awq_jax.adapt import find_weights
from tests.adapters.models import INNER, Block, D, Model, some_tokens
from tests.adapters.served import RECIPE, dense, distance, rules

README = pathlib.Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def model():
    return Model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def table(model):
    return awq.propose(model, some_tokens())


@pytest.fixture(scope="module")
def quantized(model, table):
    stats = awq.observe(model, [some_tokens(seed) for seed in range(3)], table)
    return awq.quantize(model, stats, table, RECIPE)


def test_groups_of_einsum_attention(table):
    block = "blocks/*/"
    assert rules(table) == {
        block + "norm1/scale": {block + f"attn/{name}/kernel" for name in "qkv"},
        block + "norm2/scale": {block + "up/kernel"},
        block + "attn/v/kernel": {block + "attn/o/kernel"},
    }
    tie = next(group.tie for group in table.groups if group.producer == block + "attn/v/kernel")
    assert (tie.kv_heads, tie.repeats) == (2, 2)
    alone = next(group for group in table.groups if group.producer is None)
    assert alone.sinks == (block + "down/kernel",)
    assert table.left == {"embed/embedding": "also read by gather"}


def test_the_result_is_a_module(model, quantized):
    served, coverage = quantized
    tokens = some_tokens(7)
    got = nnx.jit(lambda m, t: m(t))(served, tokens)
    wanted = awq.serve(model, dense(awq.params_of(served)))(tokens)
    assert distance(got, wanted) < 1e-5
    assert distance(got, model(tokens)) < 0.5
    assert coverage.methods["float"] == 1
    assert coverage.nbytes < 0.5 * coverage.dense_nbytes
    again = nnx.merge(*nnx.split(served))
    np.testing.assert_array_equal(again(tokens), served(tokens))


def test_the_dense_model_is_left_as_it_was(model, table, quantized):
    fresh = Model(nnx.Rngs(0))
    for a, b in zip(
        jax.tree.leaves(nnx.state(model, nnx.Param)), jax.tree.leaves(nnx.state(fresh, nnx.Param)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_other_state_is_carried_along(quantized):
    served, _ = quantized
    before = int(served.model.calls.get_value())
    step = nnx.jit(lambda m, t: m(t))
    step(served, some_tokens())
    step(served, some_tokens())
    assert int(served.model.calls.get_value()) == before + 2


def test_another_method_is_served(model, quantized):
    served, _ = quantized
    hidden = served.run(lambda m, t: m.blocks[0](m.embed(t)), some_tokens())
    assert hidden.shape == (4, 24, D)
    assert distance(hidden, model.blocks[0](model.embed(some_tokens()))) < 0.5


def test_gradients_reach_what_is_dense(quantized):
    served, _ = quantized
    graph, params, rest = nnx.split(served, nnx.Param, ...)
    flat = dict(nnx.to_flat_state(params))
    keys = next(k for k in flat if k[-2:] == ("norm", "scale"))

    def loss(gain):
        filled = [(k, v.replace(gain) if k == keys else v) for k, v in flat.items()]
        other = jax.tree.map(lambda leaf: leaf, rest)  # the model counts its calls: variables of this trace
        return jnp.mean(nnx.merge(graph, nnx.from_flat_state(filled), other)(some_tokens()) ** 2)

    gain = flat[keys].get_value()
    gradient = jax.grad(loss)(gain)
    direction = jnp.ones_like(gain) / jnp.sqrt(gain.size)
    step = 1e-2
    finite = (loss(gain + step * direction) - loss(gain - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(gradient, direction), finite, rtol=1e-2)


def test_keywords_and_variables_that_a_call_makes(rng):
    """Keywords reach the original's own code, and what it leaves behind is in the module afterwards."""

    class Keeper(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.dropout = nnx.Linear(D, D, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, *, deterministic=True):
            y = self.linear(x)
            self.last = nnx.Intermediate(y)
            return self.dropout(y, deterministic=deterministic)

    x = jnp.asarray(rng.standard_normal((4, D)), jnp.float32)
    model = Keeper(nnx.Rngs(0))
    table = awq.propose(model, x)
    served, _ = awq.quantize(model, awq.observe(model, [x], table), table, RECIPE)
    y = served(x, deterministic=True)
    np.testing.assert_array_equal(jax.tree.leaves(nnx.state(served, nnx.Intermediate))[0], y)
    assert (np.asarray(served(x, deterministic=False)) == 0).any()


def test_rematerialized_modules(rng):
    """`nnx.remat` hands a module through its function and out of it again."""

    class Deep(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def make(rngs):
                return nnx.Linear(D, D, rngs=rngs)

            self.first, self.stack = nnx.Linear(D, D, rngs=rngs), make(rngs)

        def __call__(self, x):
            apply = nnx.remat(lambda x, layer: x + jnp.tanh(layer(x)))
            return nnx.scan(apply, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(apply(x, self.first), self.stack)

    model, x = Deep(nnx.Rngs(0)), jnp.asarray(rng.standard_normal((4, D)), jnp.float32)
    graph, state = nnx.split(model)
    function = lambda params, x: nnx.merge(graph, params)(x)  # pyright: ignore[reportCallIssue]
    weights, left, _ = find_weights(function, state, x)
    lead = {path.removesuffix("/value"): layout.lead for path, layout in weights.items()}
    assert lead == {"first/kernel": (), "stack/kernel": (3,)}
    assert not left


def test_adapters_of_the_models_own_are_left_to_training(rng):
    """`nnx.LoRA` on an INT4 base, trained by `nnx.Optimizer` as it is on a dense one."""

    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.RMSNorm(D, rngs=rngs)
            self.linear = nnx.LoRA(D, 3, D, base_module=nnx.Linear(D, D, rngs=rngs), rngs=rngs)

        def __call__(self, x):
            return self.linear(self.norm(x))

    model, x = Adapted(nnx.Rngs(0)), jnp.asarray(rng.standard_normal((4, D)), jnp.float32)
    table = awq.propose(model, x)
    assert rules(table) == {"norm/scale": {"linear/base_module/kernel"}}
    served, _ = awq.quantize(model, awq.observe(model, [x], table), table, RECIPE)
    of = lambda served: jnp.mean((served(x) - 1.0) ** 2)
    gradient = nnx.grad(of, argnums=nnx.DiffState(0, nnx.LoRAParam))(served)
    assert [leaf.shape for leaf in jax.tree.leaves(gradient)] == [(D, 3), (3, D)]
    with pytest.raises(ValueError, match=r"is quantized already.*merge_adapters"):
        awq.observe(served, [x], table)
    again = awq.serve(served, dense(awq.params_of(served)))
    assert awq.propose(again, x) == table


@pytest.mark.slow
def test_scanned_blocks():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
        return Block(rngs)

    blocks = stack(nnx.Rngs(0))

    def call(blocks, x):
        turn = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return turn(x, blocks)

    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, D)), jnp.float32)
    table = awq.propose(blocks, x, call=call)
    assert rules(table)["norm1/scale"] == {f"attn/{name}/kernel" for name in "qkv"}
    stats = awq.observe(blocks, [x], table, call=call)
    assert stats["down/kernel"].gram.shape == (3, INNER, INNER)
    served, coverage = awq.quantize(blocks, stats, table, RECIPE, call=call)
    wanted = awq.serve(blocks, dense(awq.params_of(served)), call=call)(x)
    assert distance(nnx.jit(lambda m, x: m(x))(served, x), wanted) < 1e-5
    assert len(coverage.linears) == 6


def test_the_readme_says_it_in_five_lines(model):
    snippet = re.search(r"<!-- nnx -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert snippet is not None
    lines = [line for line in snippet[1].splitlines() if line.strip()]
    assert len(lines) == 5
    batches = [some_tokens(seed) for seed in range(2)]
    scope = {"model": model, "batches": batches, "tokens": batches[0], "recipe": RECIPE}
    exec(compile(snippet[1], str(README), "exec"), scope)
    assert distance(scope["logits"], model(batches[0])) < 0.5
