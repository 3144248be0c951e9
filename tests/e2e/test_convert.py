# SPDX-License-Identifier: Apache-2.0
"""A checkpoint through every format and back: the codes are those that were there."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from awq_jax import QTensor, QuantSpec, dequantize, quantize
from awq_jax._manifest import read_manifest, verify
from awq_jax._tree import leaves, put
from awq_jax.cli import main
from awq_jax_convert.convert import Conversion, convert_checkpoint
from awq_jax_convert.formats import open_checkpoint, open_writer
from awq_jax_convert.hf import HFCheckpoint
from tests.e2e.conftest import make_source
from tests.models.families import TINY
from tests.tiny_models import Oracle

SPEC = QuantSpec(group_size=32)


def rounded(source: Path, out: Path, format: str = "autoawq", spec: QuantSpec = SPEC, *odd: tuple[str, Any]) -> Path:
    """A checkpoint of codes as the format's writer makes it; ``odd`` gives weights by name another format, or none."""
    checkpoint = HFCheckpoint.open(source)

    def of(path: str, leaf: Any) -> Any:
        if not path.endswith("/kernel"):
            return leaf
        found = next((other for name, other in odd if name in path), spec)
        return jax.device_get(quantize(jnp.asarray(leaf), found)) if found else leaf

    with open_writer(format, checkpoint, out, group_size=spec.group_size, symmetric=spec.symmetric) as writer:
        writer.write_stem(checkpoint.stem())
        for index in range(checkpoint.num_layers):
            tree = checkpoint.layer(index)
            for path, leaf in list(leaves(tree)):
                tree = put(tree, path, of(f"layers/{index}/{path}", leaf))
            writer.write_layer(index, tree)
    return out


