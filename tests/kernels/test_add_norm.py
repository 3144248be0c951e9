# SPDX-License-Identifier: Apache-2.0
"""The sum and its norm: definition and kernel against numpy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from awq_jax_kernels.add_norm import add_norm

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)


@pytest.mark.parametrize("m, d, offset, whole", [(1, 256, 0.0, False), (5, 128, 1.0, True), (16, 512, 0.0, True)])
def test_kernel_and_definition(rng, m, d, offset, whole):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    h, delta = draw(m, d), draw(m, d) if whole else None
    weight = jnp.asarray(rng.normal(size=d), jnp.float32)
    wide = lambda x: np.asarray(x.astype(jnp.float32), np.float64)
    total = wide(h) + (0 if delta is None else wide(delta))
    total = wide(jnp.asarray(total, jnp.bfloat16))  # a stream is rounded: sums of two of its values are exact before
    normed = total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5) * (offset + wide(weight))
    for interpret in (None, INTERPRET):
        name = "tpu" if interpret else "reference"
        got, same = add_norm(h, delta, weight, eps=1e-5, offset=offset, implementation=name, interpret=interpret)
        assert got.dtype == same.dtype == jnp.bfloat16
        np.testing.assert_array_equal(wide(got), total)
        np.testing.assert_allclose(wide(same), normed, rtol=2.0**-8, atol=1e-6)  # half a place of bfloat16, and float32


def test_refusals_are_named():
    weight = jnp.ones(96)
    with pytest.raises(ValueError, match="no multiple of 128"):
        add_norm(jnp.ones((2, 96), jnp.bfloat16), None, weight, eps=1e-5, implementation="tpu")
    with pytest.raises(ValueError, match="float32, not bfloat16"):
        add_norm(jnp.ones((2, 96)), None, weight, eps=1e-5, implementation="tpu")
