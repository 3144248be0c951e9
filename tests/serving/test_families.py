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


@pytest.mark.parametrize("row", TINY, ids=lambda row: row.id)
def test_fused_and_cached_logits_are_the_decoder_s(row, tmp_path):
    checkpoint = HFCheckpoint.open(save_oracle(row, tmp_path / "x").path)
    config, params = checkpoint.config, jax.tree.map(jnp.asarray, checkpoint.params())
    tokens = jnp.asarray(some_tokens(config.vocab_size))

    @functools.partial(jax.jit, static_argnums=0)
    def served(config, params):
        cache = SlotCache.empty(config, *tokens.shape)
        return serving_decoder(config, params)(tokens, cache=cache)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def token_by_token(config, params):
        model = serving_decoder(config, params)

        def one(cache, token):
            logits, cache = last_logits(model, token[:, None], cache, jnp.zeros(token.shape, jnp.int32))
            return cache, logits

        return jax.lax.scan(one, SlotCache.empty(config, *tokens.shape), tokens.T)[1]

    wanted = np.asarray(jax.jit(functools.partial(forward, config))(params, tokens))
    bound = rounding(config) * np.abs(wanted).max()
    assert np.abs(np.asarray(served(config, fuse(params))) - wanted).max() <= bound
    if (
        row.id == "phi3-long-text"
    ):  # all at once the long factors turn early keys too, token by token the short ones did
        return
    assert np.abs(np.swapaxes(token_by_token(config, fuse(params)), 0, 1) - wanted).max() <= bound
