# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax.models.sampling import sample

DRAWS = 4000


def draws(logits, **options):
    """How often each token is drawn."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, len(logits)))
    tokens = sample(rows, jax.random.key(3), **options)
    return np.bincount(np.asarray(tokens), minlength=len(logits))


def softmax(logits):
    e = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return e / e.sum()


def assert_drawn_from(counts, p):
    """Within five standard deviations of the binomial of every token; what has no probability never appears."""
    assert (counts[p == 0] == 0).all()
    assert (np.abs(counts - DRAWS * p) <= 5 * np.sqrt(DRAWS * p * (1 - p)) + 1e-9).all()


LOGITS = np.log([0.4, 0.05, 0.3, 0.2, 0.05])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature):
    assert_drawn_from(draws(LOGITS, temperature=temperature), softmax(LOGITS / temperature))


def test_temperature_zero_is_the_likeliest_token_and_needs_no_key(rng):
    logits = rng.standard_normal((6, 11)).astype(np.float32)
    np.testing.assert_array_equal(sample(jnp.asarray(logits), None), logits.argmax(1))


@pytest.mark.parametrize(("k", "kept"), [(1, [0]), (3, [0, 2, 3]), (5, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])])
def test_top_k_keeps_the_k_likeliest(k, kept):
    p = np.where(np.isin(np.arange(5), kept), np.exp(LOGITS), 0)
    assert_drawn_from(draws(LOGITS, temperature=1.0, top_k=k), p / p.sum())


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.1, [0]), (0.39, [0]), (0.41, [0, 2]), (0.85, [0, 2, 3]), (1.0, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, kept):
    p = np.where(np.isin(np.arange(5), kept), np.exp(LOGITS), 0)
    assert_drawn_from(draws(LOGITS, temperature=1.0, top_p=top_p), p / p.sum())


def test_top_p_is_of_what_top_k_left():
    """0.4 / (0.4 + 0.3) = 0.57 of the two that top_k keeps: enough for 0.5, although 0.4 of all would not be."""
    assert_drawn_from(draws(LOGITS, temperature=1.0, top_k=2, top_p=0.5), np.array([1.0, 0, 0, 0, 0]))


def test_rows_are_drawn_apart():
    rows = jnp.asarray([LOGITS, LOGITS[::-1]], jnp.float32)
    np.testing.assert_array_equal(sample(rows, jax.random.key(0), temperature=1.0, top_k=1), [0, 4])
