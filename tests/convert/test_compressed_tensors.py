# SPDX-License-Identifier: Apache-2.0
import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from awq_jax import QTensor, dequantize
from awq_jax_convert.codecs import codec_of
from awq_jax_convert.compressed_tensors import CompressedTensors, decode, encode
from awq_jax_convert.compressed_tensors_config import read_groups
from awq_jax_convert.int_quantized import IntQuantized
from awq_jax_convert.safetensors_dir import TensorMeta
from awq_jax_convert.safetensors_header import dtype_name
from awq_jax_convert.scheme import Scheme
from awq_jax_convert.stored import dequantized
from awq_jax_kernels.nibbles import pack_numpy, unpack_numpy

GOLDEN = np.load(Path(__file__).with_name("golden_int4_formats.npz"))
CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128},
        }
    },
}


def golden_parts() -> dict[str, np.ndarray]:
    names = ("weight_packed", "weight_zero_point", "weight_scale")
    return {part: GOLDEN[f"ct_{part}"] for part in names} | {"weight_shape": np.array([64, 256])}


def config(**weights: Any) -> dict[str, Any]:
    made = copy.deepcopy(CONFIG)
    made["config_groups"]["group_0"]["weights"] |= weights
    return made


def metas_of(parts: dict[str, np.ndarray]) -> dict[str, TensorMeta]:
    return {
        part: TensorMeta(dtype_name(array.dtype) or "?", array.shape, array.nbytes) for part, array in parts.items()
    }


def parts_of(encoded: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.rpartition(".")[2]: array for name, array in encoded.items()}


def test_golden_tensors_are_the_golden_weight_and_come_back():
    codec = codec_of(CONFIG)
    assert isinstance(codec, CompressedTensors)
    assert codec.shape("m", metas_of(golden_parts())) == (256, 64)
    weight = codec.decode("m", golden_parts())
    assert isinstance(weight, QTensor) and weight.group_size == 128
    np.testing.assert_array_equal(unpack_numpy(weight.packed), GOLDEN["codes_out_in"].T)
    np.testing.assert_array_equal(weight.zero, GOLDEN["zeros_out_grp"].T)
    again = parts_of(codec.encode("m", weight))
    for part, array in golden_parts().items():
        assert again[part].dtype == array.dtype
        np.testing.assert_array_equal(again[part], array)


def some_weight(rng: np.random.Generator, bits: int, groups: int, symmetric: bool, dtype: Any, n: int = 24) -> QTensor:
    """A weight ``[48, n]`` of random codes; symmetric ones lie around 8."""
    low = 8 - 2 ** (bits - 1) if symmetric else 0
    codes = rng.integers(low, low + 2**bits, (48, n)).astype(np.uint8)
    zero = None if symmetric else rng.integers(0, 2**bits, (groups, n)).astype(np.int8)
    scale = rng.uniform(0.5, 1, (groups, n)).astype(dtype)
    return QTensor(packed=pack_numpy(codes), scale=scale, zero=zero, bits=bits)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "groups"), [(4, 3), (4, 1), (2, 3)])
@pytest.mark.parametrize("n", [24, 13])  # zeros fill their words, or not
def test_encode_and_decode_are_inverse(rng, dtype, symmetric, bits, groups, n):
    weight = some_weight(rng, bits, groups, symmetric, dtype, n)
    size = -1 if groups == 1 else 16
    codec = CompressedTensors(group_size=size, symmetric=symmetric).skipping([], {"m": Scheme(bits, 16, symmetric)})
    parts = parts_of(codec.encode("m", weight))
    assert codec.scheme("m", parts) == Scheme(bits, size, symmetric)
    assert codec.shape("m", metas_of(parts)) == (48, n)
    again = codec.decode("m", parts)
    jax.tree.map(np.testing.assert_array_equal, again, weight)
    assert isinstance(again, QTensor) and again.bits == bits and again.scale.dtype == weight.scale.dtype


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_stored_is_the_code_above_the_middle(rng, symmetric):
    """By the format's own definition: ``w = (packed - 2**(b-1) - zero) * scale`` with zero stored the same way."""
    weight = some_weight(rng, 2, 3, symmetric, np.float32, 16)
    parts = parts_of(encode("m", weight, symmetric=symmetric))
    places = np.arange(0, 32, 2, dtype=np.uint32)
    codes = (parts["weight_packed"].view(np.uint32)[..., None] >> places & 3).reshape(16, 48)
    zero = np.zeros((16, 3))
    if not symmetric:
        words = np.ascontiguousarray(parts["weight_zero_point"].T).view(np.uint32)
        zero = (words[..., None] >> places & 3).reshape(3, 16).T - 2.0
    dense = (codes - 2.0 - zero.repeat(16, 1)) * parts["weight_scale"].repeat(16, 1)
    np.testing.assert_allclose(dense.T, dequantize(jax.tree.map(jnp.asarray, weight)), rtol=1e-6)


