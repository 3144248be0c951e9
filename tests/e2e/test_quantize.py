# SPDX-License-Identifier: Apache-2.0
"""The main job, on real directories: what is written is what the method says, and other programs can read it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from awq_jax import QTensor, QuantSpec, Recipe, RefineSpec, SearchSpec, dequantize, quantize_checkpoint, rule
from awq_jax._manifest import verify
from awq_jax.report import Report
from awq_jax_convert.formats import open_checkpoint
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.keymap import theirs
from awq_jax_convert.safetensors_dir import SafetensorsDir
from tests.e2e.conftest import make_source
from tests.models.families import TINY
from tests.tiny_models import Oracle, logits_of, some_tokens

SPEC = QuantSpec(group_size=32)
FEW = {"samples": 4, "seq_len": 48, "batch": 2}


def run(source: Path, out: Path, recipe: Recipe = Recipe(quant=SPEC), **options: object) -> Report:  # noqa: B008
    return quantize_checkpoint(source, out, recipe=recipe, calib=source / "text.txt", **{**FEW, **options})  # pyright: ignore[reportArgumentType]


def is_weight(leaf: object) -> bool:
    return isinstance(leaf, QTensor)


def autoawq_weight(tensors: SafetensorsDir, module: str) -> np.ndarray:
    """``[out, in]`` float32 from the three tensors, by AutoAWQ's own definition of the words, written anew here."""
    places = np.array([0, 4, 1, 5, 2, 6, 3, 7]) * 4  # bit offset of each of a word's eight outputs

    def nibbles(words: np.ndarray) -> np.ndarray:
        return ((words.view(np.uint32)[..., None] >> places) & 15).reshape(words.shape[0], -1).astype(np.float32)

    codes, zeros = (nibbles(tensors.read(f"{module}.{part}")) for part in ("qweight", "qzeros"))
    scales = tensors.read(f"{module}.scales").astype(np.float32)
    g = len(codes) // len(scales)
    return ((codes - zeros.repeat(g, 0)) * scales.repeat(g, 0)).T


def test_pytorch_gives_the_logits_that_we_give(source: Oracle, tmp_path: Path):
    run(source.path, tmp_path / "out")
    written = HFCheckpoint.open(tmp_path / "out")
    state = {name: tensor.float() for name, tensor in source.model.state_dict().items()}
    for name in written.tensors.names():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            state[f"{module}.weight"] = torch.from_numpy(autoawq_weight(written.tensors, module).copy())
        elif part not in ("qzeros", "scales"):
            state[name] = torch.from_numpy(written.tensors.read(name).astype(np.float32))
    model = type(source.model)(source.model.config).float().eval()
    model.load_state_dict(state)
    tokens = some_tokens(320)
    theirs_ = Oracle(source.row, model, source.path).logits(tokens)
    ours = logits_of(written.config, jax.tree.map(jnp.asarray, written.params()), tokens)
    assert np.abs(ours - theirs_).max() <= 1e-4 * np.abs(theirs_).max()
    # The rounding is visible, so that the comparison above means something.
    assert np.abs(ours - source.logits(tokens)).max() > 1e-2 * np.abs(theirs_).max()


def test_nothing_is_worse_than_round_to_nearest_and_everything_is_named(source: Oracle, tmp_path: Path):
    report = run(source.path, tmp_path / "out")
    assert len(report.layers) == 3
    for layer in report.layers:
        assert layer.error is not None and layer.rtn_error is not None and layer.error <= layer.rtn_error
        assert {linear.path for linear in layer.linears} == {
            f"layers/{layer.index}/{name}"
            for name in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
        }
        for linear in layer.linears:
            assert (linear.method == "awq") == (linear.reason == "")
        for group in layer.groups:
            assert group.gain is not None and group.gain <= 1
    assert report.bytes_after < report.bytes_before
    on_disk = json.loads((tmp_path / "out" / "awq_jax_report.json").read_text())
    assert on_disk["coverage"] == dict(report.coverage)


def test_native_and_autoawq_hold_the_same_weights(llama: Oracle, tmp_path: Path):
    run(llama.path, tmp_path / "a", format="autoawq")
    run(llama.path, tmp_path / "n", format="native")
    a, n = open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "n")
    assert (a.format, n.format) == ("autoawq", "native")
    assert a.paths() == n.paths()
    for ours, others in zip(jax.tree.leaves(a.params(None)), jax.tree.leaves(n.params(None)), strict=True):
        np.testing.assert_array_equal(ours, others)


@pytest.mark.parametrize(
    ("method", "propagate", "refine"),
    [
        ("awq", "dense", None),
        pytest.param("awq+gptq", "quantized", None, marks=pytest.mark.slow),
        pytest.param("gptq", "quantized", RefineSpec(steps=5), marks=pytest.mark.slow),
    ],
)
def test_a_run_can_be_repeated_bit_for_bit(
    llama: Oracle, tmp_path: Path, method: str, propagate: str, refine: RefineSpec | None
):
    for name in "ab":
        recipe = Recipe(quant=SPEC, method=method, propagate=propagate, refine=refine)
        run(llama.path, tmp_path / name, recipe)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == two


