# SPDX-License-Identifier: Apache-2.0
"""A weight that a jitted function closes over is a constant of the program, and must mean the same there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax_kernels.int4_matmul import int4_matmul
from awq_jax_kernels.int4_matmul.reference import dequantize
from awq_jax_kernels.nibbles import pack, unpack


@pytest.fixture
def weight(rng):
    codes, zero = (jnp.asarray(rng.integers(0, 16, shape), jnp.uint8) for shape in ((128, 32), (4, 32)))
    return pack(codes), jnp.asarray(rng.uniform(0.1, 1.0, (4, 32)), jnp.float32), zero.astype(jnp.int8)


def test_codes(weight):
    packed = weight[0]
    np.testing.assert_array_equal(jax.jit(lambda: unpack(packed))(), unpack(packed))


def test_the_dense_weight(weight):
    np.testing.assert_array_equal(jax.jit(lambda: dequantize(*weight))(), dequantize(*weight))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_product_and_its_gradient(weight, rng, implementation):
    x = jnp.asarray(rng.standard_normal((4, 128)), jnp.float32)
    product = lambda x: int4_matmul(x, *weight, implementation=implementation)
    loss = lambda x: jnp.sum(jnp.sin(product(x)))
    np.testing.assert_allclose(jax.jit(product)(x), product(x), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), jax.grad(loss)(x), rtol=1e-4, atol=1e-2)
