# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors' W8A8 files: bytes as they are, the config that vLLM and transformers read, refusals by name."""

import copy
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from awq_jax import QTensor
from awq_jax_convert.codecs import codec_of
from awq_jax_convert.int_quantized import IntQuantized
from awq_jax_convert.safetensors_dir import TensorMeta
from awq_jax_convert.safetensors_header import dtype_name
from awq_jax_convert.scheme import Scheme

# As llm-compressor writes it for SmoothQuant and GPTQ, W8A8, with compressed-tensors 0.19.0.
CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "global_compression_ratio": None,
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.19.0",
    "config_groups": {
        "group_0": {
            "format": "int-quantized",
            "targets": ["Linear"],
            "output_activations": None,
            "input_activations": {
                "actorder": None,
                "block_structure": None,
                "dynamic": True,
                "group_size": None,
                "num_bits": 8,
                "observer": None,
                "observer_kwargs": {},
                "scale_dtype": None,
                "strategy": "token",
                "symmetric": True,
                "type": "int",
                "zp_dtype": None,
            },
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": None,
                "num_bits": 8,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "channel",
                "symmetric": True,
                "type": "int",
            },
        }
    },
}
STATIC = {"strategy": "tensor", "dynamic": False}


def config(inputs: dict[str, Any] | None = None, weights: dict[str, Any] | None = None, **whole: Any) -> dict[str, Any]:
    made = {**copy.deepcopy(CONFIG), **whole}
    group = made["config_groups"]["group_0"]
    group["input_activations"] |= inputs or {}
    group["weights"] |= weights or {}
    return made


def metas_of(parts: dict[str, np.ndarray]) -> dict[str, TensorMeta]:
    return {
        part: TensorMeta(dtype_name(array.dtype) or "?", array.shape, array.nbytes) for part, array in parts.items()
    }


def parts_of(rng: np.random.Generator, k: int = 24, n: int = 10) -> dict[str, np.ndarray]:
    scale = rng.uniform(0.5, 1, (n, 1)).astype(ml_dtypes.bfloat16)
    return {"weight": rng.integers(-128, 128, (n, k)).astype(np.int8), "weight_scale": scale}


@pytest.mark.parametrize("kind", ["token", "tensor"])
def test_bytes_are_codes_and_come_back(rng, kind):
    codec = codec_of(config(STATIC if kind == "tensor" else None))
    assert isinstance(codec, IntQuantized)
    parts = parts_of(rng) | ({"input_scale": np.array([0.25], np.float32)} if kind == "tensor" else {})
    assert codec.shape("m", metas_of(parts)) == (24, 10)
    assert codec.scheme("m", parts) == Scheme(8, -1, True, kind)
    weight = codec.decode("m", parts)
    assert (weight.shape, weight.bits, weight.activations) == ((24, 10), 8, kind)
    np.testing.assert_array_equal(weight.packed, parts["weight"].T)
    if kind == "tensor":
        np.testing.assert_array_equal(weight.input_scale, np.full((1, 10), 0.25, np.float32))
    again = {name.rpartition(".")[2]: array for name, array in codec.encode("m", weight).items()}
    assert again.keys() == parts.keys()
    jax.tree.map(np.testing.assert_array_equal, again, parts)
    assert {part: array.dtype for part, array in again.items()} == {part: array.dtype for part, array in parts.items()}


@pytest.mark.parametrize("kind", ["token", "tensor"])
def test_what_is_written_is_what_llm_compressor_writes(kind):
    codec = IntQuantized().skipping(["lm_head"], {"a": Scheme(8, 24, True, kind), "b": Scheme(8, 48, True, kind)})
    made, theirs = codec.to_config(), config(STATIC if kind == "tensor" else None)
    assert codec_of(made) == codec_of(theirs) == codec
    group, wanted = (found["config_groups"]["group_0"] for found in (made, theirs))
    assert group["targets"] == ["Linear"] and made["format"] == "int-quantized" and made["ignore"] == ["lm_head"]
    if kind == "token":
        assert group["weights"] == wanted["weights"]
        assert group["input_activations"].items() <= wanted["input_activations"].items()


def test_eight_bit_weights_alone_are_read_from_bytes_too(rng):
    made = config(weights={"strategy": "group", "group_size": 8})
    made["config_groups"]["group_0"]["input_activations"] = None
    codec = codec_of(made)
    parts = parts_of(rng) | {"weight_scale": np.ones((10, 3), np.float16)}
    assert codec is not None and codec.shape("m", metas_of(parts)) == (24, 10)
    weight = codec.decode("m", parts)
    assert (weight.activations, weight.group_size) == ("float", 8)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (config({"num_bits": 4}), "input_activations of 4 bits"),
        (config({"type": "float"}), "type 'float'"),
        (config({"symmetric": False}), "symmetric int8 is read"),
        (config({"strategy": "tensor"}), "strategy 'tensor', dynamic True"),
        (config({"strategy": "group", "group_size": 8}), "strategy 'group'"),
        (config({"surprise": 1}), "attributes that are not understood: surprise"),
        (config(weights={"symmetric": False}), "'int-quantized' is read with symmetric weights of 8 bits"),
        (config(weights={"num_bits": 4}), "not int4 column symmetric"),
        (config(weights={"strategy": "group", "group_size": 8}), "one scale a column of weights"),
        (config(format="pack-quantized"), "has the format 'int-quantized' and the whole 'pack-quantized'"),
        (config(format="float-quantized"), "'float-quantized'"),
    ],
)
def test_configs_that_are_not_read(made, message):
    with pytest.raises(ValueError, match=message):
        codec_of(made)


def test_packed_words_have_no_int8_activations():
    made = config(format="pack-quantized")
    made["config_groups"]["group_0"]["format"] = None
    with pytest.raises(ValueError, match="quantizes activations, and the format is 'pack-quantized'"):
        codec_of(made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.zeros((10, 24), np.uint8)}, "do not fit int8 codes"),
        ({"weight_scale": np.ones((10, 2), np.float16)}, "weight_scale F16"),
        ({"weight_scale": np.ones((9, 1), np.float16)}, "do not fit"),
        ({"input_scale": np.ones(1, np.float32)}, "has input_scale, weight, weight_scale, its scheme asks for weight"),
    ],
)
def test_tensors_that_do_not_fit(rng, change, message):
    codec = codec_of(CONFIG)
    assert codec is not None
    with pytest.raises(ValueError, match=message):
        codec.shape("m", metas_of(parts_of(rng) | change))
    static = codec_of(config(STATIC))
    assert static is not None
    with pytest.raises(ValueError, match="its scheme asks for input_scale"):
        static.shape("m", metas_of(parts_of(rng)))


def test_damaged_scales_and_other_weights_are_refused(rng):
    codec = codec_of(CONFIG)
    assert isinstance(codec, IntQuantized)
    parts = parts_of(rng)
    parts["weight_scale"][0] = np.nan
    with pytest.raises(ValueError, match="1 of 10 scales of 'm' are NaN"):
        codec.decode("m", parts)
    four = QTensor(packed=np.zeros((12, 10), np.int8), scale=np.ones((1, 10), np.float16))
    with pytest.raises(ValueError, match="'m' is not a symmetric weight of 8 bits"):
        codec.encode("m", four)
    with pytest.raises(ValueError, match="1 of 10 scales of 'm' are not finite and positive"):
        scale = np.ones((1, 10), np.float16)
        scale[0, 3] = 0
        codec.encode("m", QTensor(packed=np.zeros((24, 10), np.int8), scale=scale, bits=8))