def test_zeros_of_the_middle_stand_in_where_the_checkpoint_has_zeros(rng):
    weight = some_weight(rng, 4, 3, True, np.float16)
    parts = parts_of(encode("m", weight, symmetric=False))
    assert np.unique(parts["weight_zero_point"].view(np.uint32)).tolist() == [0x88888888]
    with pytest.raises(ValueError, match="'m' has zeros, the checkpoint is to be symmetric"):
        encode("m", decode_asymmetric(parts), symmetric=True)


def decode_asymmetric(parts: dict[str, np.ndarray]) -> QTensor:
    found = decode("m", parts, Scheme(4, 16, False))
    assert isinstance(found, QTensor)
    return found


@pytest.mark.parametrize("symmetric", [False, True])
def test_eight_bits_are_the_codes_that_the_words_hold(rng, symmetric):
    codes, zero = rng.integers(0, 256, (5, 32)).astype(np.uint8), rng.integers(0, 256, (5, 2)).astype(np.uint8)
    scale = rng.uniform(0.5, 1, (5, 2)).astype(ml_dtypes.bfloat16)
    padded = np.ascontiguousarray(np.pad(zero.T, ((0, 0), (0, 3))))
    parts = {
        "weight_packed": codes.view("<i4"),
        "weight_scale": scale,
        "weight_shape": np.array([5, 32]),
    } | ({} if symmetric else {"weight_zero_point": padded.view("<i4").T})
    codec = codec_of(config(num_bits=8, group_size=16, symmetric=symmetric))
    assert codec is not None and codec.shape("m", metas_of(parts)) == (32, 5)
    middle = np.full((5, 2), 128.0) if symmetric else zero.astype(np.float64)
    dense = (codes - middle.repeat(16, 1)) * scale.astype(np.float64).repeat(16, 1)
    weight = codec.decode("m", parts)
    assert isinstance(weight, QTensor) and weight.bits == 8 and weight.group_size == 16
    np.testing.assert_array_equal(weight.packed.astype(int), codes.T.astype(int) - 128)
    np.testing.assert_array_equal(dequantize(jax.tree.map(jnp.asarray, weight)), dense.T)  # exact in float32
    np.testing.assert_array_equal(dequantized(weight), dense.T)
    again = parts_of(encode("m", weight, symmetric=symmetric))
    assert again.keys() == parts.keys()
    jax.tree.map(np.testing.assert_array_equal, again, parts)


