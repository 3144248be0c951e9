# SPDX-License-Identifier: Apache-2.0
"""Every family through fused products and the slot cache: the logits of its decoder as it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax.models.functional import forward
from awq_jax.serving.cache import SlotCache
from awq_jax.serving.fuse import fuse
from awq_jax.serving.model import last_logits, serving_decoder
from awq_jax_convert.hf import HFCheckpoint
from tests.models.families import TINY
from tests.tiny_models import rounding, save_oracle, some_tokens

pytestmark = pytest.mark.slow


# The long text: read at once, long factors turn the early keys too; token by token, short ones did. Two right answers.
STEADY = [row for row in TINY if row.id != "phi3-long-text"]


@pytest.fixture
def model(row, tmp_path):
    """(config, params, tokens, logits of the decoder as it is, what rounding may move them by)."""
    checkpoint = HFCheckpoint.open(save_oracle(row, tmp_path / "x").path)
    config, params = checkpoint.config, jax.tree.map(jnp.asarray, checkpoint.params())
    tokens = jnp.asarray(some_tokens(config.vocab_size))
    wanted = np.asarray(jax.jit(functools.partial(forward, config))(params, tokens))
    return config, params, tokens, wanted, rounding(config) * np.abs(wanted).max()


@pytest.mark.parametrize("row", TINY, ids=lambda row: row.id)
def test_fused_and_cached_logits_are_the_decoder_s(row, model):
    config, params, tokens, wanted, bound = model

    @jax.jit
    def served(params):
        cache = SlotCache.empty(config, *tokens.shape)
        return serving_decoder(config, params)(tokens, cache=cache)[0]

    assert np.abs(np.asarray(served(fuse(params))) - wanted).max() <= bound


@pytest.mark.parametrize("row", STEADY, ids=lambda row: row.id)
def test_token_by_token_they_are_the_same(row, model):
    config, params, tokens, wanted, bound = model

    @jax.jit
    def token_by_token(params):
        decoder = serving_decoder(config, params)

        def one(cache, token):
            logits, cache = last_logits(decoder, token[:, None], cache, jnp.zeros(token.shape, jnp.int32))
            return cache, logits

        return jax.lax.scan(one, SlotCache.empty(config, *tokens.shape), tokens.T)[1]

    assert np.abs(np.swapaxes(token_by_token(fuse(params)), 0, 1) - wanted).max() <= bound
