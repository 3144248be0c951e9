# SPDX-License-Identifier: Apache-2.0
"""The verbs on a plain tree and a function: no framework at all."""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import QuantSpec, Recipe, RefineSpec, SearchSpec, adapt, dequantize, rule
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
    with pytest.raises(ValueError, match=r"group norm/gamma -> gate/w, up/w has a producer that is no gain and no"):
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


def test_parameters_that_are_not_the_tables_are_named(x, table, stats):
    params = mlp_params()
    turned = params | {"down": {"w": params["down"]["w"].T}}
    with pytest.raises(ValueError, match=r"'down/w' has the shape \(32, 64\), and \(64, 32\) in the table"):
        adapt.quantize(turned, stats, table, RECIPE)
    for verb in (lambda p: adapt.observe(mlp, p, [x], table), lambda p: adapt.quantize(p, stats, table, RECIPE)):
        with pytest.raises(ValueError, match="the table's 'down/w' is not among the parameters"):
            verb({name: leaf for name, leaf in params.items() if name != "down"})
        with pytest.raises(ValueError, match=r"'gate/w' is quantized already.*merge_adapters\(params, \{\}\)"):
            verb(adapt.quantize(params, stats, table, RECIPE)[0])
    with pytest.raises(ValueError, match="'act' is a str"):
        adapt.propose(lambda p, x: mlp(p, x), params | {"act": "relu"}, x)


def test_statistics_that_do_not_fit_are_named(x, table, stats):
    with pytest.raises(ValueError, match="there are no statistics of 'down/w', which 'down/w' needs"):
        adapt.quantize(mlp_params(), {"gate/w": stats["gate/w"]}, table, RECIPE)
    with pytest.raises(ValueError, match=r"statistics that 'down/w' needs are \(32,\), not \(64,\)"):
        adapt.quantize(mlp_params(), {path: stats["gate/w"] for path in stats}, table, RECIPE)


def test_numbers_among_the_parameters(x):
    """Python floats are parameters as they are, and typed keys go through."""
    params = mlp_params() | {"scale": 0.5, "key": jax.random.key(0), "steps": 3}
    scaled = lambda p, x: mlp(p, x) * p["scale"]
    _, qparams, _ = quantized(scaled, params, x)
    assert distance(adapt.serve(scaled)(qparams, x), scaled(dense(qparams), x)) < 1e-5


def test_an_array_given_for_a_list_of_batches_is_pointed_out(rng, x):
    params = {"a": jnp.asarray(rng.standard_normal((D, D)), jnp.float32)}
    program = lambda p, batch: jnp.einsum("btd,dn->btn", batch, p["a"])
    table = adapt.propose(program, params, x)
    with pytest.raises(ValueError) as failed:
        adapt.observe(program, params, x, table)
    assert any("give [batches]" in note for note in failed.value.__notes__)


def test_a_weight_that_one_batch_alone_reads(rng, x):
    """Its statistics are of that batch, whichever came first."""
    params = {name: jnp.asarray(rng.standard_normal((D, D)), jnp.float32) for name in "ab"}
    program = lambda p, batch: batch["x"] @ p["a"] + (jnp.tanh(batch["y"]) @ p["b"] if "y" in batch else 0.0)
    batches = [{"x": x}, {"x": x, "y": x}]
    table = adapt.propose(program, params, batches[1])
    for order in (batches, batches[::-1]):
        stats = adapt.observe(program, params, order, table)
        assert {path: float(s.count) for path, s in stats.items()} == {"a": 160.0, "b": 80.0}


def test_a_stacked_weight_and_a_shared_one_that_read_the_same(rng, x):
    params = {"own": jnp.asarray(rng.standard_normal((3, D, D)) / 9, jnp.float32)}
    params["shared"] = params["own"][0] + 0.1

    def program(p, x):
        return jax.lax.scan(lambda h, own: (h + jnp.tanh(h @ own) + h @ p["shared"], None), x, p["own"])[0]

    table, qparams, _ = quantized(program, params, x)
    stats = adapt.observe(program, params, [x], table)
    assert stats["own"].count.tolist() == [80.0] * 3 and stats["shared"].count == 240
    assert distance(adapt.serve(program)(qparams, x), program(dense(qparams), x)) < 1e-5


def test_a_product_with_a_wider_result_keeps_it(rng, x):
    """bfloat16 in, float32 out, as heads ask for: oracle numpy in float64 on the kernel that the codes stand for."""
    params = {"w": jnp.asarray(rng.standard_normal((D, 64)), jnp.bfloat16)}
    dims = (((2,), (0,)), ((), ()))
    program = lambda p, x: jax.lax.dot_general(x, p["w"], dims, preferred_element_type=jnp.float32)
    narrow = x.astype(jnp.bfloat16)
    _, qparams, _ = quantized(program, params, narrow)
    got = adapt.serve(program)(qparams, narrow)
    kernel = dequantize(qparams["w"].weight)
    assert got.dtype == jnp.float32
    assert distance(got, np.asarray(narrow, np.float64) @ np.asarray(kernel, np.float64)) < 1e-5


