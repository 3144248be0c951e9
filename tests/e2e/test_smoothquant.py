# SPDX-License-Identifier: Apache-2.0
"""W8A8 from the command line to another program's arithmetic: what is written computes in int8, here and in PyTorch."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from awq_jax._qtensor import QTensor
from awq_jax._tree import leaves
from awq_jax.cli import main
from awq_jax.demo import plant_checkpoint
from awq_jax.run import LoadedModel, load_model, logits
from awq_jax.serving.fuse import fuse
from awq_jax_convert.formats import open_checkpoint
from tests.tiny_models import Oracle, rounding, some_tokens

FAST = ["--samples", "8", "--seq-len", "32", "--quiet", "--resume", "never"]
FOLDED = ("attn/q", "mlp/gate")  # what reads a norm, where outliers were planted


@pytest.fixture(scope="module")
def planted(llama: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("planted") / "dense"
    plant_checkpoint(llama.path, out, factor=32.0)
    return out


def quantized(llama: Oracle, src: Path, out: Path, *options: str) -> Path:
    assert main(["quantize", str(src), str(out), "--calib", str(llama.path / "text.txt"), *FAST, *options]) == 0
    return out


@pytest.fixture(scope="module")
def smooth(llama: Oracle, planted: Path) -> Path:
    return quantized(llama, planted, planted.with_name("smooth"), "--method", "smoothquant")


def test_smoothing_is_what_planted_outliers_need(smooth: Path):
    report = json.loads((smooth / "awq_jax_report.json").read_text())
    for layer in report["layers"]:
        assert not layer["fell_back"] and layer["error"] < layer["rtn_error"] / 10
        ratio = {group["sinks"][0].split("/", 2)[2]: group["loss"] / group["rtn_loss"] for group in layer["groups"]}
        assert all(ratio[path] < 0.1 for path in FOLDED) and all(value <= 1 for value in ratio.values())
        assert {(linear["bits"], linear["activations"]) for linear in layer["linears"]} == {(8, "token")}
    assert report["coverage"]["smoothquant"] >= 5 * len(report["layers"])
    card = (smooth / "README.md").read_text()
    assert "tags: [smoothquant, w8a8, awq-jax]" in card
    assert "8-bit symmetric weights in whole columns that multiply int8 activations, rounded token by token" in card
    page = (smooth / "awq_jax_report.html").read_text()
    words = ("int8 activations by token, method smoothquant", "rule smoothquant", "loss over round to nearest")
    assert all(said in page for said in words)


def in_pytorch(path: Path) -> Any:
    """Hugging Face's model with the file's bytes as weights, and inputs of its linears rounded token by token."""
    raw = json.loads((path / "config.json").read_text())
    scheme = raw.pop("quantization_config")
    (group,) = scheme["config_groups"].values()
    assert (scheme["format"], group["input_activations"]["strategy"]) == ("int-quantized", "token")
    config = transformers.AutoConfig.for_model(**raw)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tensors = load_file(path / "model.safetensors")
    scales = {name.removesuffix("_scale"): value.float() for name, value in tensors.items() if name.endswith("_scale")}
    weights = {name: value for name, value in tensors.items() if not name.endswith("_scale")}
    dense = {name: value.float() * scales.get(name, 1.0) for name, value in weights.items()}
    assert all(tensors[name].dtype == torch.int8 for name in scales) and len(scales) == 21
    missing = model.load_state_dict(dense, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}

    def rounded(module: Any, inputs: Any) -> Any:
        (x,) = inputs
        step = x.abs().amax(-1, keepdim=True) / 127
        return (torch.clamp(torch.round(x / step), -128, 127) * step,)

    for name, module in model.named_modules():
        if f"{name}.weight" in scales:
            module.register_forward_pre_hook(rounded)
    return model


def test_logits_are_those_of_pytorch_with_rounded_inputs(smooth: Path, planted: Path):
    model, tokens = load_model(smooth), some_tokens(320)
    assert all(leaf.activations == "token" for _, leaf in leaves(model.params) if isinstance(leaf, QTensor))
    ours = np.asarray(logits(model, tokens))
    with torch.no_grad():
        theirs = in_pytorch(smooth)(torch.from_numpy(tokens).long()).logits.numpy()
    largest = np.abs(theirs).max()
    off = np.abs(ours - theirs).max(-1) / largest
    dense = np.abs(np.asarray(logits(load_model(planted), tokens)) - theirs).max(-1) / largest
    # An input that lies at a tie as far as float32 can tell is rounded to either side, and what comes after sees it.
    assert (off <= rounding(model.config)).mean() > 0.5, off
    assert off.max() < dense.max() / 2, "what is left is less than what rounding does"


def test_every_program_runs_the_int8_product(smooth: Path):
    model, tokens = load_model(smooth), some_tokens(320)
    run = lambda params: logits(LoadedModel(checkpoint=model.checkpoint, params=params), tokens)
    text = str(jax.make_jaxpr(run)(model.params))
    assert text.count("preferred_element_type=int32") >= 3
    layer = fuse(model.params)["layers"]["0"]
    assert layer["attn"]["qkv"]["kernel"].activations == "token" and layer["mlp"]["gate_up"]["kernel"].bits == 8


def test_there_and_back_through_the_native_format(smooth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for to, src, out in (("native", smooth, "native"), ("compressed-tensors", tmp_path / "native", "back")):
        assert main(["convert", str(src), str(tmp_path / out), "--to", to]) == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (smooth / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "config.json").read_text() == (smooth / "config.json").read_text()
    assert open_checkpoint(tmp_path / "native").stored_form("layers/0/attn/q/kernel") == "int8 x int8 by token"
    capsys.readouterr()
    assert main(["convert", str(smooth), str(tmp_path / "awq"), "--to", "autoawq"]) == 2
    assert "hold 4 bits" in capsys.readouterr().err
    assert main(["convert", str(smooth), str(tmp_path / "dense"), "--to", "dense"]) == 0
    assert "multiplied int8 activations; dense ones multiply them as they come" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", "0.5"], "--alpha belongs to --method smoothquant"),
        (["--method", "smoothquant", "--alpha", "2"], "at least one number from 0 to 1"),
        (["--method", "smoothquant", "--bits", "4"], "--bits 4: .*of 8 bits alone. Leave it out"),
        (["--method", "smoothquant", "--group-size", "32"], "group_size=32"),
        (["--method", "smoothquant", "--activations", "float", "--group-size", "32"], r"QuantSpec\.w8a8\(\)"),
        (["--method", "smoothquant", "--override", "*/o=bits:4"], "an override can leave a weight in floating point"),
        (["--method", "smoothquant", "--refine", "10"], "Leave them out"),
        (["--method", "smoothquant", "--format", "autoawq"], "hold 4 bits"),
        (["--activations", "token"], "'awq' scores weights alone"),
    ],
)
def test_what_is_refused(
    llama: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message
):
    text = str(llama.path / "text.txt")
    assert main(["quantize", str(llama.path), str(tmp_path / "out"), "--calib", text, *FAST, *options]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_static_step_is_that_of_the_calibration_text(llama: Oracle, planted: Path, tmp_path: Path):
    made = quantized(
        llama, planted, tmp_path / "out", "--method", "smoothquant", "--activations", "tensor", "--alpha", "0.5"
    )
    found, packed = open_checkpoint(made), load_file(made / "model.safetensors")
    steps = {name: value for name, value in packed.items() if name.endswith("input_scale")}
    assert len(steps) == 21 and all(value.shape == (1,) and value > 0 for value in steps.values())
    attn = found.layer(0)["attn"]
    assert attn["q"]["kernel"].input_scale.shape == (1, 64)
    assert np.unique([attn[part]["kernel"].input_scale[0, 0] for part in "qkv"]).size == 1, "they read one input"
    assert found.stored_form("layers/0/attn/q/kernel") == "int8 x int8 by tensor"
    report = json.loads((made / "awq_jax_report.json").read_text())
    assert all(layer["error"] < layer["rtn_error"] / 10 for layer in report["layers"])
    assert {group["power"] for layer in report["layers"] for group in layer["groups"]} <= {0.0, 0.5}
    assert main(["convert", str(made), str(tmp_path / "native"), "--to", "native"]) == 0
    tokens = some_tokens(320)
    one, other = (logits(load_model(path), tokens) for path in (made, tmp_path / "native"))
    np.testing.assert_array_equal(one, other)
