# SPDX-License-Identifier: Apache-2.0
"""A weight for drifted inputs is the least-squares one, from sums over tokens alone."""

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.methods.drift import merge_drift, observe_drift, realign


def streams(rng, tokens=4000, k=24):
    """Inputs of the float model, and the same after a systematic and a random drift."""
    x = rng.standard_normal((tokens, k)) @ rng.standard_normal((k, k))
    z = x @ (np.eye(k) + 0.1 * rng.standard_normal((k, k))) + 0.1 * rng.standard_normal((tokens, k))
    return x, z, rng.standard_normal((k, 7))


def drift_of(x, z, mask=None):
    x, z = jnp.asarray(x, jnp.float32), jnp.asarray(z, jnp.float32)
    return observe_drift(x, z, jnp.ones(len(x), bool) if mask is None else jnp.asarray(mask))


def test_it_is_the_least_squares_solution_up_to_damping(rng):
    x, z, w = streams(rng)
    found = np.asarray(realign(jnp.asarray(w, jnp.float32), drift_of(x, z)), np.float64)
    gram = z.T @ z
    ridge = 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram))
    wanted = np.linalg.solve(gram + ridge, z.T @ (x @ w) + ridge @ w)  # ridge regression towards w
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    before, after = (np.square(x @ w - z @ v).sum() for v in (w, found))
    assert after < 0.5 * before


def test_without_drift_the_weight_stays(rng):
    x, _, w = streams(rng)
    np.testing.assert_array_equal(realign(jnp.asarray(w, jnp.float32), drift_of(x, x)), w.astype(np.float32))


def test_batches_merge_and_padding_does_not_count(rng):
    x, z, w = streams(rng)
    whole = drift_of(x, z)
    parts = merge_drift(drift_of(x[:1500], z[:1500]), drift_of(x[1500:], z[1500:]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=0.2), parts, whole)
    mask = np.arange(5000) < 4000
    longer = [np.concatenate([a, np.full((1000, 24), 1e6)]) for a in (x, z)]
    padded = drift_of(longer[0], longer[1], mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=0.2), padded, whole)
    assert np.isfinite(np.asarray(realign(jnp.asarray(w, jnp.float32), padded))).all()


def test_statistics_that_are_not_finite_leave_the_weight(rng):
    x, z, w = streams(rng)
    z[3, 4] = np.nan
    np.testing.assert_array_equal(realign(jnp.asarray(w, jnp.float32), drift_of(x, z)), w.astype(np.float32))
