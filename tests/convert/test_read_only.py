# SPDX-License-Identifier: Apache-2.0
"""Formats that are only read: the golden words are the golden weight."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from awq_jax import QTensor
from awq_jax_convert.awq_gemv import AWQFast, AWQGemv, unpack_fast
from awq_jax_convert.codec import Codec
from awq_jax_convert.codecs import codec_of
from awq_jax_convert.gptq import GPTQ
from awq_jax_convert.safetensors_dir import TensorMeta
from awq_jax_convert.safetensors_header import dtype_name
from awq_jax_convert.stored import dequantized
from awq_jax_kernels.nibbles import unpack_numpy
from tests.convert.foreign import sequential

GOLDEN = np.load(Path(__file__).with_name("golden_int4_formats.npz"))
CODES, ZEROS, SCALES = GOLDEN["codes_out_in"].T, GOLDEN["zeros_out_grp"].T, GOLDEN["scales_out_grp"].T
GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}


def gptq_parts(offset: int = 1, bits: int = 4) -> dict[str, np.ndarray]:
    return {
        "qweight": GOLDEN["gptq_qweight"],
        "qzeros": sequential((ZEROS - offset).astype(np.int64) & 15),
        "scales": SCALES.astype(np.float16),
        "g_idx": (np.arange(256) // 128).astype(np.int32),
    }


def gemv_parts() -> dict[str, np.ndarray]:
    scales = np.zeros((64, 8), np.float16)
    scales[:, :2] = GOLDEN["scales_out_grp"]
    return {"qweight": GOLDEN["awq_gemv_qweight"], "qzeros": GOLDEN["awq_gemv_qzeros"], "scales": scales}


def fast_parts(zeros: str = "qzeros") -> dict[str, np.ndarray]:
    return {
        "qweight": GOLDEN["llmawq_qweight_i16"],
        zeros: GOLDEN["llmawq_scaled_zeros"],
        "scales": GOLDEN["llmawq_scales"],
    }


CASES: dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]] = {
    "gptq": (GPTQ_CONFIG, gptq_parts()),
    "gptq without g_idx": (GPTQ_CONFIG, {k: v for k, v in gptq_parts().items() if k != "g_idx"}),
    "gptq_v2": ({**GPTQ_CONFIG, "checkpoint_format": "gptq_v2"}, gptq_parts(offset=0)),
    "gemv": ({**AWQ_CONFIG, "version": "gemv"}, gemv_parts()),
    "gemv_fast": ({**AWQ_CONFIG, "version": "gemv_fast"}, fast_parts()),
    "llm-awq": ({**AWQ_CONFIG, "version": "gemv", "backend": "llm-awq"}, fast_parts("scaled_zeros")),
}


def metas_of(parts: dict[str, np.ndarray]) -> dict[str, TensorMeta]:
    return {part: TensorMeta(str(dtype_name(array.dtype)), array.shape, array.nbytes) for part, array in parts.items()}


@pytest.mark.parametrize("case", CASES)
def test_golden_words_are_the_golden_weight(case):
    config, parts = CASES[case]
    codec = codec_of(config)
    assert isinstance(codec, Codec) and codec.shape("m", metas_of(parts)) == (256, 64)
    scheme = codec.scheme("m", parts)
    assert (scheme.bits, scheme.group_size, scheme.symmetric) == (4, 128, False)
    weight = codec.decode("m", parts)
    assert isinstance(weight, QTensor)
    np.testing.assert_array_equal(unpack_numpy(weight.packed), CODES)
    np.testing.assert_array_equal(weight.zero, ZEROS)
    np.testing.assert_array_equal(weight.scale, SCALES.astype(np.float16))


def test_fast_layout_is_a_permutation(rng):
    words = rng.integers(-(2**15), 2**15, (4, 128)).astype(np.int16)
    counts = np.bincount(unpack_fast(words).ravel(), minlength=16)
    raw = words.view(np.uint16)
    wanted = sum(np.bincount((raw >> np.uint16(4 * place) & 15).ravel(), minlength=16) for place in range(4))
    np.testing.assert_array_equal(counts, wanted)


@pytest.mark.parametrize("bits", [2, 8])
def test_gptq_of_other_widths(rng, bits):
    half, codes = 2 ** (bits - 1), rng.integers(0, 2**bits, (64, 16))
    parts = {
        "qweight": np.ascontiguousarray(sequential(codes.T, bits).T),
        "qzeros": sequential(np.full((2, 16), half - 1), bits),
        "scales": rng.uniform(0.5, 1, (2, 16)).astype(np.float16),
    }
    codec = GPTQ.from_config({**GPTQ_CONFIG, "bits": bits, "group_size": 32, "sym": True})
    assert codec.shape("m", metas_of(parts)) == (64, 16)
    found = codec.decode("m", parts)
    assert found.zero is None and found.bits == bits and found.group_size == 32
    np.testing.assert_array_equal(dequantized(found), (codes - half) * parts["scales"].astype(np.float32).repeat(32, 0))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"desc_act": True}, r"GPTQ in activation order \(desc_act\) is not read"),
        ({"bits": 5}, "bits=5 is not read"),
        ({"bits": True}, "bits=True"),
        ({"group_size": 0}, "group_size=0"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({"checkpoint_format": ["gptq"]}, "checkpoint_format="),
        ({"dynamic": {"-:.*": {}}}, "dynamic="),
        ({"lm_head": True}, "lm_head=True"),
        ({"pack_dtype": "int8"}, "pack_dtype='int8'"),
    ],
)
def test_gptq_configs_that_are_not_read(changed, said):
    with pytest.raises(ValueError, match=said):
        codec_of({**GPTQ_CONFIG, **changed})


def test_activation_order_is_found_in_the_tensors_too():
    codec, parts = GPTQ.from_config(GPTQ_CONFIG), gptq_parts()
    parts["g_idx"] = parts["g_idx"][::-1].copy()
    with pytest.raises(ValueError, match="'m' is quantized in activation order: g_idx does not follow"):
        codec.decode("m", parts)


def test_a_zero_that_programs_disagree_on_is_refused():
    codec, parts = GPTQ.from_config(GPTQ_CONFIG), gptq_parts()
    parts["qzeros"] = np.full_like(parts["qzeros"], -1)
    with pytest.raises(ValueError, match="'m' has zeros of 16 with codes of 4 bits"):
        codec.decode("m", parts)


def test_zeros_that_their_products_do_not_tell_are_refused():
    parts = fast_parts()
    parts["qzeros"] = parts["qzeros"].copy()
    parts["qzeros"][0, :5] *= np.float16(1.03)
    with pytest.raises(ValueError, match="zeros of 'm' can't be told from their products"):
        AWQFast(128).decode("m", parts)


BROKEN = [
    (GPTQ.from_config(GPTQ_CONFIG), gptq_parts(), "qweight"),
    (GPTQ.from_config(GPTQ_CONFIG), gptq_parts(), "scales"),
    (AWQGemv(128), gemv_parts(), "qzeros"),
    (AWQGemv(128), gemv_parts(), "scales"),
    (AWQFast(128), fast_parts(), "qweight"),
    (AWQFast(128), fast_parts(), "qzeros"),
]


@pytest.mark.parametrize(("codec", "parts", "part"), BROKEN)
@pytest.mark.parametrize("how", ["missing", "dtype", "shape", "rank", "empty"])
def test_headers_that_do_not_fit_are_refused(codec, parts, part, how):
    metas = metas_of(parts)
    meta = metas.pop(part)
    changed = {
        "dtype": meta._replace(dtype="U8"),
        "shape": meta._replace(shape=(meta.shape[0], meta.shape[1] + 1)),
        "rank": meta._replace(shape=meta.shape[:1]),
        "empty": meta._replace(shape=(0, meta.shape[1])),
    }
    metas |= {part: changed[how]} if how in changed else {}
    with pytest.raises(ValueError, match="'m'"):
        codec.shape("m", metas)
