# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel as the assembler sees it, compiled for a GPU that is not here, with the JAX installed here."""

import dataclasses

import pytest

from awq_jax_kernels.aot import gpu
from awq_jax_kernels.aot.program import Program
from awq_jax_kernels.bench import gpu_static
from awq_jax_kernels.int4_matmul.pallas_gpu import BlockConfig, derive

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(gpu.missing() is not None, reason=f"cannot compile for a GPU: {gpu.missing()}"),
]

K, N = 4096, 14336
BUDGET = {False: 2.6, True: 2.25}  # instructions per weight of the decode loop: on packed bytes, on tiles


def kernel_of(compiled):
    assert not compiled.error, compiled.error
    assert compiled.temp_bytes == 0, "a product needs no device memory beside its operands"
    (kernel,) = compiled.kernels
    assert kernel.spill_bytes == 0 and "LDL.32" not in kernel.loop
    assert kernel.loop["HGMMA"] == 16, "one step of 128 rows and 128 channels is sixteen products"
    return kernel


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("m", [1, 16])
def test_decode_stays_within_its_instructions(m, tiles):
    kernel = kernel_of(gpu.compile_program(gpu_static.program(m, K, N, tiles=tiles)))
    per_weight = gpu_static.counts(kernel, derive(m, K, N, 128, exact=False).step)
    assert sum(per_weight.values()) <= BUDGET[tiles], per_weight
    assert sum(per_weight.values()) - per_weight["uniform"] <= BUDGET[tiles] - 0.3, per_weight
    assert kernel.loop.get("LDS.128", 0) == (4 if tiles else 0)


@pytest.mark.parametrize(
    "config",
    [
        BlockConfig(8, split=2),
        BlockConfig(16, split=3),
        BlockConfig(128, deep=2, stages=5, split=3, scale_weight=True),
        BlockConfig(16, deep=2, stages=10),
        BlockConfig(16, wide=2, deep=2, stages=8),
        BlockConfig(32),
        BlockConfig(32, wide=2, deep=2, stages=7),
        BlockConfig(64, deep=2, stages=8, scale_weight=True),
        BlockConfig(64, wide=2, deep=1, stages=5, split=2, scale_weight=True),
        BlockConfig(128, deep=2, stages=5, scale_weight=True),
        BlockConfig(128, wide=2, deep=1, stages=4, split=2, scale_weight=True),
        BlockConfig(128, wide=2, deep=1, stages=4, scale_weight=True, persistent=True),
    ],
    ids=lambda c: "-".join(str(v) for v in dataclasses.astuple(c)[:6]),
)
@pytest.mark.parametrize("tiles", [False, True])
def test_every_cut_compiles_without_spills(config, tiles):
    kernel = kernel_of(gpu.compile_program(gpu_static.program(config.tokens, K, N, tiles=tiles, config=config)))
    if config.split > 1:
        begun, sent = (kernel.ptx.index(word) for word in ("barrier.cluster.wait", "st.shared::cluster"))
        assert begun < sent, "a block that has not begun has no shared memory to send to"


@pytest.mark.parametrize("config", [None, BlockConfig(64, deep=2, stages=8, scale_weight=True)])
@pytest.mark.parametrize(
    ("dtype", "scale_dtype", "zeros"), [("float16", "float16", True), ("bfloat16", "float32", False)]
)
def test_other_dtypes_compile(config, dtype, scale_dtype, zeros):
    more = {"dtype": dtype, "scale_dtype": scale_dtype, "zeros": zeros}
    kernel_of(gpu.compile_program(gpu_static.program(40, 1024, 256, tiles=False, config=config, **more)))


@pytest.mark.parametrize("g, scale_dtype", [(32, "float32"), (64, "float32"), (32, "bfloat16")])
def test_short_groups_compile(g, scale_dtype):
    """Of 32 rows, in a weight so narrow that it is split; ring, scales and sums together fill the shared memory."""
    kernel_of(gpu.compile_program(gpu_static.program(32, 1024, 1024, g=g, tiles=True, scale_dtype=scale_dtype)))


