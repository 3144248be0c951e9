# SPDX-License-Identifier: Apache-2.0
"""Gram matrices of which only diagonal blocks are kept: what they leave out, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq_jax import QuantSpec, Recipe, SearchSpec, observe, quantize, rule, search_scale
from awq_jax._clip import search_clip
from awq_jax._gram import block_rows, diagonal_blocks, rescaled, times
from awq_jax._plan import plan_layers
from awq_jax._qtensor import dequantize
from awq_jax._search import gram_loss
from awq_jax._spec import GPTQSpec
from awq_jax.families import FAMILIES
from awq_jax.gram_memory import blocked, gram_bytes, with_gram_limit
from awq_jax.methods import gptq

TOKENS, K, N, G = 96, 64, 24, 8
SPEC = QuantSpec(group_size=G, scale_dtype="float32")


@given(
    groups=st.integers(1, 96),
    g=st.sampled_from([2, 8, 128]),
    limit=st.integers(0, 1 << 30),
    copies=st.sampled_from([1, 8]),
)
def test_blocks_are_the_largest_that_fit(groups: int, g: int, limit: int, copies: int):
    k = groups * g
    rows = block_rows(k, g, limit, copies)
    assert k % rows == 0 and rows % g == 0
    assert rows == g or 4 * copies * k * rows <= limit
    larger = [r for r in range(rows + g, k + 1, g) if k % r == 0]
    assert not any(4 * copies * k * r <= limit for r in larger)
    assert block_rows(k, g, None) == k


def blockwise(gram: np.ndarray, rows: int) -> np.ndarray:
    """The whole matrix with everything outside its diagonal blocks set to zero."""
    owner = np.arange(len(gram)) // rows
    return np.where(owner[:, None] == owner, gram, 0.0)


@pytest.fixture
def problem(rng):
    x = rng.standard_normal((TOKENS, K)) @ rng.standard_normal((K, K)) * np.exp(rng.standard_normal(K))
    return jnp.asarray(x, jnp.float32), jnp.asarray(rng.standard_normal((K, N)), jnp.float32)


@pytest.mark.parametrize("rows", [8, 16, 32, 64])
def test_loss_is_that_of_uncorrelated_blocks(problem, rows: int):
    x, error = problem
    mask = np.arange(TOKENS) % 5 > 0
    stats = observe(x, jnp.asarray(mask), block=rows)
    exact, error = np.asarray(x)[mask].astype(np.float64), np.asarray(error)
    gram = blockwise(exact.T @ exact, rows)
    wanted = np.einsum("kn,kj,jn->", error.astype(np.float64), gram, error) / mask.sum()
    # Terms of both signs: what float32 rounds is relative to the sum of their magnitudes.
    scale = np.einsum("kn,kj,jn->", np.abs(error), np.abs(gram), np.abs(error)) / mask.sum()
    assert abs(float(gram_loss(jnp.asarray(error), stats)) - wanted) < 4 * K * np.finfo(np.float32).eps * scale


def test_whole_blocks_and_parts_of_them(problem):
    x, error = problem
    whole, parts = (observe(x, block=rows).gram for rows in (K, 16))
    assert whole.shape == (K, K) and parts.shape == (4, 16, 16)
    np.testing.assert_allclose(diagonal_blocks(whole, 16), parts, rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(diagonal_blocks(parts, 8), diagonal_blocks(blocks_back(parts), 8))
    np.testing.assert_allclose(times(parts, error), blocks_back(parts) @ error, rtol=1e-4, atol=1e-2)
    t = jnp.exp(jnp.linspace(-1, 1, K))
    np.testing.assert_allclose(blocks_back(rescaled(parts, t)), rescaled(blocks_back(parts), t), rtol=1e-6)


def blocks_back(parts: jax.Array) -> jax.Array:
    return jax.scipy.linalg.block_diag(*parts)


def test_clipping_looks_at_groups_alone(problem):
    """Its objective lies within quantization groups, so blocks of whole groups decide as the whole matrix does."""
    x, w = problem
    whole, parts = (observe(x, block=rows).gram for rows in (None, 16))
    ratios = (0.9, 0.8, 0.7)
    one, other = search_clip(blocks_back(parts), w, SPEC, ratios), search_clip(parts, w, SPEC, ratios)
    np.testing.assert_array_equal(one, other)
    assert (np.asarray(search_clip(whole, w, SPEC, ratios)) != other).mean() < 0.02  # ties of rounding


def test_gptq_takes_each_block_as_a_problem_of_its_own(problem):
    x, w = problem
    parts = observe(x, block=16).gram
    got = gptq(w, parts, SPEC, GPTQSpec())
    for index, gram in enumerate(parts):
        rows = slice(16 * index, 16 * index + 16)
        wanted = gptq(w[rows], gram, SPEC, GPTQSpec())
        np.testing.assert_array_equal(got.packed[8 * index : 8 * index + 8], wanted.packed)
    nearest = quantize(w, SPEC)
    lost = lambda q: float(gram_loss(w - dequantize(q), observe(x, block=16)))
    assert lost(got) <= lost(nearest)


def test_search_on_blocks_is_no_worse_than_nearest_on_its_objective(problem):
    x, w = problem
    found = search_scale(observe(x, block=16), [w], SearchSpec(rules=(rule("paper"),)), SPEC)
    assert float(found.loss) <= float(found.rtn_loss)


WIDTHS = dict.fromkeys(("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up"), 64) | {"mlp/down": 256}
SHAPES = {path: (k, 64) for path, k in WIDTHS.items()}


def test_a_device_that_is_too_small_decides_and_says_so(monkeypatch: pytest.MonkeyPatch):
    recipe = Recipe(quant=QuantSpec(group_size=32))
    plans = plan_layers(FAMILIES["llama"], recipe, 2, WIDTHS)
    monkeypatch.setattr("awq_jax.gram_memory.device_memory", lambda: 8 * 4 * 256**2)
    assert with_gram_limit(recipe, plans, SHAPES) == recipe and not blocked(plans, SHAPES)
    monkeypatch.setattr("awq_jax.gram_memory.device_memory", lambda: 8 * 4 * 256**2 - 1)
    fitted = with_gram_limit(recipe, plans, SHAPES)
    assert fitted.search.gram_limit == 2 * 256**2  # half, the next power of two
    plans = plan_layers(FAMILIES["llama"], fitted, 2, WIDTHS)
    (said,) = blocked(plans, SHAPES)
    assert said.startswith("mlp/down: of the Gram matrix of its 256 inputs blocks of 128 rows were kept")
    assert gram_bytes(plans[0], SHAPES) == 4 * (3 * 64 * 64 + 256 * 128)
    given = Recipe(search=SearchSpec(gram_limit=7))
    assert with_gram_limit(given, plans, SHAPES) == given


def test_drift_needs_the_whole_matrix():
    recipe = Recipe(quant=QuantSpec(group_size=32), propagate="quantized", search=SearchSpec(gram_limit=2 * 256**2))
    with pytest.raises(ValueError, match=r"256 inputs of mlp/down takes 262144 bytes.*--gram-limit"):
        plan_layers(FAMILIES["llama"], recipe, 2, WIDTHS)


def test_bad_limits_and_blocks():
    with pytest.raises(ValueError, match="gram_limit is -1"):
        SearchSpec(gram_limit=-1)
    with pytest.raises(ValueError, match="block is 3; it must divide the 8 channels"):
        observe(jnp.ones((2, 8)), block=3)
