# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's W4A16_AWQ: a checkpoint packed here by its definition, run by PyTorch as ModelOpt runs it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from awq_jax import QTensor, Tie
from awq_jax._tree import leaves
from awq_jax.families import FAMILIES
from awq_jax_convert.codecs import codec_of
from awq_jax_convert.convert import convert_checkpoint
from awq_jax_convert.factors import apply
from awq_jax_convert.formats import open_checkpoint
from awq_jax_convert.modelopt import ModelOpt
from awq_jax_convert.safetensors_dir import TensorMeta
from awq_jax_convert.stored import dequantized
from tests.convert.foreign import MODELOPT, quantized_linears, save_modelopt
from tests.models.families import TINY
from tests.tiny_models import Oracle, logits_of, rounding, save_oracle, some_tokens

PARTS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def factors_of(module: str, k: int, kinds: tuple[str, ...]) -> np.ndarray | None:
    """Those of a module, the same for all that read one tensor; "o tied" alike in heads that share a kv head."""
    layer, last = int(module.split(".")[2]), module.rpartition(".")[2]
    kind = PARTS.get(last, last.removesuffix("_proj"))
    rng = np.random.default_rng([layer, *kind.encode()])
    if kind == "o" and "o tied" in kinds:
        return np.repeat(rng.uniform(0.5, 2, (2, 1, k // 4)), 2, axis=1).reshape(-1).astype(np.float32)
    return rng.uniform(0.5, 2, k).astype(np.float32) if kind in kinds else None


def imitate(oracle: Oracle, kinds: tuple[str, ...]) -> None:
    """Give the PyTorch model the weights that the file stands for, and its factors, applied as ModelOpt does."""
    tensors = load_file(oracle.path / "model.safetensors")
    for name, codes, scale in quantized_linears(tensors):
        module = oracle.model.get_submodule(name)
        module.weight.data = torch.from_numpy(codes * scale.repeat(codes.shape[1] // scale.shape[1], 1))
        if (factors := factors_of(name, codes.shape[1], kinds)) is not None:
            times = torch.from_numpy(factors)
            module.register_forward_pre_hook(lambda _, given, times=times: (given[0] * times,))


def made(home: Path, kinds: tuple[str, ...], row: str = "llama-biases-wide-heads") -> tuple[Oracle, Path]:
    oracle = save_oracle(next(tiny for tiny in TINY if tiny.id == row), home / "float")
    imitate(oracle, kinds)
    save_modelopt(oracle.path, home / "modelopt", lambda module, k: factors_of(module, k, kinds))
    return oracle, home / "modelopt"


def floats(layer: dict[str, Any]) -> set[str]:
    """Weights of a layer without codes."""
    return {path for path, leaf in leaves(layer) if path.endswith("/kernel") and not isinstance(leaf, QTensor)}


ALL = ("qkv", "o tied", "gate_up", "down")


@pytest.mark.parametrize(
    ("row", "kinds", "dense"),
    [
        ("llama-biases-wide-heads", (), set()),
        ("llama-biases-wide-heads", ("o tied", "down"), set()),
        ("llama-biases-wide-heads", ALL, set()),
        # Query heads that share a kv head differ: nothing before o can take their factors.
        ("llama-biases-wide-heads", ("o", "down"), {"attn/o/kernel"}),
        ("gemma-shared-heads", ALL, set()),  # norms whose gains are kept less one
    ],
)
def test_it_computes_what_modelopt_does(tmp_path: Path, row: str, kinds: tuple[str, ...], dense: set[str]):
    oracle, path = made(tmp_path, kinds, row)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "modelopt"
    assert checkpoint.stored_form("layers/0/mlp/up/kernel") == "int4 g8 symmetric"
    params = checkpoint.params()
    assert floats(params["layers"]["1"]) == dense
    tokens = some_tokens(checkpoint.config.vocab_size)
    theirs = oracle.logits(tokens)
    ours = logits_of(checkpoint.config, jax.tree.map(jnp.asarray, params), tokens)
    assert np.abs(ours - theirs).max() <= rounding(checkpoint.config) * np.abs(theirs).max()


def test_codes_are_untouched_and_the_producers_of_factors_are_float32(tmp_path: Path):
    _, plain = made(tmp_path / "plain", ())
    _, path = made(tmp_path / "with", ALL)
    before, after = open_checkpoint(plain), open_checkpoint(path)
    for index in range(before.num_layers):
        codes = {name: leaf for name, leaf in leaves(before.layer(index)) if isinstance(leaf, QTensor)}
        found = {name: leaf for name, leaf in leaves(after.layer(index)) if isinstance(leaf, QTensor)}
        assert len(codes) == 7
        for name, leaf in codes.items():
            np.testing.assert_array_equal(found[name].packed, leaf.packed)
    assert after.layer(0, None)["input_norm"]["scale"].dtype == np.float32
    widened = ("input_norm/scale", "post_norm/scale", "attn/v/bias", "mlp/up/bias")
    assert {str(after.stored_dtype(f"layers/0/{name}")) for name in widened} == {"float32"}


def test_converted_it_stays_the_same_model(tmp_path: Path):
    _, path = made(tmp_path, ALL)
    source = open_checkpoint(path)
    tokens = some_tokens(source.config.vocab_size)
    logits = lambda found: logits_of(found.config, jax.tree.map(jnp.asarray, found.params()), tokens)
    want = logits(source)
    for to in ("native", "compressed-tensors", "dense"):
        convert_checkpoint(path, tmp_path / to, to=to)
        assert (
            np.abs(logits(open_checkpoint(tmp_path / to)) - want).max() <= rounding(source.config) * np.abs(want).max()
        )


def test_factors_without_a_place_are_refused_where_codes_are_written(tmp_path: Path):
    _, path = made(tmp_path, ("o",))
    with pytest.raises(ValueError, match=r"'layers/0/attn/o/kernel', have factors .*pre_quant_scale.*--to dense"):
        convert_checkpoint(path, tmp_path / "out", to="native")
    assert not (tmp_path / "out").exists()
    assert convert_checkpoint(path, tmp_path / "dense", to="dense").dequantized == 14


def test_experts_take_their_own_factors(rng):
    """Experts lie stacked: ``down`` of each may have factors of its own, which that expert's ``up`` takes."""
    e, d, inner = 3, 8, 16
    up = QTensor(packed=rng.integers(-128, 128, (e, d // 2, inner), np.int8), scale=np.ones((e, 1, inner), np.float32))
    down = QTensor(packed=rng.integers(-128, 128, (e, inner // 2, d), np.int8), scale=np.ones((e, 2, d), np.float32))
    layer = {"mlp": {"experts": {"up": {"kernel": up}, "gate": {"kernel": up}, "down": {"kernel": down}}}}
    by = rng.uniform(0.5, 2, (e, inner)).astype(np.float32)
    found = apply(FAMILIES["mixtral"].groups, layer, {"mlp/experts/down": by}, Tie(1, 1))["mlp"]["experts"]
    np.testing.assert_array_equal(dequantized(found["up"]["kernel"]), dequantized(up) * by[:, None, :])
    assert found["down"]["kernel"] is down
    # The router reads what gate and up read, and has no factors: the norm can't take theirs.
    by = rng.uniform(0.5, 2, (e, d)).astype(np.float32)
    both = {"mlp/experts/gate": by, "mlp/experts/up": by}
    found = apply(FAMILIES["mixtral"].groups, layer, both, Tie(1, 1))["mlp"]["experts"]
    np.testing.assert_array_equal(found["up"]["kernel"], dequantized(up) * by[..., None])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"quant_algo": "NVFP4"}, "quant_algo 'NVFP4' is not read; W4A16_AWQ is"),
        ({"quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ' is not read"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {}}, "quant_algo 'MIXED_PRECISION' is not read"),
        ({"quant_algo": None}, "quant_algo None is not read"),
        ({"quant_algo": ["W4A16_AWQ"]}, r"quant_algo \['W4A16_AWQ'\] is not read"),
        ({"kv_cache_quant_algo": "FP8"}, "a quantized key and value cache .kv_cache_quant_algo='FP8'"),
        ({"has_zero_point": True}, "has_zero_point"),
        ({"group_size": None}, "hf_quant_config.json is missing, or does not say how many rows"),
        ({"group_size": "8"}, "group_size='8'"),
        ({"group_size": True}, "group_size=True"),
        ({"lora_rank": 32}, "not understood: lora_rank"),
    ],
)
def test_configs_that_are_not_read(changed: dict[str, Any], said: str):
    inner: Any = MODELOPT["quantization"]
    with pytest.raises(ValueError, match=said):
        codec_of({"quant_method": "modelopt", **MODELOPT, "quantization": {**inner, **changed}})


def test_the_file_beside_config_json_is_needed(tmp_path: Path):
    _, path = made(tmp_path, ())
    (path / "hf_quant_config.json").unlink()
    with pytest.raises(ValueError, match=r"hf_quant_config\.json is missing"):
        open_checkpoint(path)


@pytest.mark.parametrize(("part", "how"), [("weight", "I8"), ("weight_scale", ""), ("pre_quant_scale", "short")])
def test_headers_that_do_not_fit_are_refused(part: str, how: str):
    metas = {
        "weight": TensorMeta("U8", (8, 32), 256),
        "weight_scale": TensorMeta("BF16", (16, 4), 128),
        "pre_quant_scale": TensorMeta("BF16", (32,), 64),
    }
    assert ModelOpt(8).shape("m", metas) == (32, 16)
    meta = metas.pop(part)
    metas |= {"I8": {part: meta._replace(dtype="I8")}, "short": {part: meta._replace(shape=(31,))}}.get(how, {})
    with pytest.raises(ValueError, match="'m' is not ModelOpt's W4A16_AWQ with group_size=8"):
        ModelOpt(8).shape("m", metas)


def test_damaged_factors_are_refused(tmp_path: Path):
    _, path = made(tmp_path, ("down",))
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.pre_quant_scale"][3] = np.nan
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"down_proj\.pre_quant_scale' of .* has factors that are not positive"):
        open_checkpoint(path).layer(1)
