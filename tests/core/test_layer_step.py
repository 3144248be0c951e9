# SPDX-License-Identifier: Apache-2.0
"""One layer's work: what the search finds is used only where it helps, and nothing that failed goes unnamed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from awq_jax import (
    QTensor,
    QuantSpec,
    Recipe,
    RefineSpec,
    SearchSpec,
    Tie,
    dequantize,
    plan_layers,
    plant_outliers,
    quantize,
    rule,
)
from awq_jax import _quantize as quantizing
from awq_jax import layer_step as stepping
from awq_jax._plan import LayerPlan
from awq_jax._tree import get, leaves, put
from awq_jax.families import FAMILIES
from awq_jax.layer_step import quantize_and_measure
from awq_jax.models import Decoder, DecoderConfig, params_of
from awq_jax.models.functional import block, part

CONFIG = DecoderConfig(
    vocab_size=11, hidden_size=64, intermediate_size=96, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16
)
CHUNKS, BATCH, TOKENS = 4, 2, 12
SPEC = QuantSpec(group_size=32, scale_dtype="float32")
SEARCH = SearchSpec(rules=(rule("paper", n_grid=5), rule("duo", n_grid=4)), clip_ratios=(0.9, 0.8))
BLOCK = jax.jit(block, static_argnums=0)
ROUND = jax.jit(quantizing.round_layer, static_argnums=1)
PART = jax.jit(part, static_argnums=(0, 1))


def plan_of(search: SearchSpec = SEARCH, **overrides: Any) -> LayerPlan:
    widths = {path: 64 for path in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up")} | {"mlp/down": 96}
    recipe = Recipe(quant=SPEC, search=search, **overrides)
    (plan,) = plan_layers(FAMILIES["llama"], recipe, 1, widths, Tie(kv_heads=2, repeats=2))
    return plan


PLAN = plan_of()


def a_layer(seed: int = 0) -> dict[str, Any]:
    """Random weights with salient channels, so that there is something to protect."""
    params = params_of(Decoder(CONFIG, rngs=nnx.Rngs(seed)))["layers"]["0"]
    return plant_outliers(params, PLAN, channels=3, factor=32.0, seed=seed)


@pytest.fixture
def inputs(rng):
    """(hidden, mask) as numpy, so that every run donates a copy of its own."""
    hidden = rng.standard_normal((CHUNKS, BATCH, TOKENS, 64)).astype(np.float32)
    mask = np.ones((CHUNKS, BATCH, TOKENS), bool)
    mask[1, 1, 7:] = False
    mask[3, 0, 2:] = False
    return hidden, mask


def step(params, inputs, plan=PLAN, measured=CHUNKS):
    hidden, mask = (jnp.array(leaf) for leaf in inputs)
    return quantize_and_measure(params, hidden, mask, config=CONFIG, plan=plan, measured=measured)


def flat(inputs):
    return tuple(jnp.asarray(leaf.reshape(-1, *leaf.shape[2:])) for leaf in inputs)


def output_error(params, quantized, inputs):
    """||block'(h) - block(h)||^2 / ||block(h) - h||^2 over the tokens that count, in float64."""
    hidden, mask = flat(inputs)
    dense = quantized
    for path, leaf in leaves(quantized):
        dense = put(dense, path, dequantize(leaf)) if isinstance(leaf, QTensor) else dense
    target, got = (np.asarray(BLOCK(CONFIG, p, hidden), np.float64)[mask] for p in (params, dense))
    return np.sum((got - target) ** 2) / np.sum((target - np.asarray(hidden, np.float64)[mask]) ** 2)


def assert_same_bits(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_the_errors_are_those_of_the_layers_output(inputs):
    params = a_layer()
    outcome = step(params, inputs)
    rounded = ROUND(params, PLAN)
    # Both errors are sums of squared float32 differences: about half the digits remain.
    np.testing.assert_allclose(outcome.rtn_error, output_error(params, rounded, inputs), rtol=1e-3)
    np.testing.assert_allclose(outcome.error, output_error(params, outcome.layer.params, inputs), rtol=1e-3)
    assert outcome.error < 0.5 * outcome.rtn_error  # planted channels of 32 times the rest: what AWQ is for
    for result in outcome.layer.results:
        assert result.loss <= result.rtn_loss


def test_the_float_output_goes_on_to_the_next_layer(inputs):
    params = a_layer()
    outcome = step(params, inputs)
    hidden, _ = flat(inputs)
    wanted = np.asarray(BLOCK(CONFIG, params, hidden)).reshape(outcome.hidden.shape)
    np.testing.assert_allclose(outcome.hidden, wanted, rtol=1e-5, atol=1e-5)


def test_every_linear_is_quantized_and_every_tap_counts_the_same_tokens(inputs):
    outcome = step(a_layer(), inputs)
    quantized = {path for path, leaf in leaves(outcome.layer.params) if isinstance(leaf, QTensor)}
    assert quantized == {f"{path}/kernel" for p in PLAN.groups for path, _, _ in p.quantized} and len(quantized) == 7
    assert set(outcome.tokens) == set(outcome.finite) == set(PLAN.taps)
    for tap in PLAN.taps:
        assert int(outcome.tokens[tap]) == inputs[1].sum() and bool(outcome.finite[tap])


def test_what_stands_on_padding_changes_nothing(inputs):
    hidden, mask = inputs
    outcome = step(a_layer(), inputs)
    other = np.where(mask[..., None], hidden, 100 - 3 * hidden)
    again = step(a_layer(), (other, mask))
    assert_same_bits(again.layer.params, outcome.layer.params)
    assert again.error == outcome.error


def test_chunks_are_one_calibration(inputs):
    hidden, mask = inputs
    parts = step(a_layer(), inputs)
    one = step(a_layer(), (hidden.reshape(1, -1, TOKENS, 64), mask.reshape(1, -1, TOKENS)), measured=1)
    np.testing.assert_allclose(parts.hidden.reshape(one.hidden.shape), one.hidden, rtol=1e-5, atol=1e-5)
    for a, b in zip(parts.layer.results, one.layer.results, strict=True):
        assert a.index == b.index
        # The same sums in another order move t by some eps; where that turns a tie, one code of a column of 64 differs.
        np.testing.assert_allclose(a.scale, b.scale, rtol=1e-5)
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-3)
    assert parts.tokens == one.tokens


