# SPDX-License-Identifier: Apache-2.0
"""A step as a chain of products: the step that it stands for, and which models are none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax.serving.arrange import arranged
from awq_jax.serving.cache import SlotCache
from awq_jax.serving.chain import is_chain
from awq_jax.serving.model import last_logits, serving_decoder


def step(config, params, tokens, length=7):
    """Logits and caches of one token for each row, behind random positions."""
    cache = SlotCache.empty(config, len(tokens), 16, jnp.float32)
    rng = np.random.default_rng(0)
    some = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
    k, v = jax.tree.map(some, (cache.k, cache.v))
    cache = SlotCache(k=k, v=v, lengths=cache.lengths + length)
    run = lambda params, tokens: last_logits(
        serving_decoder(config, params), tokens, cache, jnp.zeros(len(tokens), int)
    )
    return jax.jit(run)(params, tokens)


@pytest.fixture(scope="module")
def tiled(shipped):
    return arranged(shipped.packed, jnp.bfloat16, "gpu")


@pytest.mark.parametrize("rows", [1, 5, 32])
def test_a_chain_computes_the_step(shipped, tiled, rows):
    tokens = jnp.arange(rows)[:, None] * 37 % shipped.config.vocab_size
    logits, cache = step(shipped.config, tiled, tokens)
    wanted, wanted_cache = step(shipped.config, shipped.packed, tokens)
    np.testing.assert_allclose(logits, wanted, rtol=2e-4, atol=2e-4)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
    jax.tree.map(close, cache, wanted_cache)


def test_what_is_a_chain(shipped, tiled):
    rows = lambda b, t=1, dtype=jnp.float32: jnp.zeros((b, t, shipped.config.hidden_size), dtype)
    model = serving_decoder(shipped.config, tiled)
    assert is_chain(model, rows(1)) and is_chain(model, rows(32, dtype=jnp.bfloat16))
    assert not is_chain(model, rows(1, 2)), "two tokens"
    assert not is_chain(model, rows(33)), "more rows than the products take"
    assert not is_chain(model, rows(1, dtype=jnp.float16)), "rows could leave its range"
    assert not is_chain(serving_decoder(shipped.config, shipped.packed), rows(1)), "weights in the order that is stored"
    assert not is_chain(serving_decoder(shipped.config, tiled, "tp"), rows(1)), "sums over a mesh lie between"
    others = dataclasses.replace(shipped.config, activation="gelu")
    assert not is_chain(serving_decoder(others, tiled), rows(1)), "an activation that is not the products'"