@pytest.mark.parametrize(
    ("m", "k", "n", "ends"),
    [
        (1, 4096, 6144, {"eps": 1e-5}),
        (16, 14336, 4096, {"adds": True, "offset": 1.0}),
        (1, 4096, 28672, {"eps": 1e-5, "activation": "silu"}),
        (32, 4096, 28672, {"eps": 1e-5, "activation": "gelu_tanh"}),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else str(value),
)
def test_what_lies_around_a_product_costs_its_loop_nothing(m, k, n, ends):
    program = Program("awq_jax_kernels.bench.gpu_static:between", {"m": m, "k": k, "n": n, **ends})
    kernel = kernel_of(gpu.compile_program(program))
    per_weight = gpu_static.counts(kernel, 128)
    assert sum(per_weight.values()) <= BUDGET[True] + (0.4 if m == 32 else 0), per_weight


@pytest.mark.parametrize(("stages", "waits"), [(7, 2), (8, 1)])
def test_a_slot_that_goes_from_reader_to_reader_is_waited_for_twice(stages, waits):
    """For the release of the one before and for its own bytes, see `tests/kernels/test_gpu_ring.py`."""
    config = BlockConfig(16, wide=2, deep=2, stages=stages)
    kernel = kernel_of(gpu.compile_program(gpu_static.program(16, K, N, tiles=True, config=config)))
    assert kernel.loop["SYNCS"] == waits + 1, "and it is released"


def test_a_loop_within_the_loop_over_tiles_costs_no_more():
    """A branch that threads could take differently would make every thread keep the ring's books for itself."""
    config = BlockConfig(128, wide=2, deep=1, stages=4, scale_weight=True)
    once, staying = (
        kernel_of(gpu.compile_program(gpu_static.program(1000, K, N, tiles=True, config=c)))
        for c in (config, dataclasses.replace(config, persistent=True))
    )
    assert "R2UR" not in staying.loop and sum(staying.loop.values()) <= sum(once.loop.values()) + 4


def test_a_product_in_flight_and_the_next_operand_share_no_registers():
    """The loop that keeps one product in flight makes two operands in turn; the second may not overwrite the first."""
    config = BlockConfig(64, deep=2, stages=8, scale_weight=True)
    kernel = kernel_of(gpu.compile_program(gpu_static.program(64, K, N, tiles=True, config=config)))
    operands = [line.split(",")[1].strip() for line in kernel.products]
    first, second = operands[:8], operands[8:]
    assert len(set(operands)) == 16 and not set(first) & set(second), operands


def test_a_program_that_fails_says_why():
    config = BlockConfig(128, deep=2, stages=9, scale_weight=True)
    compiled = gpu.compile_program(gpu_static.program(128, K, N, tiles=True, config=config))
    assert "shared memory" in compiled.error


@pytest.mark.parametrize(
    "sizes",
    [
        {"name": "add_norm", "rows": 1, "d": 4096},
        {"name": "add_norm", "rows": 64, "d": 5120, "dtype": "float16"},
        {"name": "gated", "rows": 16, "w": 28672},
        {"name": "decode_attention", "rows": 1, "heads": 32, "kv": 8, "d": 128, "positions": 1024},
        {"name": "decode_attention", "rows": 4, "heads": 14, "kv": 2, "d": 64, "positions": 512},
        {"name": "decode_attention", "rows": 16, "heads": 64, "kv": 8, "d": 128, "positions": 512, "dtype": "float16"},
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
def test_what_lies_between_products_is_one_launch_without_spills(sizes):
    compiled = gpu.compile_program(Program("awq_jax_kernels.bench.programs:small_gpu", sizes))
    assert not compiled.error, compiled.error
    assert compiled.temp_bytes == 0, "the cache is written where it lies"
    (kernel,) = compiled.kernels
    assert kernel.spill_bytes == 0
