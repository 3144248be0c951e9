# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode against transformers' PyTorch model, and against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from awq_jax.models import KVCache
from awq_jax.serving.cache import SlotCache
from awq_jax.serving.engine import Request, start_of
from awq_jax.serving.model import last_logits, serving_decoder
from awq_jax.serving.steps import NOTHING, decode, empty_slots, prefill

BUCKET, MAX_LEN = 64, 320


@pytest.fixture(scope="module")
def steps(shipped):
    """(begin, go on) of the shipped model, compiled."""
    jitted = functools.partial(jax.jit, donate_argnums=1)
    return (
        jitted(functools.partial(prefill, shipped.config)),
        jitted(functools.partial(decode, shipped.config), static_argnames=("steps", "span")),
    )


ROWS = 4  # of every batch, so that few programs are compiled


def begin(steps, shipped, requests, *, slots=None, first_row=0):
    """Slots with the requests in rows of their own, and their first tokens."""
    slots = slots or empty_slots(shipped.config, ROWS, MAX_LEN, dtype=jnp.float32)
    firsts = []
    for row, request in enumerate(requests, first_row):
        tokens = np.zeros((1, BUCKET), np.int32)
        tokens[0, : len(request.prompt)] = request.prompt
        length, row = np.array([len(request.prompt)], np.int32), np.array([row], np.int32)
        slots, first = steps[0](shipped.packed, slots, tokens, length, row, start_of(request))
        firsts += np.asarray(first).tolist()
    return slots, firsts


def answers(steps, shipped, requests, *, chunk=32, span=None, **options):
    """All tokens of each request."""
    slots, firsts = begin(steps, shipped, requests, **options)
    rows = [[first] for first in firsts]
    while np.asarray(slots.start.budget).any():
        slots, drawn = steps[1](shipped.packed, slots, steps=chunk, span=span)
        for row, tokens in enumerate(rows, options.get("first_row", 0)):
            tokens += [token for token in np.asarray(drawn)[row].tolist() if token != NOTHING]
    return rows


def test_greedy_tokens_are_those_of_transformers(steps, shipped, prompts):
    new = 256
    prompts = prompts[1:3]
    requests = [Request(prompt=prompt, max_new_tokens=new) for prompt in prompts]
    got = answers(steps, shipped, requests)
    oracle = shipped.oracle()
    torch.set_num_threads(1)  # more of them wait for each other on a busy machine
    for prompt, tokens in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt])
        wanted = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None
        )
        assert tokens == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_is_its_rows(steps, shipped, prompts, temperature):
    """Greedy or drawn: a row does not see its neighbours, nor where it lies."""
    options = {"max_new_tokens": 24, "temperature": temperature, "top_p": 0.9, "top_k": 50}
    requests = [Request(prompt=p, seed=7 + i, **options) for i, p in enumerate(prompts)]
    together = answers(steps, shipped, requests)
    for request, tokens in zip(requests, together, strict=True):
        assert answers(steps, shipped, [request], first_row=2) == [tokens]


def test_greedy_and_drawn_rows_share_a_batch(steps, shipped, prompts):
    greedy = Request(prompt=prompts[0], max_new_tokens=24)
    drawn = Request(prompt=prompts[0], max_new_tokens=24, temperature=1.0, seed=3)
    together = answers(steps, shipped, [greedy, drawn, greedy])
    assert together[0] == together[2] == answers(steps, shipped, [greedy])[0] != together[1]


def test_cached_logits_are_uncached_ones(shipped, prompts):
    """Token by token through the cache, and all at once."""
    tokens = jnp.array([prompts[-1]])
    size = tokens.shape[1]

    @jax.jit
    def both(params):
        model = serving_decoder(shipped.config, params)

        def one(cache, token):
            logits, cache = last_logits(model, token[:, None], cache, jnp.zeros(1, jnp.int32))
            return cache, logits

        _, stepwise = jax.lax.scan(one, SlotCache.empty(shipped.config, 1, size), tokens.T)
        held, _ = model(tokens, cache=KVCache.empty(shipped.config, 1, size))
        return jnp.swapaxes(stepwise, 0, 1), model(tokens), held

    stepwise, at_once, held = both(shipped.packed)
    bound = 1e-5 * jnp.abs(at_once).max()
    assert jnp.abs(stepwise - at_once).max() < bound and jnp.abs(held - at_once).max() < bound


def test_a_stop_token_ends_its_row_alone(steps, shipped, prompts):
    free = answers(steps, shipped, [Request(prompt=p, max_new_tokens=24) for p in prompts[:2]])
    stop = free[0][5]
    at = free[0].index(stop)
    requests = [Request(prompt=p, max_new_tokens=24, stop_tokens=(stop,)) for p in prompts[:2]]
    stopped = answers(steps, shipped, requests)
    assert stopped[0] == free[0][: at + 1]
    end = free[1].index(stop) + 1 if stop in free[1] else 24
    assert stopped[1] == free[1][:end]


def test_rows_end_at_their_budgets(steps, shipped, prompts):
    budgets = (1, 9, 4, 20)
    requests = [Request(prompt=p, max_new_tokens=n) for p, n in zip(prompts, budgets, strict=True)]
    got = answers(steps, shipped, requests)
    full = answers(steps, shipped, [Request(prompt=p, max_new_tokens=20) for p in prompts])
    assert got == [tokens[:n] for tokens, n in zip(full, budgets, strict=True)]


def test_several_dispatches_are_one_and_a_narrow_span_reads_what_matters(steps, shipped, prompts):
    requests = [Request(prompt=p, max_new_tokens=25) for p in prompts]
    assert answers(steps, shipped, requests, chunk=8, span=128) == answers(steps, shipped, requests)


def test_an_int8_cache_is_within_its_rounding(shipped, prompts):
    """Keys and values are rounded to 1/254 of their head's largest; logits move by a few times that."""
    tokens = jnp.array([prompts[-1]])

    @functools.partial(jax.jit, static_argnums=1)
    def logits(params, dtype):
        model = serving_decoder(shipped.config, params)
        cache = SlotCache.empty(shipped.config, 1, tokens.shape[1], dtype)
        return model(tokens, cache=cache)[0]

    exact, rounded = logits(shipped.packed, jnp.dtype("float32")), logits(shipped.packed, jnp.dtype("int8"))
    error = jnp.sqrt(jnp.mean((exact - rounded) ** 2) / jnp.mean(exact**2))
    assert 0 < error < 2 / 127


def test_a_slot_is_as_good_as_new_after_use(steps, shipped, prompts):
    long, short = Request(prompt=prompts[-1], max_new_tokens=30), Request(prompt=prompts[1], max_new_tokens=30)
    slots, _ = begin(steps, shipped, [long])
    slots, _ = steps[1](shipped.packed, slots, steps=32, span=None)
    assert answers(steps, shipped, [short], slots=slots) == answers(steps, shipped, [short])
