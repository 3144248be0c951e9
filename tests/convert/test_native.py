# SPDX-License-Identifier: Apache-2.0
"""The native form of a model: written one layer at a time, read one layer at a time, bit for bit."""

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from awq_jax import QTensor, QuantSpec, checkpoint, quantize
from awq_jax._manifest import MANIFEST, read_manifest, tree_digests, verify
from awq_jax._tree import leaves, put
from awq_jax_convert import native
from awq_jax_convert.formats import open_checkpoint
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.native import NativeCheckpoint, is_native
from awq_jax_convert.native_writer import NativeWriter
from tests.models.families import TINY
from tests.tiny_models import save_oracle

SPECS = {
    "attn/q": QuantSpec(group_size=8, bits=3, scale_dtype="bfloat16"),
    "attn/o": QuantSpec(group_size=-1, symmetric=True, scale_dtype="float32"),
    "mlp/down": QuantSpec(group_size=8),
}


def quantized(layer: dict[str, Any]) -> dict[str, Any]:
    for path, spec in SPECS.items():
        kernel = dict(leaves(layer))[f"{path}/kernel"]
        layer = put(layer, f"{path}/kernel", quantize(jnp.asarray(kernel), spec))
    return layer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(source, trees by part, directory) of a model written in three number formats."""
    home = tmp_path_factory.mktemp("native")
    source = HFCheckpoint.open(save_oracle(TINY[0], home / "hf").path)
    trees = [quantized(source.layer(index)) for index in range(source.num_layers)]
    with NativeWriter(source, home / "out", recipe={"rules": ["paper"]}) as writer:
        writer.write_stem(source.stem())
        for index, tree in enumerate(trees):
            writer.write_layer(index, tree)
    return source, trees, home / "out"


@pytest.fixture
def copied(written, tmp_path):
    """A directory to be spoiled."""
    return shutil.copytree(written[2], tmp_path / "x")


def assert_same_bits(got: Any, wanted: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), map(np.asarray, jax.tree.leaves(wanted)), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_layers_come_back_bit_for_bit(written):
    source, trees, directory = written
    checkpoint = NativeCheckpoint.open(directory)
    assert checkpoint.config == source.config and checkpoint.recipe == {"rules": ["paper"]}
    assert_same_bits(checkpoint.stem(), source.stem())
    for index, tree in enumerate(trees):
        assert_same_bits(checkpoint.layer(index), tree)
    assert is_native(directory) and not is_native(source.path)
    assert isinstance(open_checkpoint(directory), NativeCheckpoint)
    assert isinstance(open_checkpoint(source.path), HFCheckpoint)


def test_what_is_said_without_reading_is_what_is_read(written):
    source, _, directory = written
    checkpoint = NativeCheckpoint.open(directory)
    found = dict(leaves(checkpoint.params()))
    assert checkpoint.paths() == source.paths() == sorted(found)
    assert checkpoint.nbytes == sum(leaf.nbytes for leaf in found.values())
    for path, leaf in found.items():
        assert checkpoint.shape(path) == leaf.shape
        assert checkpoint.stored_nbytes(path) == leaf.nbytes
        assert checkpoint.is_quantized(path) == isinstance(leaf, QTensor)
    assert checkpoint.stored_form("layers/1/mlp/down/kernel") == "int4 g8"
    assert checkpoint.stored_form("layers/1/attn/q/kernel") == "int3 g8"
    assert checkpoint.stored_form("layers/1/mlp/up/kernel") == "float32"


def test_a_layer_reads_its_own_part(written, monkeypatch):
    read = []
    original = native.read_part
    monkeypatch.setattr(native, "read_part", lambda path, kept: (read.append(path.name), original(path, kept))[1])
    checkpoint = NativeCheckpoint.open(written[2])
    assert not read
    checkpoint.layer(1)
    checkpoint.stem()
    assert read == ["layer-00001", "stem"]
    with pytest.raises(IndexError, match="it has layers 0 to 1"):
        checkpoint.layer(2)


def test_dense_leaves_take_the_dtype_that_is_asked_for(written):
    checkpoint = NativeCheckpoint.open(written[2])
    for path, leaf in leaves(checkpoint.layer(0, np.float16)):
        assert isinstance(leaf, QTensor) or leaf.dtype == np.float16, path


def test_the_manifest_covers_every_file_and_finds_damage(copied):
    files = {str(p.relative_to(copied)) for p in copied.rglob("*") if p.is_file()}
    assert files == {MANIFEST, *read_manifest(copied)["files"]}
    assert verify(copied) == len(files) - 1
    damaged = next(p for p in (copied / "layer-00001").rglob("*") if p.is_file() and "/d/" in str(p))
    raw = damaged.read_bytes()
    damaged.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"layer-00001.*: checksum differs"):
        verify(copied)
    checkpoint = NativeCheckpoint.open(copied)
    checkpoint.layer(0)
    with pytest.raises(ValueError, match=r"layer-00001.*: checksum differs"):
        checkpoint.layer(1)


def test_missing_parts_are_refused(copied):
    shutil.rmtree(copied / "layer-00001")
    checkpoint = NativeCheckpoint.open(copied)
    checkpoint.layer(0)
    with pytest.raises(ValueError, match=r"(?s)copy it again.*layer-00001/.*: missing"):
        checkpoint.layer(1)


def test_a_config_of_another_model_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"holds 2 layers, its config\.json implies 3"):
        NativeCheckpoint.open(copied)
    (copied / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ValueError, match=r"'layers/0/mlp/\w+/kernel' has the shape .*56.*, the config implies .*64"):
        NativeCheckpoint.open(copied).layer(0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": "other"}, "is not a native checkpoint; its manifest says 'other'"),
        ({"parts": None}, "is not a native checkpoint"),
        ({"parts": {}}, "config.json implies 2"),
        ({"recipe": None, "parts": {"stem": 1, "layer-00000": 1, "layer-00001": 1}}, "does not describe its parts"),
        ({"format_version": 99}, "format_version 99"),
    ],
)
def test_a_manifest_that_says_something_else(copied, changed, said):
    manifest = read_manifest(copied) | changed
    (copied / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=said):
        NativeCheckpoint.open(copied)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda leaves: leaves["mlp/down/kernel"].pop("bits"), "does not describe its parts"),
        (lambda leaves: leaves["mlp/down/kernel"].update(bits="4"), "does not describe its parts"),
        (lambda leaves: leaves["mlp/up/kernel"].pop("nbytes"), "does not describe its parts"),
        (lambda leaves: leaves["mlp/up/kernel"].update(dtype="object"), "does not describe its parts"),
        (lambda leaves: leaves.update({"mlp/up/kernel": None}), "does not describe its parts"),
        (lambda leaves: leaves.pop("mlp/up/kernel"), "1 parameters are missing or have no use, e.g. 'layers/1/mlp/up/"),
        (lambda leaves: leaves.update(other=leaves["mlp/up/kernel"]), "have no use, e.g. 'layers/1/other'"),
    ],
)
def test_a_manifest_that_describes_other_parameters(copied, change, said):
    manifest = read_manifest(copied)
    change(manifest["parts"]["layer-00001"]["leaves"])
    (copied / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=said):
        NativeCheckpoint.open(copied)


def test_a_manifest_that_calls_a_quantized_weight_dense(copied):
    manifest = read_manifest(copied)
    manifest["parts"]["layer-00001"]["leaves"]["mlp/down/kernel"] = {"nbytes": 1, "dtype": "float32"}
    (copied / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"layer-00001 does not hold what the manifest says, .* 'layers/1/mlp/down"):
        NativeCheckpoint.open(copied).layer(1)


def test_a_link_out_of_the_directory_is_not_followed(copied, tmp_path):
    part = copied / "layer-00001"
    for path in (part / "_METADATA", part / "unlisted", part):  # listed, not listed, all of them
        before = path.rename(tmp_path / "elsewhere") if path.exists() else None
        path.symlink_to(before or "/etc/hostname")
        with pytest.raises(ValueError, match=r"layer-00001.*: a link out of the directory"):
            NativeCheckpoint.open(copied).layer(1)
        path.unlink()
        if before:
            before.rename(path)
    assert NativeCheckpoint.open(copied).layer(1)


def test_arrays_that_are_not_there_are_not_made(copied, monkeypatch):
    """A few bytes of metadata may claim gigabytes of zeros."""
    monkeypatch.setattr(checkpoint, "_AT_ONCE", 1 << 20)
    part = copied / "layer-00001"
    shutil.rmtree(part)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(part.resolve(), {"mlp": {"down": {"kernel": np.zeros((2048, 2048), np.float32)}}})
    manifest = read_manifest(copied)
    manifest["files"] = tree_digests(copied, skip=(MANIFEST,))
    (copied / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"its arrays claim 16777216 bytes, and there are [0-9]+ on the disk"):
        NativeCheckpoint.open(copied).layer(1)


def test_a_writer_that_fails_leaves_nothing(written, tmp_path):
    source, trees, _ = written
    with pytest.raises(RuntimeError, match="killed"), NativeWriter(source, tmp_path / "out") as writer:
        writer.write_layer(0, trees[0])
        raise RuntimeError("killed")
    assert not list(tmp_path.iterdir())


def test_existing_outputs_are_replaced_only_if_asked_and_ours(written, copied, tmp_path):
    source, trees, _ = written
    with pytest.raises(FileExistsError, match="the output exists"), NativeWriter(source, copied):
        pass
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").touch()
    with (
        pytest.raises(FileExistsError, match="not overwritten"),
        NativeWriter(source, tmp_path / "foreign", overwrite=True),
    ):
        pass
    with NativeWriter(source, copied, overwrite=True) as writer:
        writer.write_stem(source.stem())
        for index in (0, 1):
            writer.write_layer(index, trees[1 - index])
    assert_same_bits(NativeCheckpoint.open(copied).layer(0), trees[1])
