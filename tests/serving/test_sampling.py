# SPDX-License-Identifier: Apache-2.0
"""Rows drawn each by its own rule, against the one rule of `awq_jax.models.sampling`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax.models.sampling import sample
from awq_jax.serving.sampling import Sampling, draw

VOCAB = 50
RULES = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.6},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 1e-6},
]


def rows(rules, seeds):
    of = lambda name, default, dtype: jnp.array([rule.get(name, default) for rule in rules], dtype)
    return Sampling(
        temperature=of("temperature", 0, jnp.float32),
        top_k=of("top_k", 0, jnp.int32),
        top_p=of("top_p", 1, jnp.float32),
        seed=jnp.array(seeds, jnp.uint32),
    )


@pytest.mark.slow
def test_a_row_is_what_its_rule_draws_alone(rng):
    logits = jnp.asarray(rng.normal(size=(len(RULES), VOCAB)) * 3, jnp.float32)
    for trial in range(20):
        positions = jnp.full((len(RULES),), trial, jnp.int32)
        got = draw(logits, rows(RULES, range(len(RULES))), positions)
        for row, rule in enumerate(RULES):
            key = jax.random.fold_in(jax.random.key(row), trial)
            assert got[row] == sample(logits[row : row + 1], key, **rule)[0], rule


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0]])
def test_a_row_does_not_depend_on_its_place(rng, order):
    logits = jnp.asarray(rng.normal(size=(3, VOCAB)), jnp.float32)
    rules, seeds, at = RULES[1:4], np.array([5, 6, 7]), jnp.array([3, 9, 4])
    straight = draw(logits, rows(rules, seeds), at)
    turned = draw(logits[jnp.array(order)], rows([rules[i] for i in order], seeds[order]), at[jnp.array(order)])
    np.testing.assert_array_equal(straight[jnp.array(order)], turned)


def test_draws_follow_the_distribution():
    """4,000 draws of three tokens: each frequency within five standard deviations."""
    chance = np.array([0.6, 0.3, 0.1])
    count = 4000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(chance, jnp.float32)), (count, 3))
    drawn = draw(logits, rows([{"temperature": 1.0}] * count, range(count)), jnp.zeros((count,), jnp.int32))
    share = np.bincount(np.asarray(drawn), minlength=3) / count
    assert (np.abs(share - chance) < 5 * np.sqrt(chance * (1 - chance) / count)).all()