def test_three_bits_are_read_in_both_layouts_and_not_written(rng):
    signed = GOLDEN["ct_int3_codes"]
    stored, scale = (signed + 4).astype(np.uint8), np.ones((8, 4), np.float16)
    loose = np.zeros((8, 7), np.uint32)
    for i in range(64):  # ten codes to a word, as before May 2026
        loose[:, i // 10] |= stored[:, i].astype(np.uint32) << np.uint32(3 * (i % 10))
    for packed in (GOLDEN["ct_int3_packed"], loose.view("<i4")):
        parts = {"weight_packed": packed, "weight_scale": scale, "weight_shape": np.array([8, 64])}
        codec = codec_of(config(num_bits=3, group_size=16, symmetric=True))
        assert codec is not None and codec.shape("m", metas_of(parts)) == (64, 8)
        weight = codec.decode("m", parts)
        assert isinstance(weight, QTensor) and weight.bits == 3
        np.testing.assert_array_equal(unpack_numpy(weight.packed).astype(int) - 8, signed.T)
        with pytest.raises(ValueError, match="'m' has 3 bits, of which compressed-tensors has two layouts"):
            encode("m", weight, symmetric=True)


def test_config_says_what_was_read():
    codec = codec_of(CONFIG)
    assert isinstance(codec, CompressedTensors)
    assert read_groups(codec.to_config()) == read_groups(CONFIG)


def test_a_group_for_every_number_format():
    found = {"a.q": Scheme(4, 128, False), "a.v": Scheme(2, 64, False), "a.k": Scheme(4, 128, False)}
    codec = CompressedTensors(group_size=128).skipping(["lm_head"], found)
    groups = codec.to_config()["config_groups"]
    assert {tuple(group["targets"]) for group in groups.values()} == {("a.k", "a.q"), ("a.v",)}
    again = codec_of(codec.to_config())
    assert again is not None and {name: again.scheme(name, ()) for name in found} == found
    with pytest.raises(ValueError, match=r"'a\.o' is quantized, but no target of quantization_config matches it"):
        again.scheme("a.o", ())


def test_the_head_stays_dense_under_the_name_that_transformers_gives_it():
    """GPT-NeoX's is ``embed_out`` in files and in vLLM; transformers renames it, and quantizes what is not named."""
    for codec in (CompressedTensors(), IntQuantized()):
        assert codec.skipping(["embed_out", "a.b"], {}).to_config()["ignore"] == ["a.b", "embed_out", "lm_head"]


def test_a_name_goes_before_an_expression_and_that_before_the_class():
    made = config()
    for name, targets, bits in (("a", [r"re:.*layers\.1\..*"], 2), ("b", ["x.layers.1.mlp.up"], 8)):
        made["config_groups"][name] = copy.deepcopy(CONFIG["config_groups"]["group_0"]) | {"targets": targets}
        made["config_groups"][name]["weights"]["num_bits"] = bits
    codec = codec_of(made)
    assert codec is not None
    names = ("x.layers.1.mlp.up", "x.layers.1.mlp.down", "x.layers.11.mlp.up")
    assert [codec.scheme(name, ()).bits for name in names] == [8, 2, 4]


@pytest.mark.parametrize("target", ["re:(a+)+$", "re:(.*)*", r"re:(a)\1", "re:.*.*.*.*.*x", "re:(", "re:" + "a" * 300])
def test_expressions_that_may_hang_are_refused(target):
    made = config()
    made["config_groups"]["other"] = copy.deepcopy(made["config_groups"]["group_0"]) | {"targets": [target]}
    codec = codec_of(made)
    assert codec is not None
    with pytest.raises(ValueError, match=r"has the target 're:.*which is not read"):
        codec.scheme("a" * 40, ())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": "naive-quantized"}, "format 'naive-quantized' and status 'compressed' is not read"),
        ({"quantization_status": "frozen"}, "status 'frozen'"),
        ({"sparsity_config": {"format": "sparse-24"}}, "not understood: sparsity_config"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "quantized key and value cache"),
        ({"config_groups": {}}, "has no config_groups"),
        ({"config_groups": {"group_0": {"targets": ["Linear"]}}}, "group_0 does not say how weights"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "input_activations": {"num_bits": 8}}}}, "activations"),
        ({"novel": 1}, "not understood: novel"),
    ],
)
def test_configs_that_are_not_understood_are_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        codec_of({**CONFIG, **changed})


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"num_bits": 5}, "5 bits of type 'int' are not read"),
        ({"num_bits": 4.0}, "4.0 bits"),
        ({"type": "float"}, "type 'float'"),
        ({"strategy": "block"}, "strategy 'block'"),
        ({"group_size": None}, "group_size=None"),
        ({"group_size": 0}, "group_size=0"),
        ({"actorder": "group"}, "activation order"),
        ({"symmetric": 1}, "symmetric is 1"),
        ({"novel": 1}, "weights has attributes that are not understood: novel"),
    ],
)
def test_number_formats_that_are_not_read_are_refused(weights, said):
    with pytest.raises(ValueError, match=said):
        codec_of(config(**weights))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"weight_g_idx": TensorMeta("I32", (256,), 0)}, "'m' is quantized in activation order"),
        ({"weight_zero_point": None}, "'m' has weight_packed, weight_scale, weight_shape, its scheme asks for"),
        ({"weight_packed": TensorMeta("I64", (64, 32), 0)}, "not pack-quantized: weight_packed is I64"),
        ({"weight_scale": TensorMeta("I32", (64, 2), 0)}, "weight_scale I32"),
        ({"weight_packed": TensorMeta("I32", (64, 31), 0)}, "do not fit 4 bits with group_size=128"),
        ({"weight_packed": TensorMeta("I32", (32, 32), 0)}, "do not fit"),
        ({"weight_scale": TensorMeta("F16", (64,), 0)}, "do not fit"),
        ({"weight_zero_point": TensorMeta("I32", (9, 2), 0)}, "do not fit"),
        ({"weight_shape": TensorMeta("I64", (3,), 0)}, "do not fit"),
        ({"weight_scale": TensorMeta("F16", (64, 0), 0)}, "do not fit"),
    ],
)
def test_headers_that_do_not_fit_are_refused(changed, said):
    codec, found = codec_of(CONFIG), {**metas_of(golden_parts()), **changed}
    assert codec is not None
    with pytest.raises(ValueError, match=said):
        codec.shape("m", {part: meta for part, meta in found.items() if meta})


def test_damage_is_named():
    parts = golden_parts()
    with pytest.raises(ValueError, match=r"weight_shape of 'm' says \[64, 255\], its tensors are of \[64, 256\]"):
        decode("m", parts | {"weight_shape": np.array([64, 255])}, Scheme(4, 128, False))
    spoiled = parts["weight_scale"].copy()
    spoiled[:3, 0] = np.inf
    with pytest.raises(ValueError, match=r"3 of 128 scales of 'm' are NaN or infinite"):
        decode("m", parts | {"weight_scale": spoiled}, Scheme(4, 128, False))
