# SPDX-License-Identifier: Apache-2.0
"""Learned refinement: it starts from the weights as they are, never ends worse, and writes an ordinary `QTensor`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import QTensor, QuantSpec, dequantize, quantize
from awq_jax._qtensor import codes_of
from awq_jax._spec import RefineSpec
from awq_jax.refine import _packed, _start, draw, refine

CHUNKS, BATCH, TOKENS, K, N = 4, 2, 16, 32, 12
HOW = RefineSpec(steps=40, samples=2)
REFINE = jax.jit(refine, static_argnames=("error", "how", "held"))


def error(params: Any, batch: Any) -> jax.Array:
    """Of one linear."""
    x, wanted, keep = batch
    return jnp.sum(jnp.where(keep[..., None], x @ params["w"] - wanted, 0.0) ** 2)


def a_problem(rng: np.random.Generator, spec: QuantSpec) -> tuple[Any, Any, Any]:
    """(quantized params, float params, batches) with correlated inputs, where nearest rounding is not the best."""
    mix = rng.standard_normal((4, K)).astype(np.float32)
    x = rng.standard_normal((CHUNKS, BATCH, TOKENS, 4)).astype(np.float32) @ mix
    x += 0.1 * rng.standard_normal(x.shape).astype(np.float32)
    w = jnp.asarray(rng.standard_normal((K, N)), jnp.float32)
    mask = rng.random((CHUNKS, BATCH, TOKENS)) < 0.9
    params = {"w": quantize(w, spec), "norm": jnp.ones((K,))}
    batches = (jnp.asarray(x), jnp.asarray(np.einsum("...k,kn->...n", x, w)), jnp.asarray(mask))
    return params, {"w": w, "norm": params["norm"]}, batches


def error64(weight: QTensor, batches: Any, chunks: slice) -> float:
    x, wanted, mask = (np.asarray(leaf)[chunks] for leaf in batches)
    off = x.astype(np.float64) @ np.asarray(dequantize(weight), np.float64) - wanted
    return float((off[mask] ** 2).sum())


@pytest.mark.parametrize(
    ("bits", "symmetric", "scale_dtype"), [(2, False, "float16"), (3, True, "bfloat16"), (4, True, "float32")]
)
def test_the_error_falls_also_on_samples_that_were_held_back(rng, bits, symmetric, scale_dtype):
    spec = QuantSpec(bits=bits, symmetric=symmetric, group_size=16, scale_dtype=scale_dtype)
    params, wanted, batches = a_problem(rng, spec)
    found = REFINE(params, wanted, error, batches, dataclasses.replace(HOW, rate=0.05), held=1)
    for chunks in (slice(0, 1), slice(1, None)):
        assert error64(found["w"], batches, chunks) < error64(params["w"], batches, chunks)
    weight, before = found["w"], params["w"]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), weight) == jax.tree.map(lambda a: (a.shape, a.dtype), before)
    assert weight.bits == bits and (np.asarray(weight.scale, np.float32) > 0).all()
    low, high = (8 - 2 ** (bits - 1), 7 + 2 ** (bits - 1)) if symmetric else (0, 2**bits - 1)
    codes = np.asarray(codes_of(weight))
    assert codes.min() >= low and codes.max() <= high
    np.testing.assert_array_equal(found["norm"], params["norm"])


@pytest.mark.parametrize("symmetric", [False, True])
def test_training_begins_with_the_very_codes_and_scales(rng, symmetric):
    spec = QuantSpec(bits=3, symmetric=symmetric, group_size=8)
    wanted = rng.standard_normal((K, N)).astype(np.float32)
    moved = wanted + 0.7 * rng.standard_normal((K, N)).astype(np.float32)  # codes far from nearest, as GPTQ's are
    moved[0, 0] = 1e-9
    weight = quantize(jnp.asarray(moved), spec)
    wanted[1, 1] = np.nan
    start = _start(weight, jnp.asarray(wanted))
    jax.tree.map(np.testing.assert_array_equal, _packed(start, weight), weight)


def test_it_never_ends_worse_even_where_training_diverges():
    wild = RefineSpec(steps=20, rate=0.5, samples=1)
    kept = 0
    for seed in range(12):
        params, wanted, batches = a_problem(np.random.default_rng(seed), QuantSpec(group_size=16))
        batches = (batches[0].at[2].mul(1 + 99 * (seed % 2)), *batches[1:])  # half of them learn from a wrong chunk
        found = REFINE(params, wanted, error, batches, wild, held=2)
        begun, ended = (float(jnp.sum(error64(p["w"], batches, slice(0, 2)))) for p in (params, found))
        assert ended <= begun * (1 + 1e-5)  # judged in float32, measured here in float64
        kept += ended == begun
    assert 0 < kept < 12  # both outcomes were seen


def test_inputs_that_are_not_finite_leave_everything_as_it_was(rng):
    params, wanted, batches = a_problem(rng, QuantSpec(group_size=16))
    spoiled = (batches[0].at[3, 1, 2, 5].set(jnp.nan), *batches[1:2], jnp.ones_like(batches[2]))
    found = REFINE(params, wanted, error, spoiled, HOW, held=CHUNKS)  # every look meets the NaN
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_the_seed_decides_every_bit(rng):
    params, wanted, batches = a_problem(rng, QuantSpec(group_size=16))
    one, two, other = (
        REFINE(params, wanted, error, batches, dataclasses.replace(HOW, seed=seed), held=1)["w"] for seed in (5, 5, 6)
    )
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert not np.array_equal(one.packed, other.packed)


def test_samples_that_are_held_back_are_never_drawn():
    numbers = jnp.arange(CHUNKS * BATCH).reshape(CHUNKS, BATCH)
    batches = (numbers, numbers, numbers)
    drawn = lambda skip, samples: {
        int(n) for i in range(40) for n in draw(jax.random.key(i), batches, skip, samples)[0]
    }
    assert drawn(1, 2) == set(range(BATCH, CHUNKS * BATCH))
    assert drawn(CHUNKS, 2) == set(range(CHUNKS * BATCH))  # nothing is left, so all
    few = draw(jax.random.key(0), batches, 3, 99)[0]
    assert sorted(few.tolist()) == [6, 7]


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("rate", 0.0), ("samples", 0)])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"RefineSpec.{name} is {value}"):
        RefineSpec(**{name: value})
