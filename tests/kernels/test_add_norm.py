# SPDX-License-Identifier: Apache-2.0
"""The sum and its norm: definition and kernel against numpy in float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from awq_jax_kernels.add_norm import add_norm

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)


def wide(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def problem(rng, m, d, whole, dtype="bfloat16"):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return draw(m, d), draw(m, d) if whole else None, jnp.asarray(rng.normal(size=d), jnp.float32)


def check(result, h, delta, weight, offset):
    """A sum, rounded once, and its norm in float64."""
    got, same = result
    total = wide(h) + (0 if delta is None else wide(delta))
    total = wide(jnp.asarray(total, h.dtype))  # a stream is rounded: sums of two of its values are exact before
    normed = total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5) * (offset + wide(weight))
    assert got.dtype == same.dtype == h.dtype
    np.testing.assert_array_equal(wide(got), total)
    np.testing.assert_allclose(wide(same), normed, rtol=2.0**-8, atol=1e-6)  # half a place of bfloat16, and float32


@pytest.mark.parametrize("m, d, offset, whole", [(1, 256, 0.0, False), (5, 128, 1.0, True), (16, 512, 0.0, True)])
def test_kernel_and_definition(rng, m, d, offset, whole):
    operands = problem(rng, m, d, whole)
    for interpret in (None, INTERPRET):
        name = "tpu" if interpret else "reference"
        result = add_norm(*operands, eps=1e-5, offset=offset, implementation=name, interpret=interpret)
        check(result, *operands, offset)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU; AWQ_JAX_TEST_PLATFORM=cuda uses one")
@pytest.mark.parametrize(
    "m, d, offset, whole, dtype",
    [(1, 4096, 0.0, True, "bfloat16"), (3, 512, 1.0, False, "float16"), (64, 5120, 0.0, True, "bfloat16")],
)
def test_on_a_gpu(rng, m, d, offset, whole, dtype):
    operands = problem(rng, m, d, whole, dtype)
    check(add_norm(*operands, eps=1e-5, offset=offset, implementation="gpu"), *operands, offset)


def test_refusals_are_named():
    weight = jnp.ones(96)
    with pytest.raises(ValueError, match="no multiple of 128"):
        add_norm(jnp.ones((2, 96), jnp.bfloat16), None, weight, eps=1e-5, implementation="tpu")
    for name in ("tpu", "gpu"):
        with pytest.raises(ValueError, match="float32, not bfloat16"):
            add_norm(jnp.ones((2, 96)), None, weight, eps=1e-5, implementation=name)
    with pytest.raises(ValueError, match="no multiple of 512"):
        add_norm(jnp.ones((2, 96), jnp.bfloat16), None, weight, eps=1e-5, implementation="gpu")


def test_shapes_that_disagree_are_refused_by_every_implementation(rng):
    h, delta, weight = problem(rng, 4, 512, True)
    assert delta is not None
    for odd in ((h, delta[:1], weight), (h, delta[None], weight), (h, None, weight[:1]), (h[None], None, weight)):
        for name in ("tpu", "gpu", "reference", None):
            with pytest.raises(ValueError, match="must be"):
                inspect.unwrap(add_norm)(*odd, eps=1e-5, implementation=name)  # below the annotations


def test_a_wider_delta_leaves_the_stream_its_dtype(rng):
    h, delta, weight = problem(rng, 4, 512, True)
    assert delta is not None
    operands = h, delta.astype(jnp.float32), weight
    with jax.numpy_dtype_promotion("standard"):
        check(add_norm(*operands, eps=1e-5, implementation="reference"), *operands, 0.0)
        check(add_norm(*operands, eps=1e-5, implementation="tpu", interpret=INTERPRET), *operands, 0.0)
