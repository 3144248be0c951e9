# SPDX-License-Identifier: Apache-2.0
"""The verbs on a plain tree and a function: no framework at all."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import QuantSpec, Recipe, RefineSpec, SearchSpec, adapt, rule
from awq_jax.adapt import Group
from awq_jax.adapt.kernel import QKernel
from tests.adapters.models import INNER, D, mlp, mlp_params
from tests.adapters.served import RECIPE, dense, distance, quantized, rules


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(1).standard_normal((2, 40, D)), jnp.float32)


@pytest.fixture(scope="module")
def table(x):
    return adapt.propose(mlp, mlp_params(), x)


@pytest.fixture(scope="module")
def stats(x, table):
    return adapt.observe(mlp, mlp_params(), [x[:1], x[1:]], table)


def test_proposed_by_experiment(table):
    assert rules(table) == {"norm/gain": {"gate/w", "up/w"}, "up/w": {"down/w"}}
    assert {group.producer: group.bias for group in table.groups} == {"norm/gain": None, "up/w": "up/b"}
    assert table.source == {"gate/w": "gate/w", "up/w": "gate/w", "down/w": "down/w"}
    assert "up/w" in str(table)
    assert "+ up/b" in str(table)


def test_statistics_are_of_what_the_weights_read(x, stats):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), mlp_params())
    wide = np.asarray(x, np.float64).reshape(-1, D)
    h = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + 1e-6) * p["norm"]["gain"]
    gate = h @ p["gate"]["w"]
    inner = gate / (1 + np.exp(-gate)) * (h @ p["up"]["w"] + p["up"]["b"])
    for path, read in (("gate/w", h), ("down/w", inner)):
        assert stats[path].count == 80
        np.testing.assert_allclose(stats[path].abs_sum, np.abs(read).sum(0), rtol=1e-5)
        scale = np.sqrt(np.outer((read**2).sum(0), (read**2).sum(0)))
        assert (np.abs(stats[path].gram - read.T @ read) <= 1e-5 * scale).all()


@pytest.mark.parametrize("without", ["identity", "scale"])
def test_served_is_what_the_kernels_stand_for(x, table, stats, without):
    alone = table.with_groups(Group(producer=None, sinks=("down/w",), reason="as an experiment"))
    qparams, coverage = adapt.quantize(mlp_params(), stats, alone, RECIPE, without_producer=without)
    got = jax.jit(adapt.serve(mlp))(qparams, x)
    assert distance(got, mlp(dense(qparams), x)) < 1e-5
    assert isinstance(qparams["down"]["w"], QKernel)
    assert (qparams["down"]["w"].inverse is None) == (without == "identity")
    by_path = {linear.path: linear for linear in coverage.linears}
    assert by_path.keys() == {"gate/w", "up/w", "down/w"}
    if without == "identity":
        assert by_path["down/w"].method == "rtn"
        assert by_path["down/w"].reason == "as an experiment"


def test_a_scale_beside_the_weight_never_loses_to_identity(x, table, stats):
    alone = table.with_groups(Group(producer=None, sinks=("down/w",), reason="as an experiment"))
    losses = {}
    for without in ("identity", "scale"):
        result = adapt.quantize_params(mlp_params(), stats, alone, RECIPE, without_producer=without).results[0]
        losses[without] = float(result.loss)
    assert losses["scale"] < losses["identity"]


def test_awq_is_nearer_than_rounding(x, table, stats):
    """On the inputs it was calibrated on, the sum of the groups' exact errors is lower, so here the output's is."""
    rtn = dataclasses.replace(RECIPE, search=SearchSpec(rules=(rule("identity"),), clip_ratios=()))
    errors = []
    for recipe in (RECIPE, rtn):
        qparams, _ = adapt.quantize(mlp_params(), stats, table, recipe)
        errors.append(float(jnp.sum((adapt.serve(mlp)(qparams, x) - mlp(mlp_params(), x)) ** 2)))
    assert errors[0] < 0.9 * errors[1]


def test_folding_any_scales_preserves_the_function(x, table):
    assert adapt.verify(mlp, mlp_params(), (x,), table) == 0.0  # powers of two round nothing


WRONG = {
    "a consumer is missing": (Group(producer="norm/gain", sinks=("up/w",)), Group(producer=None, sinks=("gate/w",))),
    "a nonlinearity between": (Group(producer="gate/w", sinks=("down/w",)),),
    "the bias is forgotten": (Group(producer="up/w", sinks=("down/w",)),),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_verify_finds_wrong_tables(x, table, mistake):
    assert adapt.verify(mlp, mlp_params(), (x,), table.with_groups(*WRONG[mistake])) > 0.01


def test_a_parameter_with_hidden_readers_is_not_folded_into(x):
    """The residual takes the normalised x: the inputs of gate and up follow the gain, and still it can't absorb."""

    def post_norm(params, x):
        h = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True)) * params["norm"]["gain"]
        return h + (jax.nn.silu(h @ params["gate"]["w"]) * (h @ params["up"]["w"])) @ params["down"]["w"]

    table = adapt.propose(post_norm, mlp_params(), x)
    assert "norm/gain" not in rules(table)
    reason = next(group.reason for group in table.groups if "gate/w" in group.sinks)
    assert "folding into norm/gain changes the outputs" in reason


