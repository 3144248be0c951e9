# SPDX-License-Identifier: Apache-2.0
"""Perplexity, KL and agreement, against float64 numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax.evaluate import Evaluation, TextTooShort, TokenOutOfRange, cut_windows, evaluate, kl, perplexity

VOCAB = 13


def apply(params, tokens):
    """A bigram model: the logits of the next token are a row of a table."""
    return params[tokens]


@pytest.fixture
def models(rng):
    return tuple(jnp.asarray(rng.normal(size=(VOCAB, VOCAB)) * 3, jnp.float32) for _ in range(2))


@pytest.fixture
def windows(rng):
    return cut_windows(rng.integers(0, VOCAB, 100).tolist(), ctx=9, vocab_size=VOCAB)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_equals_float64(models, windows):
    base, model = models
    found = evaluate(apply, model, windows, base=(apply, base), batch=4)
    seen, following = windows[:, :-1], windows[:, 1:]
    log_p, log_b = log_softmax(model)[seen], log_softmax(base)[seen]
    nll = -np.take_along_axis(log_p, following[..., None], -1)[..., 0]
    spread = nll.mean(-1).std(ddof=1) / math.sqrt(len(windows))
    expected = Evaluation(
        perplexity=np.exp(nll.mean()),
        perplexity_stderr=np.exp(nll.mean()) * spread,
        kl=(np.exp(log_b) * (log_b - log_p)).sum(-1).mean(),
        top1=(log_p.argmax(-1) == log_b.argmax(-1)).mean(),
        tokens=nll.size,
    )
    np.testing.assert_allclose(dataclasses.astuple(found), dataclasses.astuple(expected), rtol=1e-5)


def test_a_model_agrees_with_itself(models, windows):
    found = evaluate(apply, models[0], windows, base=(apply, models[0]))
    assert found.kl == 0.0
    assert found.top1 == 1.0


@pytest.mark.parametrize("batch", [1, 3, 11, 64])
def test_batch_size_does_not_matter(models, windows, batch):
    whole = evaluate(apply, models[0], windows, base=(apply, models[1]), batch=11)
    found = evaluate(apply, models[0], windows, base=(apply, models[1]), batch=batch)
    np.testing.assert_allclose(dataclasses.astuple(found), dataclasses.astuple(whole), rtol=1e-6)


def test_one_compilation_serves_every_batch_and_every_model_of_one_shape(windows):
    traced = []

    def counted(params, tokens):
        traced.append(tokens.shape)
        return params[tokens]

    for seed in range(3):
        evaluate(counted, jax.random.normal(jax.random.key(seed), (VOCAB, VOCAB)), windows, batch=4)
    assert traced == [(4, 9)]


def test_short_forms(models, windows):
    base, model = ((apply, params) for params in models)
    found = evaluate(*model, windows, base=base)
    assert perplexity(*model, windows) == found.perplexity
    assert kl(base, model, windows) == found.kl


def test_bfloat16_logits_are_summed_in_float32(models, windows):
    half = models[0].astype(jnp.bfloat16)
    found = evaluate(apply, half, windows)
    np.testing.assert_allclose(found.perplexity, perplexity(apply, half.astype(jnp.float32), windows), rtol=1e-6)


def test_a_single_window_has_no_standard_error(models, windows):
    assert evaluate(apply, models[0], windows[:1]).perplexity_stderr is None


def test_progress_counts_windows(models, windows):
    seen = []
    evaluate(apply, models[0], windows, batch=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 11), (8, 11), (11, 11)]


def test_windows_are_cut_from_the_first_tokens():
    assert cut_windows(list(range(10)), ctx=3, tokens=8, vocab_size=10).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_too_short():
    with pytest.raises(TextTooShort, match=r"has 5 tokens.*ctx=6"):
        cut_windows([0] * 5, ctx=6, vocab_size=1)


@pytest.mark.parametrize("bad", [-1, 13])
def test_ids_outside_the_vocabulary(bad):
    with pytest.raises(TokenOutOfRange, match=rf"id {bad} is outside the model's vocabulary of 13"):
        cut_windows([0, 1, bad, 2], ctx=2, vocab_size=VOCAB)


def test_a_window_needs_two_tokens():
    with pytest.raises(ValueError, match="ctx=1"):
        cut_windows([0, 1], ctx=1, vocab_size=2)
