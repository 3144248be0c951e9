# SPDX-License-Identifier: Apache-2.0
"""Bytes in the order that a GPU reads fastest: which weights get it, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax import QTensor, QuantSpec, dequantize, matmul, quantize
from awq_jax._qtensor import codes_of, in_rows, in_tiles
from awq_jax.checkpoint import load, save
from awq_jax.serving.arrange import arranged
from awq_jax.serving.model import serving_decoder


def weight_of(rng, *shape, **spec):
    return quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), QuantSpec(**spec))


def test_weights_that_the_kernel_takes_are_arranged(rng):
    tree = {
        "taken": weight_of(rng, 256, 128),
        "symmetric": weight_of(rng, 256, 128, symmetric=True),
        "odd": weight_of(rng, 192, 128, group_size=64),
        "bytes": weight_of(rng, 256, 128, bits=8),
        "experts": weight_of(rng, 2, 256, 128),
        "dense": jnp.ones((256, 128)),
    }
    tiled = arranged(tree, jnp.bfloat16, "gpu")
    changed = {name for name in tree if isinstance(tree[name], QTensor) and tiled[name].packed.dtype == jnp.int32}
    assert changed == {"taken", "symmetric"}
    assert arranged(tree, jnp.bfloat16, "cpu") is tree
    in_float32 = arranged(tree, jnp.float32, "gpu")  # which tensor cores do not multiply
    assert all(isinstance(leaf, jax.Array) or leaf.packed.dtype == jnp.int8 for leaf in in_float32.values())


def test_a_weight_in_tiles_is_the_weight(rng, tmp_path):
    weight = weight_of(rng, 256, 384)
    tiled = in_tiles(weight)
    assert (tiled.shape, tiled.ndim, tiled.group_size, tiled.nbytes) == ((256, 384), 2, 128, weight.nbytes)
    np.testing.assert_array_equal(codes_of(tiled), codes_of(weight))
    np.testing.assert_array_equal(dequantize(tiled), dequantize(weight))
    x = jnp.asarray(rng.standard_normal((3, 256)), jnp.float32)
    np.testing.assert_array_equal(matmul(x, tiled), matmul(x, weight))
    jax.tree.map(np.testing.assert_array_equal, in_rows(tiled), weight)
    save(tmp_path / "out", {"w": tiled})  # what is stored is in the one order that is stored
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out")["w"], weight)


def test_a_model_in_tiles_says_the_same(shipped):
    tokens = jnp.asarray([[5, 9, 2, 40]])
    tiled = arranged(shipped.packed, jnp.bfloat16, "gpu")
    assert tiled["layers"]["0"]["mlp"]["gate_up"]["kernel"].packed.dtype == jnp.int32

    @jax.jit
    def logits(params):
        return serving_decoder(shipped.config, params)(tokens)

    np.testing.assert_array_equal(logits(tiled), logits(shipped.packed))
