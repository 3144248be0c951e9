# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory is read whole, or refused with the tensor's name. (Tests of the values: tests/models.)"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from awq_jax import QTensor, QuantSpec, quantize
from awq_jax._tree import get, leaves
from awq_jax_convert.autoawq import encode
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.safetensors_dir import SafetensorsDir
from tests.models.families import TINY
from tests.tiny_models import save_oracle

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj"


@dataclasses.dataclass
class Directory:
    """A checkpoint directory to be spoiled: its tensors and its config."""

    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    path: Path

    def open(self) -> HFCheckpoint:
        self.path.mkdir(exist_ok=True)
        save_file(
            {name: np.ascontiguousarray(array) for name, array in self.tensors.items()}, self.path / "model.safetensors"
        )
        (self.path / "config.json").write_text(json.dumps(self.config))
        return HFCheckpoint.open(self.path)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Directories of transformers by row."""
    return {row.id: save_oracle(row, tmp_path_factory.mktemp(row.id)).path for row in TINY if row.family == "llama"}


@pytest.fixture(params=["llama-shared-heads-llama3-rope"])
def directory(request, saved, tmp_path):
    path = saved[request.param]
    return Directory(
        load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text()), tmp_path / "x"
    )


with_biases = pytest.mark.parametrize("directory", ["llama-biases-wide-heads"], indirect=True)
tied = pytest.mark.parametrize("directory", ["llama-tied-linear-rope"], indirect=True)


def test_every_parameter_is_there_once_in_our_layout(directory):
    checkpoint = directory.open()
    params = checkpoint.params()
    assert sorted(path for path, _ in leaves(params)) == checkpoint.paths()
    np.testing.assert_array_equal(get(params, "layers/1/mlp/down/kernel"), directory.tensors[f"{DOWN}.weight"].T)
    np.testing.assert_array_equal(get(params, "embed/embedding"), directory.tensors[EMBEDDING])
    for path, leaf in leaves(params):
        assert leaf.dtype == np.float32 and leaf.shape == checkpoint.shape(path) and leaf.flags.c_contiguous
    assert checkpoint.nbytes == sum(checkpoint.stored_nbytes(path) for path in checkpoint.paths())
    assert checkpoint.format == "dense" and not any(map(checkpoint.is_quantized, checkpoint.paths()))


def test_dtypes_are_kept_or_changed_as_asked(directory):
    directory.tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in directory.tensors.items()}
    directory.tensors[HEAD] = directory.tensors[HEAD].astype(np.float16)
    checkpoint = directory.open()
    kept = dict(leaves(checkpoint.params(None)))
    assert kept["lm_head/kernel"].dtype == checkpoint.stored_dtype("lm_head/kernel") == np.float16
    assert {leaf.dtype for path, leaf in kept.items() if path != "lm_head/kernel"} == {np.dtype(ml_dtypes.bfloat16)}
    for path, leaf in leaves(checkpoint.params(np.float32)):
        np.testing.assert_array_equal(leaf, kept[path].astype(np.float32))


def test_opening_reads_no_tensor_and_a_layer_reads_its_own(directory, monkeypatch):
    read = []
    original = SafetensorsDir.read
    monkeypatch.setattr(SafetensorsDir, "read", lambda self, name: (read.append(name), original(self, name))[1])
    checkpoint = directory.open()
    assert not read
    checkpoint.layer(1)
    assert sorted(read) == sorted(name for name in directory.tensors if name.startswith("model.layers.1."))
    read.clear()
    checkpoint.stem()
    assert sorted(read) == sorted(name for name in directory.tensors if not name.startswith("model.layers."))


@pytest.mark.parametrize("index", [-1, 2])
def test_layers_that_are_not_there(directory, index):
    with pytest.raises(IndexError, match=rf"layer {index} of .*: it has layers 0 to 1"):
        directory.open().layer(index)


def test_a_tensor_that_nobody_knows_is_refused(directory):
    directory.tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    with pytest.raises(ValueError, match=r"1 checkpoint tensors match no key of family 'llama'.*0.self_attn.q_norm"):
        directory.open()


@pytest.mark.parametrize("name", [EMBEDDING, HEAD, f"{DOWN}.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(directory, name):
    del directory.tensors[name]
    with pytest.raises(
        ValueError, match=f"(1 tensors that family 'llama' needs are missing:|config.json implies:) '{name}'"
    ):
        directory.open()


@with_biases
def test_a_missing_bias_is_named(directory):
    del directory.tensors[f"{DOWN}.bias"]
    with pytest.raises(ValueError, match=f"does not hold what its config.json implies: '{DOWN}.bias' is missing"):
        directory.open()


def test_a_bias_that_the_config_does_not_know_is_refused(directory):
    directory.tensors[f"{DOWN}.bias"] = np.ones(32, np.float32)
    with pytest.raises(ValueError, match=f"'{DOWN}.bias' has no use"):
        directory.open()


def test_buffers_of_old_checkpoints_are_known_and_unused(directory):
    wanted = directory.open().params()
    for index in range(2):
        directory.tensors[f"model.layers.{index}.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    found = dict(leaves(directory.open().params()))
    assert found.keys() == dict(leaves(wanted)).keys()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"intermediate_size": 64}, r"mlp.*gives 'layers/0/mlp/\w+/kernel' the shape .*56.*, the config implies .*64"),
        ({"head_dim": 16}, r"gives 'layers/0/attn/\w/kernel' the shape"),
        ({"vocab_size": 98}, r"gives 'embed/embedding' the shape \(97, 32\), the config implies \(98, 32\)"),
        ({"num_hidden_layers": 3}, "9 tensors that family 'llama' needs are missing: 'model.layers.2."),
        ({"num_hidden_layers": 1}, "9 checkpoint tensors match no key of family 'llama' with 1 layers"),
        ({"num_hidden_layers": 4000}, "the config claims 4000 layers, the checkpoint has 21 tensors"),
        ({"architectures": ["MambaForCausalLM"]}, "architecture 'MambaForCausalLM' is not supported; these are: Llama"),
        (
            {"quantization_config": {"quant_method": "aqlm", "bits": 4}},
            "quantized with 'aqlm', which is not read; read are",
        ),
        ({"quantization_config": "awq"}, "quantized with None, which is not read"),
    ],
    ids=str,
)
def test_a_config_of_another_model_is_refused(directory, changed, said):
    directory.config |= changed
    with pytest.raises(ValueError, match=said):
        directory.open()


def test_all_misfits_are_counted(directory):
    directory.config["intermediate_size"] = 64
    with pytest.raises(ValueError, match="and 1 more"):  # three of each of two layers, five are listed
        directory.open()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named_with_its_count(directory, value):
    directory.tensors[f"{DOWN}.weight"][1:4, 7] = value
    checkpoint = directory.open()
    checkpoint.layer(0)
    size = directory.tensors[f"{DOWN}.weight"].size
    with pytest.raises(ValueError, match=rf"'{DOWN}.weight' of .* has 3 NaN or infinite values of {size}"):
        checkpoint.layer(1)


def test_integer_weights_are_refused(directory):
    directory.tensors[f"{DOWN}.weight"] = directory.tensors[f"{DOWN}.weight"].astype(np.int32)
    with pytest.raises(ValueError, match=rf"'{DOWN}.weight' of .* is I32; weights are F32, BF16, F16. If the"):
        directory.open()


@tied
def test_a_tied_head_may_be_stored_too_if_it_is_the_same(directory):
    assert HEAD not in directory.tensors
    alone = dict(leaves(directory.open().params()))
    directory.tensors[HEAD] = directory.tensors[EMBEDDING].copy()
    both = directory.open()
    assert both.paths() == sorted(alone) and "lm_head" not in both.stem()
    directory.tensors[HEAD][5, 5] += 1
    with pytest.raises(ValueError, match=f"says tie_word_embeddings, but '{HEAD}' differs from '{EMBEDDING}'"):
        directory.open().stem()


@pytest.fixture
def awq(directory, rng) -> tuple[Directory, QTensor]:
    """The directory with one linear quantized as AutoAWQ does."""
    dense = directory.tensors.pop(f"{DOWN}.weight")
    weight = quantize(jnp.asarray(dense.T), QuantSpec(group_size=8))
    directory.tensors |= encode(DOWN, weight)
    directory.config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}
    return directory, weight


def test_quantized_linears_become_quantized_kernels(awq):
    directory, weight = awq
    checkpoint = directory.open()
    path = "layers/1/mlp/down/kernel"
    assert checkpoint.format == "autoawq" and checkpoint.shape(path) == (56, 32)
    assert [p for p in checkpoint.paths() if checkpoint.is_quantized(p)] == [path]
    found = get(checkpoint.params(), path)
    assert isinstance(found, QTensor) and found.group_size == 8
    jax.tree.map(np.testing.assert_array_equal, found, weight)


def test_a_linear_in_pieces_or_twice_is_refused(awq):
    directory, _ = awq
    scales = directory.tensors.pop(f"{DOWN}.scales")
    with pytest.raises(ValueError, match=f"quantized module '{DOWN}' lacks scales"):
        directory.open()
    directory.tensors[f"{DOWN}.scales"] = scales
    directory.tensors[f"{DOWN}.weight"] = np.zeros((32, 56), np.float32)
    with pytest.raises(ValueError, match=f"1 weights both dense and quantized, e.g. '{DOWN}.weight'"):
        directory.open()


def test_quantized_tensors_without_a_config_are_refused(awq):
    directory, _ = awq
    del directory.config["quantization_config"]
    with pytest.raises(ValueError, match=f"3 checkpoint tensors match no key .*'{DOWN}.qweight'"):
        directory.open()


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_a_directory_that_is_not_there(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is not a directory|has no file 'config.json'"):
        HFCheckpoint.open(tmp_path / path)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pkl"])
def test_a_pickle_is_named_and_not_opened(tmp_path, suffix):
    path = tmp_path / f"awq_results{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match=r"is a pickle, which can run code and is never opened.*`awq-jax quantize`"):
        HFCheckpoint.open(path)


def test_autoawqs_older_file_beside_the_config(awq):
    directory, weight = awq
    del directory.config["quantization_config"]
    directory.path.mkdir()
    older = {"w_bit": 4, "q_group_size": 8, "zero_point": True, "version": "GEMM"}
    (directory.path / "quant_config.json").write_text(json.dumps(older))
    found = get(directory.open().params(), "layers/1/mlp/down/kernel")
    jax.tree.map(np.testing.assert_array_equal, found, weight)


def test_modelopt_is_read_by_its_algorithm(directory):
    directory.path.mkdir()
    (directory.path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(ValueError, match="ModelOpt's quant_algo 'FP8' is not read; W4A16_AWQ is"):
        directory.open()
