# SPDX-License-Identifier: Apache-2.0
"""Rounding with error feedback, against the optimal-brain-surgeon recursion in float64 and against its own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import QuantSpec, dequantize, observe, quantize
from awq_jax._qtensor import codes_of
from awq_jax._round import fit_grid
from awq_jax._spec import GPTQSpec
from awq_jax.methods import gptq

PLAIN = GPTQSpec(sweeps=0)
GPTQ = jax.jit(gptq, static_argnums=(2, 3))
SPECS = [QuantSpec(group_size=32), QuantSpec(bits=3, group_size=32, symmetric=True), QuantSpec(bits=2, group_size=-1)]
EIGHT = QuantSpec(bits=8, group_size=-1, symmetric=True)


def problem(rng, k=96, n=40, tokens=400):
    """Correlated inputs with channels of very different size, and heavy-tailed weights."""
    x = rng.standard_normal((tokens, k)) @ rng.standard_normal((k, k)) * np.exp(rng.standard_normal(k))
    w = rng.standard_t(4, (k, n))
    return jnp.asarray(w, jnp.float32), observe(jnp.asarray(x, jnp.float32)).gram


def output_error(w, q, gram):
    """``d' G d`` of every output, float64."""
    d = np.asarray(w, np.float64) - np.asarray(dequantize(q), np.float64)
    return np.einsum("in,ij,jn->n", d, np.asarray(gram, np.float64), d)


def surgeon(w, gram, grid, limits, how):
    """Codes by eliminating one row after the other from the inverse of H: no factorization, no blocks."""
    w, gram = np.array(w, np.float64), np.asarray(gram, np.float64)
    (scale, zero), k = grid, len(w)
    inverse = np.linalg.inv(gram + how.damping * np.mean(np.diag(gram)) * np.eye(k))
    codes = np.zeros_like(w)
    for i in np.argsort(-np.diag(gram), kind="stable") if how.order else range(k):
        codes[i] = np.clip(np.round(w[i] / scale[i]) + zero[i], *limits)
        error = (w[i] - (codes[i] - zero[i]) * scale[i]) / inverse[i, i]
        w -= np.outer(inverse[:, i], error)
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1.0  # the row is done; nothing reaches it any more
    return codes


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.bits}bit-g{s.group_size}-{s.symmetric}")
def test_the_codes_are_those_of_the_recursion(rng, spec, order):
    w, gram = problem(rng)
    how = GPTQSpec(order=order, sweeps=0)
    found = GPTQ(w, gram, spec, how)
    grid = fit_grid(w, spec)
    rows = [np.repeat(np.asarray(a, np.float64), 96 // len(a), axis=0) for a in (grid.scale, grid.zero)]
    half = 2 ** (spec.bits - 1)
    low, high = (8 - half, 7 + half) if spec.symmetric else (0, 2**spec.bits - 1)
    wanted = surgeon(w, gram, rows, (low, high), how)
    bound = output_error(w, quantize(w, spec), gram)
    loss = np.einsum("in,ij,jn->n", *(lambda d: (d, np.asarray(gram, np.float64), d))(w - (wanted - rows[1]) * rows[0]))
    helped = loss < bound * (1 - 1e-4)
    # A code at a tie may fall either way in float32, and then everything below it differs: two columns at most.
    same = (np.asarray(codes_of(found)) == wanted).all(0)
    assert helped.sum() > 20 and (~same[helped]).sum() <= 2


@pytest.mark.parametrize(
    ("spec", "how"),
    [
        (SPECS[0], PLAIN),
        (SPECS[1], GPTQSpec(order=False, sweeps=0)),
        (SPECS[2], GPTQSpec(damping=5.0, sweeps=1)),
        (SPECS[0], GPTQSpec(damping=1e-6)),
        (EIGHT, GPTQSpec(sweeps=1)),
    ],
)
def test_no_output_is_worse_than_nearest(rng, spec, how):
    w, gram = problem(rng)
    found, nearest = GPTQ(w, gram, spec, how), quantize(w, spec)
    errors, bounds = output_error(w, found, gram), output_error(w, nearest, gram)
    # The two losses are compared in float32; their difference may be wrong by its rounding.
    assert (errors <= bounds * (1 + 1e-4)).all()
    assert errors.sum() < 0.8 * bounds.sum()
    jax.tree.map(np.testing.assert_array_equal, found.scale, nearest.scale)


def test_each_sweep_lowers_the_error(rng):
    w, gram = problem(rng)
    spec = SPECS[1]
    errors = [output_error(w, GPTQ(w, gram, spec, GPTQSpec(sweeps=n)), gram).sum() for n in (0, 1, 2)]
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("how", [PLAIN, GPTQSpec()])
@pytest.mark.parametrize("gram", [jnp.eye(96), jnp.zeros((96, 96)), jnp.full((96, 96), jnp.nan)], ids=str)
def test_inputs_that_say_nothing_round_to_nearest(rng, gram, how):
    w, _ = problem(rng)
    jax.tree.map(np.testing.assert_array_equal, GPTQ(w, gram, SPECS[0], how), quantize(w, SPECS[0]))


def test_rows_that_saw_nothing_do_not_disturb_the_others(rng):
    w, gram = problem(rng)
    dead = jnp.arange(96) % 5 == 0
    gram = jnp.where(dead[:, None] | dead[None, :], 0.0, gram)
    found = GPTQ(w, gram, SPECS[0], PLAIN)
    assert np.isfinite(np.asarray(dequantize(found))).all()
    assert output_error(w, found, gram).sum() < 0.8 * output_error(w, quantize(w, SPECS[0]), gram).sum()
    untouched = (np.asarray(codes_of(found)) == np.asarray(codes_of(quantize(w, SPECS[0]))))[np.asarray(dead)]
    assert untouched.all()


def test_thresholds_are_those_that_were_given(rng):
    w, gram = problem(rng)
    ratio = jnp.asarray(rng.uniform(0.6, 1, (3, 40)), jnp.float32)
    np.testing.assert_array_equal(GPTQ(w, gram, SPECS[0], PLAIN, ratio).scale, quantize(w, SPECS[0], ratio).scale)


def test_outputs_are_independent(rng):
    w, gram = problem(rng)
    whole = GPTQ(w, gram, SPECS[0], PLAIN)
    part = GPTQ(w[:, 8:16], gram, SPECS[0], PLAIN)
    differ = (np.asarray(whole.packed)[:, 8:16] != np.asarray(part.packed)).any(0)
    assert differ.sum() <= 1  # a matrix product of another shape may sum in another order, and a tie falls


@pytest.mark.parametrize("fields", [{"damping": 0.0}, {"sweeps": -1}])
def test_spec_refuses(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        GPTQSpec(**fields)
