# SPDX-License-Identifier: Apache-2.0
"""A step as a chain of products: the step that it stands for, and which models are none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax._tree import leaves
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
    assert is_chain(serving_decoder(shipped.config, tiled), tokens)
    np.testing.assert_allclose(logits, wanted, rtol=2e-4, atol=2e-4)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
    jax.tree.map(close, cache, wanted_cache)


def test_what_is_no_chain(shipped, tiled):
    one, model = jnp.zeros((1, 1), int), functools.partial(serving_decoder, shipped.config)
    assert not is_chain(model(shipped.packed), one), "weights in the order that is stored"
    assert not is_chain(model(tiled), jnp.zeros((1, 2), int)), "two tokens"
    assert not is_chain(model(tiled), jnp.zeros((33, 1), int)), "more rows than the products take"
    assert not is_chain(serving_decoder(shipped.config, tiled, "tp"), one), "sums over a mesh lie between"
    others = dataclasses.replace(shipped.config, activation="gelu")
    assert not is_chain(serving_decoder(others, tiled), one), "an activation that is not the products'"
    dense = {path for path, _ in leaves(tiled) if path.endswith("down/kernel")}
    assert dense, "the shipped model has MLPs"
