# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from awq_jax import QTensor, dequantize
from awq_jax_convert.autoawq import AutoAWQ, decode, encode, pack, unpack
from awq_jax_convert.codecs import codec_of
from awq_jax_convert.safetensors_dir import TensorMeta
from awq_jax_kernels.nibbles import pack_numpy, unpack_numpy

# 64 outputs, 256 inputs, groups of 128; codes and words come from two independent packers that agree.
GOLDEN = np.load(Path(__file__).with_name("golden_int4_formats.npz"))
CONFIG = {"quant_method": "awq", "zero_point": True, "group_size": 128, "bits": 4, "version": "gemm"}


def golden_parts() -> dict[str, np.ndarray]:
    return {part: GOLDEN[f"awq_gemm_{part}"] for part in ("qweight", "qzeros", "scales")}


def some_weight(rng: np.random.Generator, k: int = 32, n: int = 16, g: int = 8, **changes: object) -> QTensor:
    fields = {
        "packed": rng.integers(-128, 128, (k // 2, n), np.int8),
        "scale": rng.uniform(0.01, 1, (k // g, n)).astype(np.float16),
        "zero": rng.integers(0, 16, (k // g, n)).astype(np.int8),
    }
    return QTensor(**{**fields, **changes})


def test_golden_words_hold_the_golden_codes():
    np.testing.assert_array_equal(unpack(GOLDEN["awq_gemm_qweight"]), GOLDEN["codes_out_in"].T)
    np.testing.assert_array_equal(unpack(GOLDEN["awq_gemm_qzeros"]), GOLDEN["zeros_out_grp"].T)
    np.testing.assert_array_equal(pack(GOLDEN["codes_out_in"].T.astype(np.uint8)), GOLDEN["awq_gemm_qweight"])


def test_golden_parts_decode_to_the_weight_and_encode_back():
    weight = decode("w", golden_parts())
    scale, zero = (np.repeat(GOLDEN[key], 128, axis=1) for key in ("scales_out_grp", "zeros_out_grp"))
    np.testing.assert_allclose(
        dequantize(jax.tree.map(jnp.asarray, weight)), ((GOLDEN["codes_out_in"] - zero) * scale).T, rtol=1e-6
    )
    for part, array in golden_parts().items():
        again = encode("m", weight)[f"m.{part}"]
        assert again.dtype == array.dtype
        np.testing.assert_array_equal(again, array)


@given(
    arrays(np.uint8, st.tuples(st.integers(0, 5), st.integers(0, 4).map(lambda c: 8 * c)), elements=st.integers(0, 15))
)
def test_unpack_inverts_pack(codes):
    np.testing.assert_array_equal(unpack(pack(codes)), codes)


@given(arrays(np.int32, st.tuples(st.integers(0, 5), st.integers(0, 4))))
def test_pack_inverts_unpack(words):
    np.testing.assert_array_equal(pack(unpack(words)), words)


def test_encode_and_decode_are_inverse(rng):
    for weight in (some_weight(rng), some_weight(rng, zero=None)):
        parts = {name.rpartition(".")[2]: array for name, array in encode("m", weight).items()}
        again = decode("m", parts)
        np.testing.assert_array_equal(again.packed, weight.packed)
        np.testing.assert_array_equal(again.scale, weight.scale)
        assert (again.zero is None) == (weight.zero is None)
        np.testing.assert_array_equal(unpack(parts["qzeros"]), 8 if weight.zero is None else weight.zero)


def test_packing_needs_eights(rng):
    with pytest.raises(ValueError, match=r"12 outputs are not a multiple of 8"):
        pack(np.zeros((2, 12), np.uint8))
    with pytest.raises(ValueError, match=r"'m' of shape \(32, 12\) has 12 outputs; AutoAWQ needs a multiple of 8"):
        encode("m", some_weight(rng, n=12))


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, 1e-9, 1e9])
def test_scales_are_checked_after_the_cast(rng, value):
    scale = np.ones((4, 16), np.float32)
    scale[1, 2] = value
    with pytest.raises(ValueError, match=r"1 of 64 scales of 'm' are not finite and positive in float16"):
        encode("m", some_weight(rng, scale=scale), round_scales=True)


def test_scales_are_rounded_on_request_only(rng):
    exact = some_weight(rng, scale=np.full((4, 16), 0.3, ml_dtypes.bfloat16))
    assert encode("m", exact)["m.scales"].dtype == np.float16  # every ordinary bfloat16 fits
    lossy = some_weight(rng, scale=np.full((4, 16), 0.3, np.float32))
    with pytest.raises(ValueError, match=r"scales of 'm' are float32 and lose precision in float16"):
        encode("m", lossy)
    assert encode("m", lossy, round_scales=True)["m.scales"][0, 0] == np.float16(0.3)


def test_damaged_scales_are_refused():
    parts = golden_parts()
    parts["scales"] = parts["scales"].copy()
    parts["scales"][0, :3] = np.nan
    with pytest.raises(ValueError, match=r"3 of 128 scales of 'm' are NaN or infinite"):
        decode("m", parts)


def test_config_round_trip():
    codec = AutoAWQ(64, ("lm_head",))
    assert AutoAWQ.from_config(codec.to_config()) == codec
    assert codec.to_config()["zero_point"] is True
    assert AutoAWQ.from_config({**CONFIG, "modules_to_not_convert": None, "do_fuse": False}) == AutoAWQ(128)
    assert AutoAWQ.from_config({"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}) == AutoAWQ(128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "gemm2"}, "AWQ version 'gemm2' is not read; gemm, gemv"),
        ({"version": "marlin"}, "version 'marlin'"),
        ({"version": None}, "version None"),
        ({"bits": 3}, "bits=3 is not read; 4 is"),
        ({"bits": 4.0}, "bits=4.0"),
        ({"group_size": 0}, "group_size=0 is not read"),
        ({"group_size": "128"}, "group_size='128'"),
        ({"act_order": True}, "not understood: act_order"),
        ({"modules_to_not_convert": 5}, "modules_to_not_convert is 5; it is a list"),
        ({"modules_to_not_convert": [0.5]}, r"modules_to_not_convert is \[0\.5\]"),
        ({"quant_method": "aqlm"}, "quantized with 'aqlm', which is not read; read are awq"),
        ({"quant_method": None}, "quantized with None"),
    ],
)
def test_unknown_formats_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        codec_of({**CONFIG, **change})


def metas(k: int = 256, n: int = 64, g: int = 128, **changes: TensorMeta) -> dict[str, TensorMeta]:
    found = {
        "qweight": TensorMeta("I32", (k, n // 8), 0),
        "qzeros": TensorMeta("I32", (k // g, n // 8), 0),
        "scales": TensorMeta("F16", (k // g, n), 0),
    }
    return {**found, **changes}


def test_shapes_come_from_headers():
    assert AutoAWQ(128).shape("m", metas()) == (256, 64)
    assert AutoAWQ(-1).shape("m", metas(g=256)) == (256, 64)


@pytest.mark.parametrize(
    ("group_size", "found", "message"),
    [
        (64, metas(), "do not fit group_size=64"),
        (96, metas(), "do not fit group_size=96"),
        (128, metas(scales=TensorMeta("F16", (2, 65), 0)), "do not fit"),
        (128, metas(scales=TensorMeta("BF16", (2, 64), 0)), "expected I32, I32 and F16"),
        (128, metas(qweight=TensorMeta("I16", (256, 8), 0)), "not AutoAWQ gemm: qweight I16"),
        (128, {"qweight": metas()["qweight"]}, "'m' lacks qzeros, scales"),
        (128, metas(qweight=TensorMeta("I32", (0, 8), 0)), "do not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(group_size, found, message):
    with pytest.raises(ValueError, match=message):
        AutoAWQ(group_size).shape("m", found)


def test_one_group_size_for_a_checkpoint(rng):
    weight = some_weight(rng)
    assert AutoAWQ(8).encode("m", weight).keys() == {"m.qweight", "m.qzeros", "m.scales"}
    with pytest.raises(ValueError, match=r"'m' has group_size=8, the checkpoint 16"):
        AutoAWQ(16).encode("m", weight)
    with pytest.raises(ValueError, match=r"'m' has group_size=8, the checkpoint -1"):
        AutoAWQ(-1).encode("m", weight)


def test_skipped_modules_match_by_substring():
    codec = AutoAWQ(128).skipping(["model.layers.1.mlp.gate"], ["model.layers.11.mlp.gate"])
    assert codec.skip == ("model.layers.1.mlp.gate",)
    with pytest.raises(ValueError, match=r"'mlp.gate' stays dense and 'model.mlp.gate_proj' is quantized"):
        AutoAWQ(128).skipping(["mlp.gate"], ["model.mlp.gate_proj"])


def test_canonical_bytes_are_codes_minus_eight():
    packed = decode("w", golden_parts()).packed
    np.testing.assert_array_equal(packed, pack_numpy(unpack_numpy(packed)))
    np.testing.assert_array_equal(unpack_numpy(packed), GOLDEN["codes_out_in"].T)