class Layer(NamedTuple):
    """Fields in an order that is not the alphabet's."""

    w: jax.Array
    b: jax.Array


@pytest.mark.parametrize("names", [[f"block{end}" for end in ("", "-1", ".2")], range(12)], ids=["names", "twelve"])
def test_leaves_keep_their_places(rng, x, names):
    """Paths sort otherwise than the tree: 10 before 2, '-' before '/', and b before w."""
    layers = [Layer(jnp.asarray(rng.standard_normal((D, D)) / 9, jnp.float32), 0.1 * jnp.ones(D)) for _ in names]
    params = layers if isinstance(names, range) else dict(zip(names, layers, strict=True))

    def program(params, x):
        for i, layer in enumerate(params if isinstance(names, range) else params.values()):
            x = x + (1 + i) / 12 * jnp.tanh(x @ layer.w + layer.b)
        return x

    recipe = dataclasses.replace(RECIPE, method="minmax")
    table, qparams, _ = quantized(program, params, x, recipe=recipe)
    assert list(table.weights) == [f"{name}/w" for name in names]
    assert distance(adapt.serve(program)(qparams, x), program(dense(qparams), x)) < 1e-5
    assert adapt.verify(program, params, (x,), table) == 0.0


def test_every_kernel_is_in_the_report(rng, x):
    """Also those that no product reads, each with what does."""
    kernel = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 9, jnp.float32)
    names = ("conv_general_dilated", "ragged_dot_general", "cond", "custom_vjp_call", "dynamic_slice", "gather")
    params = {"product": kernel(D, D), "position": kernel(40, D)}
    params |= {"conv_general_dilated": kernel(3, D, D), "ragged_dot_general": kernel(2, D, D), "cond": kernel(D, D)}
    params |= {"custom_vjp_call": kernel(D, D), "dynamic_slice": kernel(3, D, D), "gather": kernel(9, D)}

    @jax.custom_vjp
    def linear(x, w):
        return x @ w

    linear.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, jnp.einsum("btd,btn->dn", r[0], g)))

    def program(p, x):
        x = x @ p["product"] + p["position"] + p["gather"][jnp.arange(40) % 9]
        numbers = ("NHC", "HIO", "NHC")
        x = x + jax.lax.conv_general_dilated(x, p["conv_general_dilated"], (1,), "SAME", dimension_numbers=numbers)
        x = x + linear(x, p["custom_vjp_call"])
        x = jax.lax.fori_loop(0, 3, lambda i, h: h + jnp.tanh(h @ p["dynamic_slice"][i]), x)
        x = jax.lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: -x @ w, p["cond"])
        flat = x.reshape(-1, D)
        return jax.lax.ragged_dot(flat, p["ragged_dot_general"], jnp.array([30, len(flat) - 30], jnp.int32))

    weights, left, _ = adapt.find_weights(program, params, x)
    assert weights.keys() == {"product"}
    assert {path: reason.split(" by ")[1] for path, reason in left.items()} == {name: name for name in names}


def test_groups_of_ones_own(x, table):
    alone = table.with_groups(Group(producer=None, sinks=("*/w",), reason="all of them"))
    assert {instance.sinks for instance in alone.instances()} == {("gate/w",), ("up/w",), ("down/w",)}
    taken = table.with_groups(Group(producer=None, sinks=("gate/w",)))
    assert adapt.verify(mlp, mlp_params(), (x,), taken) == 0.0  # up, left behind, is not scaled without it
    reason = next(group.reason for group in taken.groups if group.sinks == ("up/w",))
    assert "gate/w, which reads what norm/gain makes too, was put into another group" in reason
    for group, message in (
        (Group(producer="norm/gain", sinks=("gate/w", "up/v")), "matches no weight by 'up/v'"),
        (Group(producer="up/w", sinks=("up/w",)), "'up/w' can't absorb the scale of its own rows"),
    ):
        with pytest.raises(ValueError, match=message):
            list(table.with_groups(group).instances())
    with pytest.raises(ValueError, match="the table's 'up/c' is not among the parameters"):
        wrong = table.with_groups(Group(producer="up/w", sinks=("down/w",), bias="up/c"))
        adapt.observe(mlp, mlp_params(), [x], wrong)


def test_experts_with_norms_of_their_own(rng, x):
    """`vmap` over members: each has a gain and a scale."""
    params = {"gain": jnp.exp(jnp.asarray(rng.standard_normal((3, D)), jnp.float32))}
    params["w"] = jnp.asarray(rng.standard_normal((3, D, D)), jnp.float32)
    members = jax.vmap(lambda p, x: (x * p["gain"]) @ p["w"], in_axes=(0, None))
    table = adapt.propose(members, params, x)
    assert rules(table) == {"gain": {"w"}} and table.lead["gain"] == (3,)
    assert adapt.verify(members, params, (x,), table) == 0.0


def test_shapes_without_values_are_refused(x):
    with pytest.raises(ValueError, match=r"propose measures.*take layouts alone from adapt.find_weights"):
        adapt.propose(mlp, jax.eval_shape(mlp_params), x)
