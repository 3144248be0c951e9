# SPDX-License-Identifier: Apache-2.0
"""Every cut that the Hopper kernel is given by default is one that it can run."""

import math

import jax.numpy as jnp
import pytest

from awq_jax_kernels.int4_matmul.pallas_gpu import Ends
from awq_jax_kernels.int4_matmul.pallas_gpu.config import choose, paired
from awq_jax_kernels.int4_matmul.pallas_gpu.plan import Plan

SHARED = 227 * 1024  # bytes that a block may have
KS, NS = (128, 512, 1024, 4096, 8192, 14336), (256, 512, 2048, 4096, 6144, 8192, 14336, 28672, 128256)
ROWS = (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 1024)


def shared_bytes(plan):
    """What a block takes; Pallas begins every array at a multiple of 1024."""
    sizes = [math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize for ref in plan.scratch.values()]
    return sum(-(-size // 1024) * 1024 for size in sizes)


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
@pytest.mark.parametrize("g", [32, 64, 128, 512])
def test_what_is_chosen_cuts_the_weight_and_fits(g, device):
    for m in ROWS:
        for k, n in ((k, n) for k in KS for n in NS if k % g == 0):
            chosen = choose(m, k, n, g, exact=False, device=device)
            gates = m <= 32 and g >= 128
            for config, ends in [(chosen, Ends())] + gates * [(paired(chosen), Ends(eps=1e-5, activation="silu"))]:
                assert config.problem(k, n, g) is None, (m, k, n, config)
                wide = jnp.dtype("float32")  # scales take most room in it
                plan = Plan(config, m, k, n, g, jnp.dtype("bfloat16"), wide, tiles=True, zeros=True, ends=ends)
                assert shared_bytes(plan) <= SHARED, (m, k, n, config)


@pytest.mark.parametrize("g", [64, 128])
def test_what_is_chosen_for_exact_scales_fits(g):
    for m in ROWS:
        for k, n in ((k, n) for k in KS for n in NS if k % g == 0):
            config = choose(m, k, n, g, exact=True)
            assert config.problem(k, n, g) is None, (m, k, n, config)
            x, scale = jnp.dtype("float16"), jnp.dtype("float32")
            plan = Plan(config, m, k, n, g, x, scale, tiles=True, zeros=True, ends=Ends())
            assert shared_bytes(plan) <= SHARED, (m, k, n, config)