@pytest.fixture(scope="module")
def autoawq(llama: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rounded(llama.path, tmp_path_factory.mktemp("quantized") / "autoawq")


def convert(src: Path, out: Path, to: str, **options: object) -> Conversion:
    return convert_checkpoint(src, out, to=to, **options)  # pyright: ignore[reportArgumentType]


def weights_digest(path: Path) -> str:
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("through", ["native", "compressed-tensors", "autoawq"])
def test_autoawq_comes_back_byte_for_byte(autoawq: Path, tmp_path: Path, through: str):
    there = convert(autoawq, tmp_path / "there", through)
    back = convert(tmp_path / "there", tmp_path / "back", "autoawq")
    assert (there.quantized, back.quantized, back.source) == (21, 21, through)
    assert weights_digest(tmp_path / "back") == weights_digest(autoawq)
    configs = [json.loads((path / "config.json").read_text()) for path in (autoawq, tmp_path / "back")]
    assert configs[0] == configs[1]
    verify(tmp_path / "there")
    verify(tmp_path / "back")


def test_a_compressed_tensors_checkpoint_comes_back_byte_for_byte(llama: Oracle, tmp_path: Path):
    specs = {"asym": SPEC, "sym": QuantSpec(group_size=32, symmetric=True), "column": QuantSpec(group_size=-1)}
    for name, spec in specs.items():
        made = rounded(llama.path, tmp_path / name, "compressed-tensors", spec)
        convert(made, tmp_path / f"{name}-native", "native")
        convert(tmp_path / f"{name}-native", tmp_path / f"{name}-back", "compressed-tensors")
        assert weights_digest(tmp_path / f"{name}-back") == weights_digest(made)
        assert (tmp_path / f"{name}-back" / "config.json").read_text() == (made / "config.json").read_text()
    config = json.loads((tmp_path / "sym" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["symmetric"] is True


@pytest.mark.parametrize("symmetric", [False, True])
def test_eight_bits_among_four_go_there_and_back(llama: Oracle, tmp_path: Path, symmetric: bool):
    spec = dataclasses.replace(SPEC, symmetric=symmetric)
    eight = ("mlp/down", dataclasses.replace(spec, bits=8))
    made = rounded(llama.path, tmp_path / "ct", "compressed-tensors", spec, eight)
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert {group["weights"]["num_bits"] for group in config["config_groups"].values()} == {4, 8}
    assert convert(made, tmp_path / "native", "native").quantized == 21
    convert(tmp_path / "native", tmp_path / "back", "compressed-tensors")
    assert weights_digest(tmp_path / "back") == weights_digest(made)
    found = open_checkpoint(tmp_path / "native")
    kind = " symmetric" if symmetric else ""
    assert found.stored_form("layers/0/mlp/down/kernel") == f"int8 g32{kind}"
    down, source = found.layer(0)["mlp"]["down"]["kernel"], HFCheckpoint.open(llama.path).layer(0)
    assert down.packed.shape == down.shape == (96, 64)
    step = np.asarray(down.scale, np.float64).repeat(32, 0)
    off = np.abs(np.asarray(dequantize(jax.tree.map(jnp.asarray, down)), np.float64) - source["mlp"]["down"]["kernel"])
    # Half a step each for the weight and the zero, and what a float16 scale moves the farthest code by.
    assert (off <= step * (1 + 255 * 2**-11)).all()
    with pytest.raises(ValueError, match="hold 4 bits, and layers/0/mlp/down int8 g32"):
        convert(made, tmp_path / "awq", "autoawq")
    assert convert(made, tmp_path / "dense", "dense").dequantized == 21


def test_mixed_group_sizes_are_named_by_module(llama: Oracle, tmp_path: Path):
    odd = (("mlp/", QuantSpec(group_size=16)), ("layers/1/attn/o", None))
    made = rounded(llama.path, tmp_path / "ct", "compressed-tensors", SPEC, *odd)
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert {group["weights"]["group_size"] for group in config["config_groups"].values()} == {16, 32}
    assert config["ignore"] == ["lm_head", "model.layers.1.self_attn.o_proj"]
    found = open_checkpoint(made)
    assert found.stored_form("layers/0/mlp/up/kernel") == "int4 g16"
    assert found.stored_form("layers/1/attn/o/kernel") == "float32"
    with pytest.raises(ValueError, match=r"has one group size, the overrides ask for \[16, 32\]"):
        convert(made, tmp_path / "out", "autoawq")


def test_what_a_loader_would_have_to_fuse_is_refused_before_anything_is_written(llama: Oracle, tmp_path: Path):
    made = rounded(llama.path, tmp_path / "native", "native", SPEC, ("attn/q", None))
    for to in ("autoawq", "compressed-tensors"):
        with pytest.raises(ValueError, match=r"vLLM.*layers/0/attn/k int4 g32, layers/0/attn/q in floating point"):
            convert(made, tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


@pytest.mark.parametrize("format", ["autoawq", "compressed-tensors"])
def test_a_writer_refuses_parts_that_loaders_would_have_to_fuse(llama: Oracle, tmp_path: Path, format: str):
    with pytest.raises(ValueError, match=r"vLLM makes one weight of these.*layers/0/attn/k in floating point"):
        rounded(llama.path, tmp_path / "out", format, SPEC, ("attn/k", None))
    assert not list(tmp_path.iterdir())


def test_weights_with_zeros_and_without_go_together(llama: Oracle, tmp_path: Path):
    """A weight whose zeros are all in the middle has none in memory; files have them where another weight does."""
    odd = ("attn/k", QuantSpec(group_size=32, symmetric=True))
    made = rounded(llama.path, tmp_path / "native", "native", SPEC, odd)
    convert(made, tmp_path / "ct", "compressed-tensors")
    convert(tmp_path / "ct", tmp_path / "awq", "autoawq")
    want = dict(leaves(open_checkpoint(made).params(None)))
    for path, got in leaves(open_checkpoint(tmp_path / "awq").params(None)):
        if isinstance(got, QTensor):
            assert (got.zero is None) == ("attn/k" in path) == (want[path].zero is None)
            np.testing.assert_array_equal(got.packed, want[path].packed)


def test_dense_holds_what_the_codes_stand_for(autoawq: Path, tmp_path: Path):
    done = convert(autoawq, tmp_path / "out", "dense")
    assert (done.dtype, done.dequantized, done.quantized) == ("float32", 21, 0)
    dense = open_checkpoint(tmp_path / "out")
    assert dense.format == "dense"
    found = dict(leaves(dense.params(None)))
    for path, want in leaves(open_checkpoint(autoawq).params(None)):
        got = found.pop(path)
        assert got.dtype == np.float32, path
        wide = dequantize(jax.tree.map(jnp.asarray, want)) if isinstance(want, QTensor) else want
        np.testing.assert_array_equal(got, np.asarray(wide))
    assert not found


def test_a_dtype_is_that_of_scales_and_config_too(autoawq: Path, tmp_path: Path):
    convert(autoawq, tmp_path / "out", "compressed-tensors", dtype="bfloat16")
    found = open_checkpoint(tmp_path / "out")
    assert str(found.params(None)["layers"]["0"]["attn"]["q"]["kernel"].scale.dtype) == "bfloat16"
    assert {str(found.stored_dtype(path)) for path in found.paths()} == {"bfloat16"}
    assert found.hf.dtype == "bfloat16"


def test_scales_that_a_loader_would_round_are_warned_of(tmp_path: Path):
    source = make_source(TINY[0], tmp_path / "source", dtype=torch.bfloat16)
    made = rounded(source.path, tmp_path / "autoawq")
    done = convert(made, tmp_path / "ct", "compressed-tensors")
    assert len(done.warnings) == 1 and "scales are float16 and config.json says bfloat16" in done.warnings[0]
    assert not convert(made, tmp_path / "ct16", "compressed-tensors", dtype="float16").warnings


@pytest.mark.slow
def test_quantizing_to_compressed_tensors_takes_the_models_own_dtype_for_scales(tmp_path: Path):
    source = make_source(TINY[0], tmp_path / "source", dtype=torch.bfloat16).path
    few = ["--samples", "2", "--seq-len", "32", "--rules", "identity", "--no-clip", "--quiet", "--group-size", "32"]
    calib = ["--calib", str(source / "text.txt"), "--format", "compressed-tensors"]
    assert main(["quantize", str(source), str(tmp_path / "out"), *calib, *few]) == 0
    found = open_checkpoint(tmp_path / "out")
    assert found.format == "compressed-tensors"
    assert str(found.stored_dtype("layers/0/mlp/up/kernel")) == "bfloat16"


def test_a_dense_checkpoint_has_no_codes(llama: Oracle, tmp_path: Path):
    with pytest.raises(ValueError, match="is not quantized, so there are no codes to write as autoawq"):
        convert(llama.path, tmp_path / "out", "autoawq")
    convert(llama.path, tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "back", "dense")
    for (_, want), (_, got) in zip(
        leaves(open_checkpoint(llama.path).params(None)),
        leaves(open_checkpoint(tmp_path / "back").params(None)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


def test_the_recipe_goes_along_and_every_step_is_written_down(autoawq: Path, tmp_path: Path):
    with open_writer("autoawq", open_checkpoint(autoawq), tmp_path / "src", group_size=32, recipe={"x": 1}) as writer:
        writer.write_stem(writer.source.stem())
        for index in range(3):
            writer.write_layer(index, writer.source.layer(index))
        writer.write_text("awq_jax_report.json", "{}")
    convert(tmp_path / "src", tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "back", "autoawq", dtype="float16")
    recipe = read_manifest(tmp_path / "back")["recipe"]
    assert recipe["x"] == 1
    assert [(step["from"], step["to"], step["dtype"]) for step in recipe["conversions"]] == [
        ("autoawq", "native", None),
        ("native", "autoawq", "float16"),
    ]
    for name in ("tokenizer.json", "generation_config.json", "awq_jax_report.json"):
        assert (tmp_path / "native" / name).read_bytes() == (tmp_path / "src" / name).read_bytes()


def test_the_command(autoawq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert main(["convert", str(autoawq), str(out), "--to", "native", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["quantized"] == 21 and "21 weights with their codes" in " ".join(said.err.split())
    assert main(["convert", str(autoawq), str(out), "--to", "native", "--quiet"]) == 2
    assert "the output exists" in capsys.readouterr().err
    assert main(["convert", str(autoawq), str(out), "--to", "native", "--quiet", "--overwrite"]) == 0
    assert main(["convert", str(autoawq), str(autoawq), "--to", "native", "--overwrite"]) == 2
    assert "is or holds the source" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "typo"), str(out), "--to", "native"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
