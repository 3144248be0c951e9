# SPDX-License-Identifier: Apache-2.0
"""A step as a chain of products: the step that it stands for, and which models are none.

Here no product has a kernel, so both steps compute the same but for rounding, of float32 or of bfloat16.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import QuantSpec, quantize
from awq_jax._tree import nested, put
from awq_jax.models import DecoderConfig, param_shapes
from awq_jax.serving.arrange import arranged
from awq_jax.serving.cache import SlotCache
from awq_jax.serving.chain import is_chain
from awq_jax.serving.fuse import fuse
from awq_jax.serving.model import last_logits, serving_decoder
from awq_jax_kernels.int4_matmul.tiles import is_tiled


def step(config, params, tokens, length=7, dtype=jnp.float32):
    """Logits and caches of one token for each row, behind random positions."""
    cache = SlotCache.empty(config, len(tokens), 16, dtype)
    rng = np.random.default_rng(0)
    some = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * (40 if leaf.dtype == jnp.int8 else 1), leaf.dtype)
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


TINY = DecoderConfig(
    vocab_size=256, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64
)
CHAINS = {
    "as it is": {},
    "biases of q, k and v": {"qkv_bias": True},
    "a tied head": {"tie_embeddings": True},
    "gains less one": {"norm_offset": 1.0, "scale_embedding": True, "activation": "gelu_tanh"},
    "caps and a scale of its own": {"attn_softcap": 5.0, "logit_softcap": 3.0, "query_scalar": 100.0},
    "windows": {"sliding_window": 3, "sliding_layers": (True, False), "local_rope_theta": 100.0},
    "learned positions": {"positions": "learned", "embed_norm": True},
}
OTHERS = {
    "biases of o": {"o_bias": True},
    "biases of the MLP": {"mlp_bias": True},
    "norms of heads": {"qk_norm": "head"},
    "norms of all heads": {"qk_norm": "all"},
    "norms behind": {"norm_placement": "after"},
    "norms around": {"norm_placement": "both"},
    "both from one stream": {"parallel": True},
    "both from one norm": {"parallel": True, "one_norm": True},
    "means taken out": {"norm": "layer"},
    "half turned": {"rotary_fraction": 0.5},
    "slopes": {"positions": "alibi"},
    "no gate": {"gated": False},
    "another activation": {"activation": "gelu"},
    "experts": {"num_experts": 4, "experts_per_token": 2, "expert_size": 128},
}


def weights(config, *, bits=4, group_size=128, dtype=jnp.float32):
    """Random parameters, fused, the layers' kernels quantized; gains and biases random as well."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        name = path.rpartition("/")[2]
        wide = rng.standard_normal(shape) * (shape[-2] ** -0.5 if len(shape) > 1 else 0.3)
        made = jnp.asarray(wide + (name == "scale" and 1 - config.norm_offset), dtype)
        is_linear = name == "kernel" and len(shape) == 2 and path.startswith("layers/") and shape[-1] > 8
        return quantize(made, QuantSpec(bits=bits, group_size=group_size)) if is_linear else made

    return fuse(nested((path, leaf(path, shape)) for path, shape in param_shapes(config).items()))


def both_steps(config, params, rows=3, bound=2e-4, **cache):
    """Whether tiles make it a chain, and that it computes the step of the same weights as they are stored."""
    tiled, tokens = arranged(params, jnp.bfloat16, "gpu"), jnp.arange(rows)[:, None] * 37 % config.vocab_size
    logits, after = step(config, tiled, tokens, **cache)
    wanted, wanted_after = step(config, params, tokens, **cache)
    wide = lambda x: np.asarray(x, np.float32)
    scale = np.abs(wide(wanted)).max()
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all() and scale > 0
    np.testing.assert_allclose(wide(logits), wide(wanted), atol=bound * scale, rtol=0)
    # An int8 code may be the next one.
    close = lambda a, b: np.testing.assert_allclose(wide(a), wide(b), atol=1.01 if a.dtype == jnp.int8 else bound * 4)
    jax.tree.map(close, after, wanted_after)
    h = jnp.zeros((rows, 1, config.hidden_size), params["embed"]["embedding"].dtype)
    return is_chain(serving_decoder(config, tiled), h)


def quick(*names, among):
    """Those of them that are no slow tests."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in among]


@pytest.mark.parametrize("name", quick("biases of q, k and v", "gains less one", "windows", among=[*CHAINS, *OTHERS]))
def test_every_build_computes_its_step(name):
    config = dataclasses.replace(TINY, **{**CHAINS, **OTHERS}[name])
    assert both_steps(config, weights(config)) == (name in CHAINS)


@pytest.mark.parametrize("rows", quick(9, 33, among=[1, 2, 7, 8, 9, 31, 32, 33]))
def test_every_number_of_rows(rows):
    assert both_steps(TINY, weights(TINY), rows) == (rows <= 32)


@pytest.mark.slow
@pytest.mark.parametrize("bits, group_size", [(2, 128), (3, 64), (4, 32)])
def test_other_widths_and_groups(bits, group_size):
    assert both_steps(TINY, weights(TINY, bits=bits, group_size=group_size))


def test_an_int8_cache():
    assert both_steps(TINY, weights(TINY), dtype=jnp.int8, bound=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab", [256, 200])
def test_a_head_that_is_quantized(tied, vocab):
    """Its own, or a copy of a tied embedding; 200 columns are no tiles."""
    config = dataclasses.replace(TINY, tie_embeddings=tied, vocab_size=vocab)
    params = weights(config)
    kernel = quantize(params["embed"]["embedding"].T if tied else params["lm_head"]["kernel"], QuantSpec(group_size=64))
    params = {**params, "lm_head": {"kernel": kernel}}
    assert both_steps(config, params)
    assert is_tiled(arranged(params, jnp.bfloat16, "gpu")["lm_head"]["kernel"].packed) == (vocab == 256)


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"hidden_size": 192}, {"intermediate_size": 320}, {"head_dim": 48}])
def test_widths_that_are_no_tiles_are_no_chain(changed):
    config = dataclasses.replace(TINY, **changed)
    assert not both_steps(config, weights(config, group_size=64 if "head_dim" not in changed else 32))


def test_one_layer_that_is_dense_is_no_chain():
    params = weights(TINY)
    dense = jnp.ones((256, 128)) / 256
    assert not both_steps(TINY, put(params, "layers/1/mlp/down/kernel", dense))


def test_in_bfloat16_it_rounds_no_more_than_the_step():
    """Of each against float32: two layers, some ten roundings of half a place each on the way to a logit."""
    params = weights(TINY)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, params)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, narrow)
    tokens = jnp.arange(8)[:, None] * 5
    wanted, _ = step(TINY, exact, tokens)
    for tree in (narrow, arranged(narrow, jnp.bfloat16, "gpu")):
        logits, _ = step(TINY, tree, tokens, dtype=jnp.bfloat16)
        assert np.abs(logits - wanted).max() <= 10 * 2.0**-8 * np.abs(wanted).max()
