# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import QTensor, QuantSpec, dequantize, quantize
from awq_jax._tree import leaves, put
from awq_jax.families import FAMILIES
from awq_jax.models import Decoder, KVCache, generate, params_of
from awq_jax_convert.hf import HFCheckpoint
from tests.models.families import TINY
from tests.tiny_models import logits_of, rounding, save_oracle, some_tokens

NEW = 32  # prompt and continuation fit the 64 positions of the tiny models
PROMPT = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny model with a window: its cache must forget as well as remember."""
    (row,) = (row for row in TINY if row.id == "mistral-window")
    return opened(HFCheckpoint.open(save_oracle(row, tmp_path_factory.mktemp("model")).path))


def opened(checkpoint):
    return Decoder.from_params(checkpoint.config, jax.tree.map(jnp.asarray, checkpoint.params()))


def prompts(model, batch=2, length=PROMPT):
    return jnp.asarray(some_tokens(model.config.vocab_size, batch, length))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_pytorch(family, tmp_path):
    row = next(row for row in TINY if row.family == family)  # the other rows' caches are tested below
    oracle = save_oracle(row, tmp_path / "x")
    checkpoint = HFCheckpoint.open(oracle.path)
    prompt = some_tokens(checkpoint.config.vocab_size, length=PROMPT)
    got = generate(opened(checkpoint), jnp.asarray(prompt), max_new_tokens=NEW)
    assert got.shape == (2, NEW)
    np.testing.assert_array_equal(got, oracle.generate(prompt, NEW))


def assert_cached_as_whole(config, params, pieces):
    """Logits of a sequence given to a cache piece by piece are those of the whole sequence without one."""
    tokens = some_tokens(config.vocab_size, length=sum(pieces))
    whole = logits_of(config, params, tokens)
    step = jax.jit(lambda params, part, cache: Decoder.from_params(config, params)(part, cache=cache))
    # Longer than the sequence: the empty rest must not be seen.
    cache, seen = KVCache.empty(config, batch=2, max_len=sum(pieces) + 3), []
    for part in np.split(tokens, np.cumsum(pieces)[:-1], axis=1):
        logits, cache = step(params, jnp.asarray(part), cache)
        seen.append(logits)
    np.testing.assert_array_equal(cache.lengths, [sum(pieces)] * 2)
    assert np.abs(np.concatenate(seen, axis=1) - whole).max() <= rounding(config) * np.abs(whole).max()


def test_a_cache_changes_nothing(checkpoint):
    assert_cached_as_whole(checkpoint.config, checkpoint.params(), (14, 5, 5))


@pytest.mark.parametrize("pieces", [(24,), (1,) * 24, (3, 17, 4)])
def test_pieces_of_any_length_cross_the_window(model, pieces):
    assert_cached_as_whole(model.config, params_of(model), pieces)


def test_a_batch_is_its_rows(model):
    prompt = prompts(model)
    together = generate(model, prompt, max_new_tokens=NEW)
    for row, tokens in zip(prompt, together, strict=True):
        np.testing.assert_array_equal(generate(model, row[None], max_new_tokens=NEW)[0], tokens)


def test_one_token_is_the_first_of_many(model):
    prompt = prompts(model)
    long = generate(model, prompt, max_new_tokens=NEW)
    np.testing.assert_array_equal(generate(model, prompt, max_new_tokens=1), long[:, :1])


def test_a_stopped_sequence_repeats_its_stop_and_the_others_go_on(model):
    prompt = prompts(model)
    free = np.asarray(generate(model, prompt, max_new_tokens=NEW))
    stop = int(next(token for token in free[0] if token not in free[1]))
    at = int(np.argmax(free[0] == stop))
    stopped = np.asarray(generate(model, prompt, max_new_tokens=NEW, stop_tokens=(stop,)))
    np.testing.assert_array_equal(stopped[0, : at + 1], free[0, : at + 1])
    assert (stopped[0, at:] == stop).all()
    np.testing.assert_array_equal(stopped[1], free[1])


def test_all_sequences_may_stop_at_different_places(model):
    prompt = prompts(model)
    free = np.asarray(generate(model, prompt, max_new_tokens=NEW))
    stops = (int(free[0, 3]), int(free[1, 6]))
    stopped = np.asarray(generate(model, prompt, max_new_tokens=NEW, stop_tokens=stops))
    for row, plain in zip(stopped, free, strict=True):
        at = int(np.argmax(np.isin(plain, stops)))
        np.testing.assert_array_equal(row[: at + 1], plain[: at + 1])
        assert (row[at:] == plain[at]).all()


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_from_one_token_is_greedy(model, options):
    prompt = prompts(model)
    drawn = generate(model, prompt, max_new_tokens=NEW, temperature=1.5, key=jax.random.key(7), **options)
    np.testing.assert_array_equal(drawn, generate(model, prompt, max_new_tokens=NEW))


def test_the_key_decides_what_is_drawn(model):
    draw = functools.partial(generate, model, prompts(model), max_new_tokens=NEW, temperature=1.0)
    first = draw(key=jax.random.key(0))
    np.testing.assert_array_equal(first, draw(key=jax.random.key(0)))
    assert not np.array_equal(first, draw(key=jax.random.key(1)))


def quantized_and_dense(params):
    """Every linear of the layers quantized, and the dense tree of the same values."""
    quantized = dense = params
    for path, kernel in leaves(params):
        if path.startswith("layers/") and path.endswith("/kernel"):
            weight = quantize(jnp.asarray(kernel), QuantSpec(group_size=4))
            quantized, dense = put(quantized, path, weight), put(dense, path, dequantize(weight))
    return quantized, dense


@pytest.mark.slow
def test_quantized_weights_generate_what_their_dense_values_do(tmp_path):
    (row,) = (row for row in TINY if row.id == "llama-biases-wide-heads")
    checkpoint = HFCheckpoint.open(save_oracle(row, tmp_path / "x").path)
    config = checkpoint.config
    quantized, dense = quantized_and_dense(checkpoint.params())
    assert sum(isinstance(leaf, QTensor) for _, leaf in leaves(quantized)) == 7 * config.num_layers
    tokens = some_tokens(config.vocab_size)
    got, wanted = (logits_of(config, params, tokens) for params in (quantized, dense))
    assert np.abs(got - wanted).max() <= rounding(config) * np.abs(wanted).max()
    models = (Decoder.from_params(config, jax.tree.map(jnp.asarray, params)) for params in (quantized, dense))
    got, wanted = (generate(model, prompts(model), max_new_tokens=NEW) for model in models)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens of at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p is 0.0; it must lie in \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p is nan"),
        ({"temperature": 1.0, "key": None}, "needs a random key"),
    ],
)
def test_refusals(model, options, said):
    with pytest.raises(ValueError, match=said):
        generate(model, prompts(model), **{"max_new_tokens": 4, "key": jax.random.key(0), **options})


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="need a prompt"):
        generate(model, jnp.zeros((1, 0), jnp.int32), max_new_tokens=1)