@pytest.mark.parametrize(("method", "written"), [("minmax", {"rtn"}), ("gptq", {"gptq", "rtn"})])
def test_a_method_is_what_the_report_says(llama: Oracle, tmp_path: Path, method: str, written: set[str]):
    report = run(llama.path, tmp_path / "out", Recipe(quant=SPEC, method=method))
    assert {linear.method for layer in report.layers for linear in layer.linears} == written & set(report.coverage)
    assert report.coverage["rtn" if method == "minmax" else "gptq"] >= 14
    dense, out = HFCheckpoint.open(llama.path).layer(0), HFCheckpoint.open(tmp_path / "out").layer(0)
    np.testing.assert_array_equal(out["input_norm"]["scale"], dense["input_norm"]["scale"])  # no scale was folded
    for group in (group for layer in report.layers for group in layer.groups):
        assert group.rule == "identity" and group.written_loss is not None and group.loss is not None
        assert group.written_loss <= group.loss * (1 + 1e-4)
        assert method == "gptq" or group.written_loss >= group.loss * (1 - 1e-4)


def test_shards_are_one_model(tmp_path: Path):
    made = make_source(TINY[0], tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(made.path.glob("*.safetensors"))) > 2
    make_source(TINY[0], tmp_path / "single")
    for name in ("sharded", "single"):
        run(tmp_path / name, tmp_path / f"{name}-out")
    one, two = (HFCheckpoint.open(tmp_path / f"{name}-out").params() for name in ("sharded", "single"))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_identity_alone_is_round_to_nearest(llama: Oracle, tmp_path: Path):
    search = SearchSpec(rules=(rule("identity"),), clip_ratios=())
    run(llama.path, tmp_path / "out", Recipe(quant=SPEC, search=search))
    written, dense = HFCheckpoint.open(tmp_path / "out").params(), HFCheckpoint.open(llama.path).params()
    for path in ("attn/q", "attn/o", "mlp/down"):
        part, name = path.split("/")
        got = dequantize(jax.tree.map(jnp.asarray, written["layers"]["1"][part][name]["kernel"]))
        w = dense["layers"]["1"][part][name]["kernel"]
        groups = w.reshape(-1, 32, w.shape[1])
        reach = np.maximum(groups.max(1), 0) - np.minimum(groups.min(1), 0)
        step = (reach / 15).repeat(32, 0)
        # Half a step, plus what rounding the scale to float16 moves the farthest code by, and the zero's own rounding.
        assert (np.abs(np.asarray(got) - w) <= step * (1 + 15 * 2**-11) + 1e-7).all()
    np.testing.assert_array_equal(
        written["layers"]["1"]["input_norm"]["scale"], dense["layers"]["1"]["input_norm"]["scale"]
    )


@pytest.mark.parametrize("symmetric", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_bit_at_least_halves_the_squared_error(llama: Oracle, tmp_path: Path, symmetric: bool):
    errors = []
    for bits in (2, 3, 4):
        recipe = Recipe(quant=QuantSpec(bits=bits, group_size=32, symmetric=symmetric))
        report = run(llama.path, tmp_path / str(bits), recipe, format="native")
        kernel = open_checkpoint(tmp_path / str(bits)).params(None)["layers"]["0"]["mlp"]["up"]["kernel"]
        assert kernel.bits == bits and (kernel.zero is None) == symmetric
        errors.append([layer.error for layer in report.layers])
    assert all(
        fine and coarse and fine < coarse / 2 for i in (0, 1) for coarse, fine in zip(*errors[i : i + 2], strict=True)
    )


def test_overrides_decide_weight_by_weight(llama: Oracle, tmp_path: Path):
    overrides = (("layers/0/*", None), ("*/mlp/down", QuantSpec(bits=3, group_size=32)))
    report = run(llama.path, tmp_path / "out", Recipe(quant=SPEC, overrides=overrides), format="native")
    params = open_checkpoint(tmp_path / "out").params(None)["layers"]
    assert not any(is_weight(leaf) for leaf in jax.tree.leaves(params["0"], is_leaf=is_weight))
    assert params["1"]["mlp"]["down"]["kernel"].bits == 3
    assert params["1"]["mlp"]["up"]["kernel"].bits == 4
    assert report.coverage["float"] == 7 + 2  # and the embedding and the head


def test_a_float_layer_is_named_to_other_loaders(llama: Oracle, tmp_path: Path):
    run(llama.path, tmp_path / "out", Recipe(quant=SPEC, overrides=(("layers/1/attn/o", None),)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    written = HFCheckpoint.open(tmp_path / "out")
    name, _ = theirs(written.family, "layers/1/attn/o/kernel")
    assert name.removesuffix(".weight") in config["modules_to_not_convert"]
    assert "lm_head" in config["modules_to_not_convert"]
    assert written.stored_form("layers/1/attn/o/kernel") == "float32"


def test_the_directory_is_complete_and_verifies(llama: Oracle, tmp_path: Path):
    run(llama.path, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "tokenizer.json", "generation_config.json", "README.md", "awq_jax_report.json"}
    assert "awq_jax_report.html" in names
    assert verify(tmp_path / "out") == len(names) - 1  # all but the manifest itself
    assert not list(tmp_path.glob(".*"))  # no working directory is left
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json: checksum differs"):
        verify(tmp_path / "out")
