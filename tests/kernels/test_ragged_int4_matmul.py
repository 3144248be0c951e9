# SPDX-License-Identifier: Apache-2.0
"""Rows sorted by expert: each equals the plain product with its expert's weight."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from awq_jax_kernels.int4_matmul.config import BlockConfig
from awq_jax_kernels.ragged_int4_matmul import ragged_int4_matmul
from tests.kernels.cases import Case
from tests.kernels.contract import error_bound, make_problem

INTERPRET = BlockConfig(
    bn=128, tile=128, buffers=2, interpret=pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
)
unchecked = inspect.unwrap(ragged_int4_matmul)  # below the annotations, which users don't run
SIZES = [(5, 0, 17, 3), (0, 0, 0, 25), (1, 1, 1, 1), (0, 0, 0, 0), (16, 16, 0, 1)]


def experts(rng, m, case, **options) -> tuple[Any, Any, tuple[Any, Any, Any]]:
    problems = [make_problem(rng, case, **options) for _ in range(4)]
    weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[p.operands[1:] for p in problems])
    x = jnp.concatenate([p.x for p in problems])[:m]
    return problems, x, weights


def check(product, rng, sizes, **options):
    m = 33
    problems, x, weights = experts(rng, m, Case(16, 256, 128, 128), **options)
    y = np.asarray(product(x, *weights, jnp.asarray(sizes, jnp.int32)), np.float64)
    starts = np.cumsum([0, *sizes])
    for p, start, end in zip(problems, starts, starts[1:], strict=False):
        x64 = np.asarray(x[start:end], np.float64)
        share = p.__class__(**{**vars(p), "x": x[start:end], "x64": x64})
        assert np.all(np.abs(y[start:end] - x64 @ p.w64) <= error_bound(share))
    assert not y[starts[-1] :].any(), "rows that belong to nobody"


@pytest.mark.parametrize("implementation", ["reference", "xla", None])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_contract(rng, sizes, zeros, implementation):
    check(jax.jit(functools.partial(ragged_int4_matmul, implementation=implementation)), rng, sizes, zeros=zeros)


@pytest.mark.parametrize("sizes", [SIZES[0], pytest.param(SIZES[1], marks=pytest.mark.slow)], ids=str)
def test_contract_of_the_kernel(rng, sizes):
    check(functools.partial(ragged_int4_matmul, implementation="tpu", config=INTERPRET), rng, sizes)


def test_gradient(rng):
    _, x, weights = experts(rng, 20, Case(16, 64, 32, 32), dtype="float32")
    sizes = jnp.asarray([3, 9, 0, 6], jnp.int32)
    loss = lambda implementation: (
        lambda x: (ragged_int4_matmul(x, *weights, sizes, implementation=implementation) ** 2).sum()
    )
    np.testing.assert_allclose(jax.grad(loss("xla"))(x), jax.grad(loss("reference"))(x), rtol=1e-4, atol=1e-4)


def test_lowered_for_a_tpu_it_is_one_kernel(rng):
    _, x, weights = experts(rng, 33, Case(16, 256, 128, 128))
    sizes = jnp.asarray(SIZES[0], jnp.int32)
    text = jax.jit(ragged_int4_matmul).trace(x, *weights, sizes).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1


def test_refuses_what_the_kernel_cannot_take(rng):
    _, x, weights = experts(rng, 20, Case(16, 64, 32, 32))
    with pytest.raises(ValueError, match="multiples of 128"):
        ragged_int4_matmul(x, *weights, jnp.asarray(SIZES[0], jnp.int32), implementation="tpu")


def test_shapes_that_disagree_are_refused_by_every_implementation(rng):
    _, x, (packed, scale, zero) = experts(rng, 20, Case(16, 64, 32, 32), zeros=True)
    sizes = jnp.asarray([3, 9, 0, 6], jnp.int32)
    for odd in (
        (x[:, :32], packed, scale, zero, sizes),
        (x, packed, scale[:1], zero, sizes),
        (x, packed, scale, zero[:1], sizes),
        (x, packed, scale, zero, jnp.asarray([3, 9, 0, 2, 4], jnp.int32)),
        (x, packed, scale, zero, sizes[:1]),
    ):
        for implementation in ("reference", "xla", "tpu", None):
            with pytest.raises(ValueError, match="must "):
                unchecked(*odd, implementation=implementation)


def test_options_that_say_nothing_are_refused(rng):
    _, x, weights = experts(rng, 20, Case(16, 64, 32, 32))
    sizes = jnp.asarray([3, 9, 0, 6], jnp.int32)
    for implementation in ("reference", "xla", None):
        with pytest.raises(ValueError, match="config belongs to the kernel"):
            ragged_int4_matmul(x, *weights, sizes, implementation=implementation, config=INTERPRET)
    with pytest.raises(ValueError, match="choose from tpu, xla, reference"):
        unchecked(x, *weights, sizes, implementation="pallas")
    with pytest.raises(ValueError, match="at least one row"):
        ragged_int4_matmul(x, *weights, sizes, tile=0)