def test_a_search_that_hurts_is_dropped_for_round_to_nearest(inputs, monkeypatch):
    def misled(*given):
        found = quantizing.quantize_layer(*given)
        down = found.params["mlp"]["down"]["kernel"]
        worse = put(found.params, "mlp/down/kernel", dataclasses.replace(down, scale=down.scale * 1.5))
        return dataclasses.replace(found, params=worse)

    monkeypatch.setattr(stepping, "quantize_layer", misled)
    plan = dataclasses.replace(PLAN, search=dataclasses.replace(SEARCH, clip_ratios=(0.7,)))  # compiled for itself
    params = a_layer()
    outcome = step(params, inputs, plan)
    assert outcome.error > outcome.rtn_error
    assert_same_bits(outcome.layer.params, ROUND(params, plan))


def test_activations_that_are_not_finite_leave_round_to_nearest(inputs):
    hidden, mask = inputs
    hidden[2, 0, 3, 5] = np.nan
    params = a_layer()
    outcome = step(params, (hidden, mask))
    assert not any(outcome.finite.values()) and np.isnan(outcome.error)
    for result in outcome.layer.results:
        assert result.index == 0
        np.testing.assert_array_equal(result.scale, np.ones_like(result.scale))
    assert_same_bits(outcome.layer.params, ROUND(params, PLAN))


def test_an_overflow_is_named_where_it_happens(inputs):
    params = a_layer()
    for name in ("mlp/gate/kernel", "mlp/up/kernel"):
        params = put(params, name, get(params, name) * 1e20)
    outcome = step(params, inputs)
    assert {tap: bool(finite) for tap, finite in outcome.finite.items()} == {
        "attn/q": True,
        "attn/o": True,
        "mlp/gate": True,
        "mlp/down": False,
    }
    assert outcome.layer.results[-1].index == 0
    for _, leaf in leaves(outcome.layer.params):
        assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in jax.tree.leaves(leaf))


@pytest.mark.slow
def test_the_block_objective_is_the_error_of_the_blocks_output(inputs):
    search = dataclasses.replace(SEARCH, objective="block", clip_ratios=())
    plan, params = plan_of(search), a_layer()
    outcome = step(params, inputs, plan)
    hidden, mask = flat(inputs)
    seen: dict[str, Any] = {}
    block(CONFIG, params, hidden, tap=lambda name, x: seen.update({name: x}))
    for group, result in zip(plan.groups, outcome.layer.results, strict=True):
        assert result.loss <= result.rtn_loss
        name = group.group.output
        if name is None:
            continue
        rounded = params
        for path, spec, _ in group.quantized:
            rounded = put(rounded, f"{path}/kernel", dequantize(quantize(get(params, path)["kernel"], spec)))
        target, got = (
            np.asarray(PART(CONFIG, name, p[name], seen[group.group.sinks[0]]), np.float64)[mask]
            for p in (params, rounded)
        )
        np.testing.assert_allclose(result.rtn_loss, np.sum((got - target) ** 2) / inputs[1].sum(), rtol=1e-3)
    assert outcome.error <= outcome.rtn_error


def test_layers_of_equal_shape_and_plan_compile_once(inputs):
    step(a_layer(0), inputs)
    compiled: Any = quantize_and_measure
    before = compiled._cache_size()
    for seed in (1, 2):
        step(a_layer(seed), inputs, plan_of())  # an equal plan, not the same object
    assert compiled._cache_size() == before
    step(a_layer(0), inputs, plan_of(overrides=(("layers/*/mlp/down", None),)))
    assert compiled._cache_size() == before + 1


@pytest.mark.slow
def test_refinement_lowers_the_layers_own_error_and_looks_at_no_padding(inputs):
    hidden, mask = inputs
    plan = plan_of(method="minmax", refine=RefineSpec(steps=30, rate=0.05))
    after = step(a_layer(), inputs, plan, measured=1)
    held = tuple(leaf[:1] for leaf in inputs)
    assert after.error < after.rtn_error  # which it started from
    np.testing.assert_allclose(after.error, output_error(a_layer(), after.layer.params, held), rtol=1e-3)
    assert after.layer.losses == (None,) * len(plan.groups)  # a group's own loss says nothing of it any more
    other = np.where(mask[..., None], hidden, 100 - 3 * hidden)
    assert_same_bits(step(a_layer(), (other, mask), plan, measured=1).layer.params, after.layer.params)


def test_an_override_leaves_a_weight_as_it_is(inputs):
    params, plan = a_layer(), plan_of(overrides=(("layers/*/mlp/down", None),))
    outcome = step(params, inputs, plan)
    np.testing.assert_array_equal(outcome.layer.params["mlp"]["down"]["kernel"], params["mlp"]["down"]["kernel"])
    assert outcome.layer.results[-1] is None and "mlp/down" not in outcome.finite
