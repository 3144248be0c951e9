# SPDX-License-Identifier: Apache-2.0
"""The kernel through the real compiler, for every TPU generation, on a machine that has none."""

import json
from pathlib import Path

import pytest

from awq_jax_kernels.aot.program import Program
from awq_jax_kernels.aot.tpu import compile_programs
from awq_jax_kernels.bench import report
from awq_jax_kernels.bench.cost import program
from awq_jax_kernels.chips import TPUS
from awq_jax_kernels.int4_matmul.config import derive, resident

pytestmark = pytest.mark.compile

BUDGET = json.loads(Path(__file__).with_name("budget_tpu.json").read_text())
SLACK = 1.03  # a point release of libtpu may schedule a little differently


@pytest.mark.parametrize("key", BUDGET)
def test_cost_stays_within_its_budget(key):
    """Keys are "generation m k n", values microseconds by the model of `awq_jax_kernels.bench.cost`.

    After an improvement, or with the reason for a regression in the commit, write what
    ``python -m awq_jax_kernels.bench --static --no-others`` prints.
    """
    generation, m, k, n = key.split()
    (row,) = report.static_rows(generation, [(int(k), int(n))], [int(m)], others=False)
    assert row.temp_bytes == 0
    assert row.us[0] is not None and row.us[0] <= BUDGET[key] * SLACK


@pytest.mark.parametrize("generation", TPUS)
def test_odd_sizes_compile_without_temporaries(generation):
    """Few rows, blocks that m does not fill, small groups, one group to a column, symmetric weights."""
    shapes = [(1, 512, 256, 128), (7, 256, 256, 64), (33, 256, 384, 32), (5, 384, 384, 384), (600, 256, 256, 128)]
    programs = []
    for m, k, n, g in shapes:
        config = derive(m, k, n, g, tpu=TPUS[generation], exact=False)
        for zeros in (True, False):
            programs.append(program("ours", m=m, k=k, n=n, g=g, zeros=zeros, config=vars(config)))
    for shape, compiled in zip(programs, compile_programs(programs, generation, profile=False), strict=True):
        assert not compiled.error, f"{shape}: {compiled.error}"
        assert compiled.temp_bytes == 0


@pytest.mark.parametrize("generation", TPUS)
def test_a_product_that_makes_its_own_x_compiles(generation):
    programs = []
    for (m, k, n), gate in (((1, 512, 128), "silu"), ((16, 3584, 128), "gelu_tanh")):
        config = derive(m, k, n, 128, tpu=TPUS[generation], exact=False)
        assert resident(config, m, 2 * k, n)
        programs.append(program("ours", m=m, k=k, n=n, gate=gate, config=vars(config)))
    for compiled in compile_programs(programs, generation, profile=False):
        assert not compiled.error and compiled.temp_bytes == 0, compiled.error


@pytest.mark.parametrize("generation", TPUS)
def test_add_norm_compiles_without_temporaries(generation):
    programs = [Program("awq_jax_kernels.add_norm.cost:program", {"m": m, "d": 4096}) for m in (1, 16, 48)]
    for compiled in compile_programs(programs, generation, profile=False):
        assert not compiled.error and len(compiled.kernels) == 1
        assert compiled.temp_bytes < 1 << 16  # the weight as a row


@pytest.mark.parametrize("generation", TPUS)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_decode_attention_compiles_and_writes_the_cache_in_place(generation, dtype):
    """All of an 8B model's heads, and one share of eight."""
    options = {"d": 128, "scale": 0.1, "window": None, "softcap": None, "dtype": dtype}
    forms = [{"batch": 16, "heads": 32, "kv": 8, "positions": 512, "span": 512}]
    forms.append({"batch": 3, "heads": 4, "kv": 1, "positions": 2048, "span": 1024})
    programs = [Program("awq_jax_kernels.decode_attention.cost:attention", {**form, **options}) for form in forms]
    for form, compiled in zip(forms, compile_programs(programs, generation, profile=False), strict=True):
        assert not compiled.error, f"{form}: {compiled.error}"
        # Nothing is donated here, so the cache is an output of its own; beside it there is room for little.
        assert compiled.temp_bytes < form["batch"] * form["positions"] * form["kv"] * 128


def test_a_program_that_does_not_compile_is_a_result():
    broken = Program("awq_jax_kernels.bench.programs:nothing")
    (compiled,) = compile_programs([broken], "v5e")
    assert "AttributeError" in compiled.error
