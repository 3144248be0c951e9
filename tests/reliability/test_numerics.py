# SPDX-License-Identifier: Apache-2.0
"""Activations and weights at the ends of their ranges: the scale is finite and positive, or identity."""

import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import QuantSpec, SearchSpec, dequantize, observe, quantize, rule, search_scale

K, N, TOKENS = 64, 32, 96
SEARCH = SearchSpec(rules=(rule("paper", n_grid=5), rule("duo", n_grid=5), rule("article", n_grid=3)))
SPEC = QuantSpec(group_size=32)


def activations(rng: np.random.Generator, kind: str) -> np.ndarray:
    x = rng.standard_normal((TOKENS, K)).astype(np.float32)
    if kind == "dead channels":
        x[:, ::3] = 0
    elif kind == "all dead":
        x[:] = 0
    elif kind == "one huge channel":
        x[:, 5] *= 1e15
    elif kind == "1e-30 and 1e30":
        x[:, :8] *= 1e-30
        x[:, 8:16] *= 1e30  # its Gram matrix overflows
    elif kind == "tiny":
        x *= 1e-30  # its Gram matrix is zero
    elif kind == "NaN":
        x[3, 4] = np.nan
    elif kind == "infinite":
        x[3, 4] = np.inf
    return x


KINDS = ("dead channels", "all dead", "one huge channel", "1e-30 and 1e30", "tiny", "NaN", "infinite")


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_is_finite_positive_and_bounded_whatever_was_seen(rng: np.random.Generator, kind: str):
    x = activations(rng, kind)
    w = jnp.asarray(rng.standard_normal((K, N)), jnp.float32)
    found = search_scale(observe(jnp.asarray(x)), [w], SEARCH, SPEC)
    scale = np.asarray(found.scale)
    assert np.isfinite(scale).all() and (scale >= 1e-4).all() and (scale <= 1e4).all()
    losses = np.asarray(found.losses)
    assert not np.isnan(losses).any()
    assert losses[int(found.index)] == losses.min()
    if kind in ("NaN", "infinite", "1e-30 and 1e30"):  # nothing could be measured: identity
        assert int(found.index) == 0 and (scale == 1).all()


def test_a_dead_channel_is_left_alone(rng: np.random.Generator):
    x = activations(rng, "dead channels")
    w = jnp.asarray(rng.standard_normal((K, N)), jnp.float32)
    scale = np.asarray(search_scale(observe(jnp.asarray(x)), [w], SEARCH, SPEC).scale)
    assert (scale[::3] == 1).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 1e4])
def test_weights_within_the_range_of_the_stored_scale_come_back(rng: np.random.Generator, dtype: str, size: float):
    w = (rng.standard_normal((K, N)) * size).astype(np.float32)
    q = quantize(jnp.asarray(w), QuantSpec(group_size=32, scale_dtype=dtype))
    scale = np.asarray(q.scale).astype(np.float64)
    assert np.isfinite(scale).all() and (scale > 0).all()
    # Half a step, and what storing the scale moves the farthest of 15 codes by; below the smallest float16 all is zero.
    eps = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}[dtype]
    step = np.repeat(scale, 32, axis=0)
    bound = step * (0.5 + 15.5 * eps + 0.5)  # the zero's own rounding costs up to another half
    assert (np.abs(np.asarray(dequantize(q), np.float64) - w) <= bound * (1 + 1e-6)).all()
