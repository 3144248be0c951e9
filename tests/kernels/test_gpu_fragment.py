# SPDX-License-Identifier: Apache-2.0
"""What the Hopper kernel does to codes, without a GPU: orders of bytes, addresses, bit arithmetic, sharing of sums."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax_kernels.int4_matmul import pallas_gpu
from awq_jax_kernels.int4_matmul.pallas_gpu import BlockConfig, combine, derive
from awq_jax_kernels.int4_matmul.tiles import prepare
from awq_jax_kernels.nibbles import pack_numpy
from tests.kernels import hopper
from tests.kernels.cases import ALIGNED, LLAMA, ODD


@pytest.fixture
def codes(rng):
    return rng.integers(0, 16, (64, 128)).astype(np.uint8)


def test_a_tile_gives_each_thread_its_codes(rng, codes):
    zero = rng.integers(0, 16, 128)
    tile = np.asarray(prepare(jnp.asarray(pack_numpy(codes))))[0, 0]
    pairs, loads = hopper.from_tiles(tile)
    np.testing.assert_array_equal(hopper.a_operand(pairs, zero), codes.T - zero[:, None])
    assert [hopper.bank_passes(a, 16) for a in loads] == [1, 1]


def test_packed_bytes_give_the_same_operand(rng, codes):
    zero = rng.integers(0, 16, 128)
    pairs, loads = hopper.from_bytes(hopper.swizzle(pack_numpy(codes).view(np.uint8)))
    np.testing.assert_array_equal(hopper.a_operand(pairs, zero), codes.T - zero[:, None])
    assert {hopper.bank_passes(a, 4) for a in loads} == {1}


def test_threads_own_four_channels_each():
    owned = hopper.first_channel()[hopper.C == 0][:, None] + np.arange(4)
    assert sorted(owned.ravel()) == list(range(128))


def test_a_code_less_its_zero_is_exact_in_both_floats():
    """``(magic | q) - (magic + zero)`` for all 256 pairs, in the arithmetic of the dtype itself."""
    q, zero = np.arange(16), np.arange(16)[:, None]
    for dtype, magic, base in ((jnp.bfloat16, 0x4300, 128), (jnp.float16, 0x6400, 1024)):
        bits = jnp.asarray(magic | q, jnp.uint16)
        difference = jax.lax.bitcast_convert_type(bits, dtype) - jnp.asarray(base + zero, dtype)
        np.testing.assert_array_equal(difference.astype(jnp.float32), q - zero)


@pytest.mark.parametrize("tokens", [8, 16, 64, 120, 128])
@pytest.mark.parametrize(("deep", "split"), [(1, 1), (2, 1), (3, 2), (4, 4), (1, 2), (3, 3), (4, 3), (2, 3)])
def test_every_sum_has_one_owner_and_every_letter_its_own_box(tokens, deep, split):
    sharing = combine.Sharing(tokens, 1, deep, split)
    owned = [sharing.owned(holder) for holder in range(sharing.holders)]
    everything = list(itertools.product(range(tokens // 8), range(2)))
    assert sorted(itertools.chain(*owned)) == everything and max(map(len, owned)) <= sharing.share


def test_derived_blocks_cut_every_shape():
    for k, n in (*LLAMA, (4096, 4096), (8192, 28672), (1024, 128)):
        for m, g, exact in itertools.product((1, 8, 9, 33, 65, 129, 4096), (32, 64, 128, k), (False, True)):
            config = derive(m, k, n, g, exact=exact)
            assert (config.problem(k, n, g) is None) != (g == 32 and exact), (m, k, n, g, exact, config)


def test_tuned_blocks_fit_their_shapes():
    from awq_jax_kernels.int4_matmul.pallas_gpu import config
    from awq_jax_kernels.int4_matmul.tuned_table import tuned_rows

    for name in ("nvidia_h100", "nvidia_h200"):
        for key, row in tuned_rows(name).items():
            m, k, n = (int(word[1:]) for word in key.split())
            blocks = config.BlockConfig(**row)
            assert blocks.problem(k, n, 128) is None and config.tuned_key(m, k, n) == key


def operands(m=4, k=256, n=128, g=128, dtype="bfloat16", scale="bfloat16"):
    of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    return of((m, k), dtype), of((k // 2, n), "int8"), of((k // g, n), scale), None


@pytest.mark.parametrize("case", ALIGNED, ids=str)
def test_supports_what_the_kernels_are_for(case):
    assert pallas_gpu.supports(*operands(case.m, case.k, case.n, case.g)) is None


@pytest.mark.parametrize("case", ODD, ids=str)
def test_refuses_odd_shapes(case):
    assert "must be multiples of 128" in str(pallas_gpu.supports(*operands(case.m, case.k, case.n, case.g)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "x is float32"),
        ({"scale": "float64"}, "scale is float"),
        ({"m": 0}, "no rows"),
        ({"g": 16}, "groups of 16 rows"),
        ({"g": 32, "dtype": "float16"}, "scaled in float16"),
    ],
)
def test_refusals_name_their_reason(change, reason):
    if change.get("scale") == "float64":
        with jax.enable_x64(True):
            assert reason in str(pallas_gpu.supports(*operands(**change)))
    else:
        assert reason in str(pallas_gpu.supports(*operands(**change)))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BlockConfig(12), "tokens 8..128 in eights"),
        (BlockConfig(step=192), "step=192"),
        (BlockConfig(wide=2, deep=1), "multiple of 128 \\* wide=2"),
        (BlockConfig(split=4), "split=4"),
        (BlockConfig(64), "too many registers"),
        (BlockConfig(stages=2), "stages=2 are too few for 3"),
        (BlockConfig(64, deep=2, stages=2, scale_weight=True), "stages=2 are too few for 2"),
    ],
)
def test_refuses_blocks_that_do_not_fit(config, reason):
    assert re.search(reason, str(pallas_gpu.supports(*operands(), config=config)))


def test_an_ampere_gpu_is_refused_by_name(monkeypatch):
    class Device:
        compute_capability, device_kind = "8.0", "NVIDIA A100-SXM4-80GB"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert "A100" in str(pallas_gpu.supports(*operands()))
