# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel on a GPU, held to the contract of `int4_matmul`; skipped where there is none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from awq_jax_kernels.int4_matmul import pallas_gpu
from awq_jax_kernels.int4_matmul.pallas_gpu import BlockConfig, pipeline
from awq_jax_kernels.int4_matmul.tiles import prepare
from tests.kernels import late
from tests.kernels.cases import ALIGNED, Case
from tests.kernels.contract import CODES, check, make_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU; AWQ_JAX_TEST_PLATFORM=cuda uses one"),
]

CUTS = [  # each way of cutting that the tuned tables use, and their combinations
    BlockConfig(8, split=2),
    BlockConfig(8, deep=4, split=3, stages=8),
    BlockConfig(16, split=3),
    BlockConfig(64, deep=2, stages=7, split=3, scale_weight=True),
    BlockConfig(128, deep=2, stages=5, split=3, scale_weight=True),
    BlockConfig(16, deep=4, stages=8, split=4),
    BlockConfig(16, wide=2, deep=2, stages=6),
    BlockConfig(16, wide=2, deep=2, stages=7),
    BlockConfig(32),
    BlockConfig(64, deep=2, stages=8, scale_weight=True),
    BlockConfig(64, wide=2, deep=1, stages=5, split=2, scale_weight=True),
    BlockConfig(128, deep=2, stages=5, split=2, scale_weight=True),
    BlockConfig(128, wide=2, deep=1, stages=4, scale_weight=True),
]


def product(x, packed, scale, zero, *, tiles=False, config=None):
    """The kernel on either order of the bytes."""
    call = jax.jit(functools.partial(pallas_gpu.int4_matmul, config=config))
    return call(x, prepare(packed) if tiles else packed, scale, zero)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ALIGNED, ids=str)
def test_contract(rng, case, dtype, tiles):
    problem = make_problem(rng, case, dtype=dtype, scale_dtype="bfloat16" if case.g != 32 else dtype)
    check(functools.partial(product, tiles=tiles), problem)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("config", CUTS, ids=lambda c: "-".join(str(v) for v in dataclasses.astuple(c)))
def test_every_cut(rng, config, tiles):
    problem = make_problem(rng, Case(72, 1536, 512, 128), scale_dtype="float32")
    check(functools.partial(product, tiles=tiles, config=config), problem)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("m", [72, 1000, 1072])
@pytest.mark.parametrize(
    "config",
    [
        BlockConfig(16, wide=2, deep=1, stages=7, persistent=True),
        BlockConfig(64, wide=2, deep=1, stages=5, scale_weight=True, persistent=True),
        BlockConfig(128, wide=2, deep=1, stages=4, scale_weight=True, persistent=True),
        BlockConfig(128, deep=1, stages=5, scale_weight=True, persistent=True),
    ],
    ids=lambda c: "-".join(str(v) for v in dataclasses.astuple(c)),
)
def test_blocks_that_stay(rng, config, m, tiles):
    """Fewer tiles than blocks, all shared; more than blocks; an odd number for each pair, and an even one."""
    problem = make_problem(rng, Case(m, 640, 2560, 128), scale_dtype="bfloat16")
    check(functools.partial(product, tiles=tiles, config=config), problem)


@pytest.mark.parametrize(
    "config",
    [
        BlockConfig(64, deep=2, step=256, stages=4, split=2, scale_weight=True),
        BlockConfig(64, wide=2, deep=1, stages=5, split=4, scale_weight=True),
        BlockConfig(128, wide=2, deep=1, stages=4, split=4, scale_weight=True),
    ],
    ids=lambda c: "-".join(str(v) for v in dataclasses.astuple(c)),
)
def test_a_loop_short_enough_to_unroll(rng, config):
    """Eight steps to a block: the fetching loop unrolls, and once its lanes ran apart and waited for ever."""
    check(functools.partial(product, tiles=True, config=config), make_problem(rng, Case(72, 4096, 512, 128)))


@pytest.mark.parametrize("step", [0, 1, 4])
@pytest.mark.parametrize(
    "config",
    [
        BlockConfig(8),
        BlockConfig(16, wide=2, deep=2, stages=7),
        BlockConfig(64, deep=2, stages=7, scale_weight=True),
        BlockConfig(128, deep=2, stages=5, scale_weight=True),
        BlockConfig(16, wide=2, deep=1, stages=7, persistent=True),
        BlockConfig(128, deep=1, stages=5, scale_weight=True, persistent=True),
    ],
    ids=lambda c: "-".join(str(v) for v in dataclasses.astuple(c)),
)
def test_a_step_whose_copies_come_late(rng, monkeypatch, config, step):
    """Where slots went from one reader to another, the other took them for full; it waited for ever."""
    monkeypatch.setattr(pipeline, "fetch", functools.partial(late.fetch, step))
    check(functools.partial(product, tiles=True, config=config), make_problem(rng, Case(16, 4096, 512, 128)))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("codes", CODES)
def test_extremes(rng, codes, zeros):
    check(product, make_problem(rng, Case(6, 256, 128, 64), zeros=zeros, codes=codes, scale_dtype="float32"))


@pytest.mark.parametrize(
    "config",
    [
        BlockConfig(16, wide=2, deep=2, stages=7),
        BlockConfig(16, wide=2, deep=2, stages=8),
        BlockConfig(32, wide=2, deep=2, stages=7),
        BlockConfig(64, deep=2, stages=7, scale_weight=True),
        BlockConfig(128, deep=2, stages=5, scale_weight=True),
    ],
    ids=lambda c: "-".join(str(v) for v in dataclasses.astuple(c)),
)
def test_the_same_answer_every_time(config):
    """A race moves from run to run; the order of this kernel's sums is fixed.

    Weights come from device memory, whose bytes may arrive in another order than they were asked for: a slot's bytes of
    one turn were once taken for those of the next (`tests.kernels.test_gpu_ring`).
    """
    k, n, keys = 4096, 28672, jax.random.split(jax.random.key(0), 3)
    packed = jax.lax.bitcast_convert_type(jax.random.bits(keys[0], (k // 2, n), jnp.uint8), jnp.int8)
    scale = jax.random.uniform(keys[1], (k // 128, n), jnp.bfloat16, 0.005, 0.015)
    x = jax.random.normal(keys[2], (config.tokens, k), jnp.bfloat16)
    weight = (prepare(packed), scale, jnp.full(scale.shape, 7, jnp.int8))

    @jax.jit
    def differing(x, weight):
        call = functools.partial(pallas_gpu.int4_matmul, config=config)
        first = call(x, *weight)

        def turn(_, state):
            x, count = state
            x, y = jax.lax.optimization_barrier((x, call(x, *weight)))
            return x, count + (y != first).sum()

        return jax.lax.fori_loop(0, 20_000, turn, (x, jnp.int32(0)))[1]

    assert differing(x, weight) == 0
