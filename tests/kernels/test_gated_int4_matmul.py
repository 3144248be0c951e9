# SPDX-License-Identifier: Apache-2.0
"""The second product of a gated MLP: one kernel gives what two operations give."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from awq_jax_kernels.gated import ACTIVATIONS, gated
from awq_jax_kernels.gated_int4_matmul import gated_int4_matmul
from awq_jax_kernels.int4_matmul import int4_matmul
from awq_jax_kernels.int4_matmul.config import BlockConfig
from tests.kernels.cases import Case
from tests.kernels.contract import check, make_problem

SMALL = BlockConfig(bm=16, interpret=pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True))
CUTS = {  # by variant, with the largest operand that the contract's error model is told of
    "A": (dataclasses.replace(SMALL, variant="A"), 143),
    "B": (SMALL, 15),
    "E": (dataclasses.replace(SMALL, variant="E", bn=256, by_tile=True, buffers=1), 15),
}


def halves_of(x, activation):
    """Gate and up whose gated product is near x: gate of 1, up of x over the activation of 1; both bfloat16."""
    one = float(ACTIVATIONS[activation](jnp.float32(1)))
    return jnp.concatenate([jnp.ones_like(x), (x.astype(jnp.float32) / one).astype(x.dtype)], axis=-1)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("variant", CUTS)
@pytest.mark.parametrize("m", [1, 5, 16])
def test_one_kernel_is_the_two(rng, m, variant, activation):
    problem = make_problem(rng, Case(m, 256, 256, 128))
    halves = halves_of(problem.x, activation)
    between = gated(halves, activation=activation)
    config, largest = CUTS[variant]
    kernel = functools.partial(gated_int4_matmul, activation=activation, implementation="tpu", config=config)
    rounded = dataclasses.replace(problem, x=between, x64=np.asarray(between, np.float64))
    check(lambda _, *weight: kernel(halves, *weight), rounded, largest_operand=largest)


def test_without_a_name_it_is_the_two(rng):
    _, *weight = make_problem(rng, Case(3, 256, 128, 64), dtype="float32").operands
    halves = jnp.asarray(rng.standard_normal((3, 512)), jnp.float32)
    wanted = int4_matmul(gated(halves, activation="silu"), *weight)
    np.testing.assert_array_equal(gated_int4_matmul(halves, *weight, activation="silu"), wanted)
    mapped = jax.vmap(lambda h: gated_int4_matmul(h[None], *weight, activation="silu")[0])(halves)
    np.testing.assert_allclose(mapped, wanted, rtol=1e-5, atol=1e-5)


def test_refusals_are_named(rng):
    x, *weight = make_problem(rng, Case(3, 256, 128, 64)).operands
    halves = jnp.concatenate([x, x], axis=-1)
    with pytest.raises(ValueError, match="'relu'"):
        gated_int4_matmul(halves, *weight, activation="relu")
    with pytest.raises(ValueError, match="x must have 256 columns"):
        gated_int4_matmul(halves[:, :256], *weight, activation="silu")
    with pytest.raises(ValueError, match="float32, not bfloat16"):
        gated_int4_matmul(halves.astype(jnp.float32), *weight, activation="silu", implementation="tpu")
    with pytest.raises(ValueError, match="do not stay in VMEM"):
        many = jnp.zeros((600, 512), jnp.bfloat16)
        gated_int4_matmul(many, *weight, activation="silu", implementation="tpu", config=BlockConfig())
    with pytest.raises(ValueError, match="config belongs to the kernel"):
        gated_int4_matmul(halves, *weight, activation="silu", config=BlockConfig())
