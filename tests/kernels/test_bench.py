# SPDX-License-Identifier: Apache-2.0
"""The model of cost, the tuner's candidates, the tables it left, and the commands."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from awq_jax_kernels.aot import schedule
from awq_jax_kernels.aot.tpu import Compiled
from awq_jax_kernels.bench import __main__ as bench
from awq_jax_kernels.bench.cost import bf16_bound_us, kernel_cost, xla_cost
from awq_jax_kernels.chips import TPUS
from awq_jax_kernels.int4_matmul import pallas_tpu
from awq_jax_kernels.int4_matmul.config import BlockConfig, for_tpu
from awq_jax_kernels.tune.candidates import candidates
from tests.kernels.cases import LLAMA


def still(cycles=None, bundles=None):
    return Compiled(kernels=["k"], cycles=cycles and {"k": cycles}, bundles=bundles and {"k": bundles})


def test_a_kernel_is_limited_by_its_core_or_by_its_copies():
    config = BlockConfig("E", bm=512, bn=1024, tile=256)
    cost = lambda cycles: kernel_cost("v6e", config, still(cycles), 16, 4096, 14336, 128, zeros=True)
    idle, busy = cost(2000), cost(10**6)
    assert idle.hbm_us < idle.us < idle.hbm_us + 3, "copies, and what nothing hides"
    assert busy.core_us < busy.us < busy.core_us + busy.fill_us + 1e-6
    assert idle.source == "cycles"


def test_two_buffers_wait_for_each_copy_to_start():
    config = BlockConfig("E", bm=512, bn=1024, tile=256)
    cost = lambda c: kernel_cost("v6e", c, still(2000), 16, 4096, 14336, 128, zeros=True).us
    assert cost(dataclasses.replace(config, buffers=2)) > cost(config) + 13 * 0.3


def test_inside_a_step_x_and_y_wait_for_nothing():
    config = BlockConfig("E", bm=512, bn=1024, tile=256)
    cost = lambda inside: kernel_cost("v6e", config, still(2000), 16, 4096, 14336, 128, zeros=True, inside=inside)
    moved = 2 * 16 * (4096 + 14336)
    assert cost(False).fill_us - cost(True).fill_us == pytest.approx((2 * 600 / 1.751 + moved / 1640) / 1e3)


def test_the_last_tile_ends_sooner_than_the_last_block():
    config = BlockConfig("E", bm=512, bn=2048, tile=512, by_tile=True)
    cost = lambda c: kernel_cost("v6e", c, still(14000), 16, 4096, 14336, 128, zeros=True, inside=True).us
    assert cost(config) < cost(dataclasses.replace(config, by_tile=False))


def test_without_a_profile_bundles_count_by_loop_depth():
    config = BlockConfig("D", bm=512, bn=1024, tile=256)
    cost = kernel_cost("v7x", config, still(bundles=[10, 100, 1000]), 16, 4096, 14336, 128, zeros=True)
    assert cost.source == "bundles"
    assert cost.core_us == pytest.approx((10 + 100 + 14 * 1070) / 2.2e3)


def test_the_least_of_an_xla_program_is_its_bytes():
    compiled = Compiled(argument_bytes=819_000, estimated_cycles=1)
    cost = xla_cost("v5e", compiled, 1, 128, 128)
    assert cost is not None and cost.us == pytest.approx(1.0)
    assert xla_cost("v5e", Compiled(error="no"), 1, 128, 128) is None


def test_dumps_are_read(tmp_path):
    (tmp_path / "1-k.1-01-final_bundles.txt").write_text("   0x0   :  { a }\n   0x1 LB: > { b }\n")
    (tmp_path / "1-k.1-00-schedule-analysis_final_bundles.txt").write_text("no bundles here")
    (tmp_path / "x_static_llo_profile.textproto").write_text('hlo_op_name: "k.1"\n  estimated_cycles: 42\n')
    assert schedule.scheduled_bundles(tmp_path)["k.1"] == [1, 1]
    assert schedule.profile_cycles(tmp_path) == {"k.1": 42}


@pytest.mark.parametrize("generation", TPUS)
@pytest.mark.parametrize("k, n", LLAMA)
def test_candidates_and_tables_fit(generation, k, n):
    """What the tuner may choose and what it chose, the kernel takes."""
    of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    weight = of((k // 2, n), "int8"), of((k // 128, n), "bfloat16"), of((k // 128, n), "int8")
    for m in (1, 16, 64, 128, 512):
        tried = [] if generation == "v4" else candidates(generation, m, k, n)
        chosen = for_tpu(TPUS[generation], m, k, n, 128, zeros=True, exact=False)
        for config in (*tried, chosen):
            assert pallas_tpu.supports(of((m, k), "bfloat16"), *weight, config=config) is None


def test_bound_of_a_dense_product():
    assert bf16_bound_us("v5e", 1024, 4096, 4096) == pytest.approx(2 * 1024 * 4096**2 / 197e6, rel=1e-6)


def test_timing_runs_anywhere_in_interpret_mode(capsys):
    assert bench.main(["--interpret"]) == 0
    assert "ours" in capsys.readouterr().out
