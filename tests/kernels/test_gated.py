# SPDX-License-Identifier: Apache-2.0
"""An activation times its neighbour: definition and kernel against numpy in float64."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax_kernels.gated import ACTIVATIONS, gated

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU; AWQ_JAX_TEST_PLATFORM=cuda uses one"),
]
IMPLEMENTATIONS = ["reference", pytest.param("gpu", marks=GPU)]


def activated(name, x):
    if name == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("m, w, dtype", [(1, 28672, "bfloat16"), (5, 48, "float16"), (17, 4096, "bfloat16")])
def test_against_float64(rng, implementation, activation, m, w, dtype):
    product = jnp.asarray(rng.normal(size=(m, w)) * 4, dtype)
    gate, up = np.split(np.asarray(product, np.float64), 2, axis=1)
    wanted = activated(activation, gate) * up
    y = gated(product, activation=activation, implementation=implementation)
    assert y.dtype == product.dtype and y.shape == (m, w // 2)
    # Rounded once, to half a place of the dtype. Where a gate is very negative, 1 + tanh is the difference of numbers
    # near 1 in float32, times a gate and a neighbour of up to 20.
    half = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=1.01 * half, atol=400 * 2.0**-24)


def test_large_gates_stay_finite():
    product = jnp.asarray([[300.0, -300.0] * 8 + [1.0] * 16], jnp.bfloat16)
    assert gated(product, activation="silu").tolist() == [[300.0, 0.0] * 8]


def test_refusals_are_named():
    with pytest.raises(ValueError, match="float32, not bfloat16"):
        gated(jnp.ones((2, 96)), activation="silu", implementation="gpu")
    with pytest.raises(ValueError, match="no multiple of 16"):
        gated(jnp.ones((2, 24), jnp.bfloat16), activation="silu", implementation="gpu")
    with pytest.raises(ValueError, match="'relu'"):
        gated(jnp.ones((2, 96)), activation="relu")
    with pytest.raises(ValueError, match="even number"):
        gated(jnp.ones((2, 95)), activation="silu")
    with pytest.raises(ValueError, match="3 axes, not 2"):
        inspect.unwrap(gated)(jnp.ones((1, 2, 32), jnp.bfloat16), activation="silu", implementation="gpu")
