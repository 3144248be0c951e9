# SPDX-License-Identifier: Apache-2.0
"""Scales for int8 activations: what the search scores is the output error of what is computed, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import (
    QuantSpec,
    Recipe,
    RefineSpec,
    SearchSpec,
    SmoothSpec,
    dequantize,
    matmul,
    observe,
    quantize,
    search_scale,
)
from awq_jax import rule as named
from awq_jax._activations import Sample, input_step
from awq_jax._qtensor import QTensor, dequantize_tree
from awq_jax._search import candidate_scales

SEARCH = SearchSpec(rules=(SmoothSpec(alphas=(0.0, 0.5, 0.8)).rule,), clip_ratios=())
W8A8 = QuantSpec.w8a8()  # a float16 scale keeps the largest weight of a column, at 127.5 steps, from being a tie
K, N, TOKENS = 48, 20, 160


def problem(rng, outliers=4):
    """(inputs, two weights): a few channels of the inputs are thirty times as large, as planted."""
    x = rng.standard_normal((TOKENS, K))
    x[:, rng.choice(K, outliers, replace=False)] *= 30
    weights = [rng.standard_normal((K, n)) * 0.1 for n in (N, 8)]
    return jnp.asarray(x, jnp.float32), [jnp.asarray(w, jnp.float32) for w in weights]


def sample_of(x):
    return Sample(x, jnp.float32(len(x)))


def rounded64(x, step):
    """Activations as int8 stands for them, float64; divided in float32 as everywhere, so that ties fall alike."""
    x = np.asarray(x, np.float32)
    each = np.abs(x).max(1, keepdims=True) / np.float32(127) if step is None else np.float32(step)
    return np.clip(np.rint(x / each), -128, 127).astype(np.float64) * each


def error64(x, weights, t, activations, spec=W8A8):
    """``||X W - Q(X/t) Q(tW)||^2`` a token."""
    t = np.asarray(t, np.float32)
    scaled = np.asarray(x) / t
    step = np.abs(scaled).max() / np.float32(127) if activations == "tensor" else None
    lost = 0.0
    for w in weights:
        written = np.asarray(dequantize(quantize(w * t[:, None], spec)), np.float64)
        lost += np.sum((np.asarray(x, np.float64) @ np.asarray(w, np.float64) - rounded64(scaled, step) @ written) ** 2)
    return lost / len(x)


@pytest.mark.parametrize("activations", ["token", "tensor"])
def test_the_loss_of_every_candidate_is_the_error_of_what_is_computed(rng, activations):
    """The sample is all tokens here, so that both parts of the loss speak of the same ones."""
    x, weights = problem(rng)
    spec = dataclasses.replace(W8A8, activations=activations)
    stats = observe(x)
    found = jax.jit(search_scale, static_argnums=(2, 3))(stats, weights, SEARCH, spec, sample=sample_of(x))
    scales = jax.jit(candidate_scales, static_argnums=(2, 3))(stats, weights, SEARCH, spec)
    wanted = [error64(x, weights, t, activations) for t in scales]
    np.testing.assert_allclose(found.losses, wanted, rtol=1e-4)  # a code that falls the other way changes more
    assert int(found.index) == int(np.argmin(wanted)) > 0
    assert found.loss < 0.3 * found.rtn_loss


def test_a_mixed_group_counts_activations_where_they_are_rounded(rng):
    x, weights = problem(rng)
    floating = dataclasses.replace(W8A8, activations="float")
    found = search_scale(observe(x), weights, SEARCH, [W8A8, floating], sample=sample_of(x))
    one = error64(x, weights[:1], np.ones(K), "token")
    d = np.asarray(weights[1], np.float64) - np.asarray(dequantize(quantize(weights[1], floating)), np.float64)
    other = np.sum((np.asarray(x, np.float64) @ d) ** 2) / TOKENS
    np.testing.assert_allclose(float(found.rtn_loss), one + other, rtol=2e-3)


def test_masked_tokens_do_not_count(rng):
    x, weights = problem(rng)
    mask = rng.random(TOKENS) < 0.6
    rows = jnp.where(mask[:, None], x, 0.0)
    masked = search_scale(
        observe(x, jnp.asarray(mask)), weights, SEARCH, W8A8, sample=Sample(rows, jnp.float32(mask.sum()))
    )
    alone = search_scale(observe(x[mask]), weights, SEARCH, W8A8, sample=sample_of(x[mask]))
    np.testing.assert_allclose(masked.losses, alone.losses, rtol=1e-4)


def test_a_search_without_inputs_is_refused(rng):
    x, weights = problem(rng)
    with pytest.raises(ValueError, match="activations are int8: give a sample of inputs"):
        search_scale(observe(x), weights, SEARCH, W8A8)


def test_the_rule_is_the_papers(rng):
    x, weights = problem(rng)
    stats = observe(x)
    (_, t) = candidate_scales(stats, weights, SearchSpec(rules=(SmoothSpec(alphas=(0.5,)).rule,)), W8A8)
    top = np.abs(np.concatenate(weights, axis=1)).max(1)
    s = np.sqrt(np.abs(np.asarray(x)).max(0) / top)  # max|X|**a / max|W|**(1-a), equation 4
    np.testing.assert_allclose(t, s / np.sqrt(s.max() * s.min()), rtol=1e-5)
    assert named("smoothquant", n_grid=21) == SmoothSpec().rule


@pytest.mark.parametrize("activations", ["token", "tensor"])
def test_matmul_rounds_its_input_where_the_weight_says_so(rng, activations):
    x, (w, _) = problem(rng)
    weight = quantize(w, dataclasses.replace(W8A8, activations=activations))
    assert weight.activations == activations and weight.bits == 8 and weight.group_size == K
    step = None
    if activations == "tensor":
        step = np.abs(np.asarray(x)).max() / np.float32(127)
        weight = weight.with_input_scale(input_step(observe(x).abs_max))
    exact = rounded64(x, step) @ np.asarray(dequantize(weight), np.float64)
    np.testing.assert_allclose(jax.jit(matmul)(x, weight), exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
    tree = {"a": weight, "b": quantize(w, QuantSpec(group_size=16))}
    dense = dequantize_tree(tree)
    assert dense["a"] is weight and not isinstance(dense["b"], QTensor), "dense it would compute something else"


def test_columns_are_cut_and_joined_with_their_step(rng):
    x, (w, _) = problem(rng)
    weight = quantize(w, dataclasses.replace(W8A8, activations="tensor")).with_input_scale(jnp.float32(0.5))
    halves = [jax.tree.map(lambda leaf, at=at: leaf[:, at], weight) for at in (slice(0, 10), slice(10, N))]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *halves)
    jax.tree.map(np.testing.assert_array_equal, joined, weight)
    np.testing.assert_array_equal(jnp.concatenate([matmul(x, h) for h in halves], axis=1), matmul(x, weight))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantSpec(activations="row"), "'float', 'token' or 'tensor'"),
        (lambda: QuantSpec(activations="token"), "int8 activations multiply symmetric weights of 8 bits"),
        (lambda: dataclasses.replace(W8A8, group_size=128), "with group_size=128"),
        (lambda: Recipe(method="smoothquant"), r"quant=QuantSpec\.w8a8\(\)"),
        (lambda: Recipe(quant=W8A8), "'awq' scores weights alone"),
        (lambda: Recipe(method="gptq", overrides=(("*/o", W8A8),)), "'gptq' scores weights alone"),
        (lambda: Recipe(method="smoothquant", quant=W8A8, refine=RefineSpec()), "refinement"),
        (lambda: Recipe(method="smoothquant", quant=W8A8, propagate="quantized"), "propagate='quantized'"),
        (lambda: Recipe(method="smoothquant", quant=W8A8, search=SearchSpec(objective="block")), "block objective"),
        (lambda: SmoothSpec(alphas=()), "at least one number from 0 to 1"),
        (lambda: SmoothSpec(alphas=(1.5,)), "at least one number from 0 to 1"),
    ],
)
def test_what_does_not_go_together(make, message):
    with pytest.raises(ValueError, match=message):
        make()
