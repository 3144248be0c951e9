# SPDX-License-Identifier: Apache-2.0
"""What the compiler says a LoRA step on a frozen INT4 base takes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from awq_jax import QTensor, adapt, matmul, quantize
from awq_jax.train import apply_adapters, init_adapters

LAYERS, WIDTH, TOKENS = 6, 1024, 32


def deep(params, x):
    """Layers in a scan, each rematerialized."""
    layer = jax.checkpoint(lambda x, w: x + jnp.tanh(x @ w))
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, params["layers"])[0]


@pytest.fixture(scope="module")
def compiled():
    base = {"layers": jax.eval_shape(quantize, jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32))}
    adapters = jax.eval_shape(functools.partial(init_adapters, rank=4), jax.eval_shape(lambda: jax.random.key(0)), base)
    optimizer = optax.adam(1e-3)

    def step(base, adapters, state, x):
        loss = lambda a: jnp.mean(adapt.serve(deep)(apply_adapters(base, a), x) ** 2)
        update, state = optimizer.update(jax.grad(loss)(adapters), state)
        return optax.apply_updates(adapters, update), state

    state = jax.eval_shape(optimizer.init, adapters)
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)
    return jax.jit(step, donate_argnums=(1, 2)).lower(base, adapters, state, x).compile(), base, (adapters, state, x)


def nbytes(tree):
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_the_base_takes_half_a_byte_a_weight(compiled):
    program, _, others = compiled
    weights = LAYERS * WIDTH * WIDTH
    base = program.memory_analysis().argument_size_in_bytes - nbytes(others)
    assert base <= 0.55 * weights


def test_no_dense_copy_larger_than_a_block(compiled):
    """Dense, the layers are 24 MiB and one is 4; the products of one layer dequantize a block or two of that size."""
    program, _, _ = compiled
    assert program.memory_analysis().temp_size_in_bytes < 4 * WIDTH * WIDTH * 4
    floats = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", program.as_text())
    assert max(np.prod([int(d) for d in shape.split(",")]) for shape in floats) <= WIDTH * WIDTH


def test_donated_adapters_are_updated_in_place(compiled):
    program, _, (adapters, state, _) = compiled
    assert program.memory_analysis().alias_size_in_bytes >= nbytes(adapters) + nbytes(state) - 64


def test_codes_get_float0(rng):
    q = quantize(jnp.asarray(rng.standard_normal((128, 8)), jnp.float32))
    x = jnp.ones((2, 128))
    gradient = jax.grad(lambda q: adapt.serve(lambda p, x: (x @ p["w"]).sum())({"w": q}, x), allow_int=True)(q)
    assert isinstance(gradient, QTensor)
    assert gradient.packed.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(gradient.scale, 0)  # the scale is trained by `awq_jax.train.learned` alone


def test_forward_mode_is_refused(rng):
    q = quantize(jnp.asarray(rng.standard_normal((128, 8)), jnp.float32))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: matmul(x, q), (jnp.ones((2, 128)),), (jnp.ones((2, 128)),))
