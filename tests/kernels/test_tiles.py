# SPDX-License-Identifier: Apache-2.0
"""Codes in tile order: the same weight to every implementation, whether it reads tiles or undoes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax_kernels.int4_matmul import int4_matmul, refusal
from awq_jax_kernels.int4_matmul.tiles import as_rows, prepare, restore, rows_shape
from tests.kernels.cases import Case
from tests.kernels.contract import make_problem

CASE = Case(5, 256, 384, 64)


@pytest.mark.parametrize(("blocks_k", "blocks_n"), [(1, 1), (2, 3)])
def test_prepare_is_a_permutation(rng, blocks_k, blocks_n):
    packed = jnp.asarray(rng.integers(-128, 128, (32 * blocks_k, 128 * blocks_n)).astype(np.int8))
    tiles = prepare(packed)
    assert tiles.size * 4 == packed.size and rows_shape(tiles) == rows_shape(packed) == packed.shape
    np.testing.assert_array_equal(restore(tiles), packed)
    assert as_rows(packed) is packed


def test_prepare_refuses_what_it_would_have_to_pad():
    with pytest.raises(ValueError, match="k=96 must be a multiple of 64 and n=128 of 128"):
        prepare(jnp.zeros((48, 128), jnp.int8))


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
def test_who_reads_rows_gets_rows(rng, implementation):
    x, packed, scale, zero = make_problem(rng, CASE).operands
    multiply = lambda codes: int4_matmul(x, codes, scale, zero, implementation=implementation)
    np.testing.assert_array_equal(multiply(prepare(packed)), multiply(packed))


def test_the_tpu_kernel_refuses_tiles(rng):
    x, packed, scale, zero = make_problem(rng, Case(5, 256, 384, 128)).operands
    assert refusal("tpu", x, packed, scale, zero) is None
    assert "tile order" in (refusal("tpu", x, prepare(packed), scale, zero) or "")


def test_stacked_tiles_have_leading_axes(rng):
    two = [make_problem(rng, CASE).operands for _ in range(2)]
    x, packed, scale, zero = (jnp.stack(parts) for parts in zip(*two, strict=True))
    tiles = jax.vmap(prepare)(packed)
    np.testing.assert_array_equal(as_rows(tiles), packed)
    np.testing.assert_array_equal(int4_matmul(x, tiles, scale, zero), int4_matmul(x, packed, scale, zero))


def test_the_gradient_is_that_of_rows(rng):
    x, packed, scale, zero = make_problem(rng, CASE, dtype="float32").operands
    gradient = lambda codes: jax.grad(lambda x: int4_matmul(x, codes, scale, zero).sum())(x)
    np.testing.assert_array_equal(gradient(prepare(packed)), gradient(packed))


@pytest.mark.parametrize("x_columns", [128, 384])
def test_tiles_that_do_not_fit_are_refused(rng, x_columns):
    _, packed, scale, zero = make_problem(rng, CASE).operands
    with pytest.raises(ValueError, match="x must have 256 columns" if x_columns != 128 else "takes no such weight"):
        int4_matmul(jnp.zeros((2, x_columns)), prepare(packed), scale, zero)