def test_what_cannot_be_quantized_is_named(x):
    def program(p, x):
        return (x @ p["odd"]) @ p["fits"] + jnp.sum(p["both"]) * (x @ p["both"]) @ p["fits"]

    params = {"odd": jnp.ones((D, 4)), "fits": jnp.ones((4, 4)), "both": jnp.ones((D, 4))}
    table = adapt.propose(program, params, x)
    assert table.left == {"both": "also read by reduce_sum"}
    _, coverage = adapt.quantize(
        params, adapt.observe(program, params, [x], table), table, Recipe(quant=QuantSpec(group_size=-1))
    )
    assert {linear.path for linear in coverage.linears} == {"odd", "fits", "both"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            (("gate", QuantSpec(group_size=24)),),
            r"'gate/w'.*dimension 32 is not a multiple of group_size=24",
        ),
        ((("gates/*", None),), "override 'gates/\\*' matches no weight; weights are"),
    ],
)
def test_mistakes_are_named_before_any_work(table, stats, overrides, message):
    with pytest.raises(ValueError, match=message):
        adapt.quantize_params(mlp_params(), stats, table, dataclasses.replace(RECIPE, overrides=overrides))


@pytest.mark.parametrize(
    ("name", "value"),
    [("refine", RefineSpec()), ("propagate", "quantized"), ("search", SearchSpec(objective="block"))],
)
def test_what_needs_layers_is_refused(table, stats, name, value):
    with pytest.raises(ValueError, match=rf"Recipe.{name}\S* works layer by layer.* quantize_checkpoint has it"):
        adapt.quantize_params(mlp_params(), stats, table, dataclasses.replace(RECIPE, **{name: value}))


def test_every_method_works_on_a_tree(x, table, stats):
    """Error of the outputs on the calibration set falls from method to method; the report says which one each got."""
    errors, named = {}, {}
    for method in ("minmax", "awq", "gptq", "awq+gptq"):
        qparams, coverage = adapt.quantize(mlp_params(), stats, table, dataclasses.replace(RECIPE, method=method))
        errors[method] = float(jnp.sum((adapt.serve(mlp)(qparams, x) - mlp(mlp_params(), x)) ** 2))
        named[method] = {linear.method for linear in coverage.linears}
    assert errors["awq+gptq"] < errors["awq"] < errors["minmax"]
    assert errors["gptq"] < errors["minmax"]
    assert named["minmax"] == {"rtn"} and named["gptq"] == {"gptq"}
    assert named["awq+gptq"] == {"awq+gptq"} and named["awq"] == {"awq"}


def test_a_sink_left_in_float_is_scaled_all_the_same(x, table, stats):
    recipe = dataclasses.replace(RECIPE, overrides=(("gate", None),))
    qparams, coverage = adapt.quantize(mlp_params(), stats, table, recipe)
    assert isinstance(qparams["gate"]["w"], jax.Array)
    assert distance(adapt.serve(mlp)(qparams, x), mlp(mlp_params(), x)) < 0.2
    assert {linear.path: linear.method for linear in coverage.linears}["gate/w"] == "float"


def test_a_kernel_is_not_served_as_something_else(x, table, stats):
    qparams, _ = adapt.quantize(mlp_params(), stats, table, RECIPE)
    with pytest.raises(ValueError, match="'down/w' is quantized, but this program reads it by 'reduce_sum'"):
        adapt.serve(lambda p, x: p["down"]["w"].sum())(qparams, x)
    with pytest.raises(ValueError, match=r"'down/w' was quantized as 64 x 32.*multiplies by 32 x 64"):
        adapt.serve(lambda p, x: x @ p["down"]["w"].T)(qparams, x)


def test_unknown_groups_are_named(table):
    with pytest.raises(ValueError, match=r"group norm/gamma -> gate/w, up/w matches no weight; weights are"):
        list(table.with_groups(Group(producer="norm/gamma", sinks=("gate/w", "up/w"))).instances())
    half = dataclasses.replace(table, groups=table.groups[:1])
    with pytest.raises(ValueError, match="is in no group"):
        list(half.instances())


def test_every_verb_has_a_shape_without_weights(x, table):
    """What a quantization will make and take, from shapes alone."""
    shapes = jax.eval_shape(mlp_params)
    abstract = jax.ShapeDtypeStruct(x.shape, x.dtype)
    weights, _, _ = adapt.find_weights(mlp, shapes, abstract)
    assert weights.keys() == {"gate/w", "up/w", "down/w"}
    _, stats = jax.eval_shape(adapt.observing(mlp, table), shapes, abstract)
    made = jax.eval_shape(lambda p, s: adapt.quantize_params(p, s, table, RECIPE), shapes, stats).params
    assert made["down"]["w"].weight.packed.shape == (INNER // 2, D)
    y = jax.eval_shape(adapt.serve(mlp), made, abstract)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


def test_shared_weights_have_one_statistic(x):
    def twice(p, x):
        return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"])

    params = {"w": jnp.asarray(np.random.default_rng(2).standard_normal((D, D)) / 6, jnp.float32)}
    table, qparams, _ = quantized(twice, params, x)
    stats = adapt.observe(twice, params, [x], table)
    assert stats["w"].count == 2 * 80
    assert distance(adapt.serve(twice)(qparams, x), twice(dense(qparams), x)) < 1e-5


def test_one_step_quantizes_inside_jit(x, table):
    """The three verbs in one compiled program, as in a training step."""

    @jax.jit
    def step(params, x):
        y, stats = adapt.observing(mlp, table)(params, x)
        served = adapt.serve(mlp)(adapt.quantize_params(params, stats, table, RECIPE).params, x)
        return jnp.mean((served - y) ** 2), stats

    error, stats = step(mlp_params(), x)
    qparams, _ = adapt.quantize(mlp_params(), stats, table, RECIPE)
    wanted = jnp.mean((adapt.serve(mlp)(qparams, x) - mlp(mlp_params(), x)) ** 2)
    # Where rounding differs by an ulp between the two compilations, a code moves by one.
    np.testing.assert_allclose(error, wanted, rtol=0.05)
    for a, b in itertools.pairwise(stats.values()):
        assert a.count == b.count
