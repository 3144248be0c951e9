# SPDX-License-Identifier: Apache-2.0
"""Bad input through the command line: exit code 2 (input) or 1 (system), a message with a remedy, and no output."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from awq_jax import layer_loop
from awq_jax.cli import main
from awq_jax_convert.hf import HFCheckpoint
from tests.e2e.conftest import SIZES, make_source, save_text_tools
from tests.models.families import TINY
from tests.tiny_models import Oracle, save_oracle

FAST = ["--group-size", "32", "--samples", "2", "--seq-len", "32", "--quiet"]


def truncate(d: Path) -> None:
    os.truncate(d / "model.safetensors", (d / "model.safetensors").stat().st_size - 100)


def edit_config(**changes: object) -> Callable[[Path], None]:
    def change(d: Path) -> None:
        config = json.loads((d / "config.json").read_text())
        (d / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def edit_tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def apply(d: Path) -> None:
        tensors = load_file(d / "model.safetensors")
        change(tensors)
        save_file(tensors, d / "model.safetensors", metadata={"format": "pt"})

    return apply


def index_outside(d: Path) -> None:
    (d / "model.safetensors").rename(d.parent / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (d / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_shard(d: Path) -> None:
    (d / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (d / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(d: Path) -> None:
    (d / "model.safetensors").rename(d / "pytorch_model.bin")


def nan_weight(tensors: dict[str, np.ndarray]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5:7] = np.nan


def extra(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.0.self_attn.surprise"] = np.zeros(3, np.float32)


def text(content: bytes) -> Callable[[Path], None]:
    def change(d: Path) -> None:
        (d / "text.txt").write_bytes(content)

    return change


def no_tokenizer(d: Path) -> None:
    (d / "tokenizer.json").unlink()


def nothing(d: Path) -> None:
    pass


CASES: list[tuple[str, Callable[[Path], None], list[str], str]] = [
    ("truncated", truncate, [], r"model\.safetensors.*(?s:.*)download"),
    ("missing-shard", missing_shard, [], r"shard 'model-00001-of-00002\.safetensors' is missing"),
    ("outside", index_outside, [], r"'\.\./elsewhere\.safetensors'.*only plain file names"),
    ("pickled", pickled, [], r"pickled weights can run code"),
    ("unknown-tensor", edit_tensors(extra), [], r"match no key of family 'llama'.*surprise"),
    ("architecture", edit_config(architectures=["MambaForCausalLM"]), [], r"'MambaForCausalLM' is not supported"),
    ("attribute", edit_config(surprise=1), [], r"does not know surprise=1"),
    ("layers", edit_config(num_hidden_layers=10**9), [], r"num_layers is 1000000000"),
    ("group", nothing, ["--group-size", "48"], r"64 is not a multiple of group_size=48.*32"),
    (
        "bits",
        nothing,
        ["--bits", "3", "--format", "autoawq"],
        r"not 3\. Write the native format \(--format",
    ),
    (
        "idle-rules",
        nothing,
        ["--method", "minmax", "--rules", "paper"],
        r"--rules belongs to .*not to minmax",
    ),
    ("idle-grid", nothing, ["--method", "gptq", "--grid", "3"], r"--grid belongs to --method awq .*not to gptq"),
    ("idle-clip", nothing, ["--method", "gptq", "--no-clip"], r"--no-clip belongs to --method awq"),
    (
        "eight-bits",
        nothing,
        ["--override", "layers/*/mlp/down=bits:8"],
        r"hold 4 bits, and layers/0/mlp/down int8 g32 is one of 3.*compressed-tensors or the native",
    ),
    ("override", nothing, ["--override", "layers/9/*=float"], r"override 'layers/9/\*' matches no weight; weights are"),
    ("override-word", nothing, ["--override", "*=bitz:3"], r"expected GLOB=float, GLOB=bits:N"),
    ("override-shadowed", nothing, ["--override", "*=float", "--override", "*/mlp/up=bits:3"], r"one before it leaves"),
    ("override-twice", nothing, ["--override", "*/o=float", "--override", "*/o=bits:3"], r"'\*/o' is given twice"),
    ("override-bits-twice", nothing, ["--override", "*=bits:4,bits:3"], r"expected GLOB=float"),
    (
        "q-alone",
        nothing,
        ["--override", "layers/1/attn/q=float"],
        r"vLLM.*/1/attn/k int4 g32, layers/1/attn/q in float",
    ),
    (
        "gate-alone",
        nothing,
        ["--override", "*/mlp/gate=group:16", "--format", "compressed-tensors"],
        r"vLLM.*layers/0/mlp/gate int4 g16.*up int4 g32.*one override",
    ),
    ("rule", nothing, ["--rules", "magic"], r"unknown scale rule 'magic'"),
    ("gram-limit-inf", nothing, ["--gram-limit", "inf"], r"--gram-limit is inf GB; it must be a number from 0"),
    ("gram-limit-nan", nothing, ["--gram-limit", "nan"], r"--gram-limit is nan GB"),
    ("no-rule", nothing, ["--rules", ""], r"unknown scale rule ''"),
    ("host-timeout-inf", nothing, ["--host-timeout", "inf"], r"--host-timeout is inf; it must be more than 0"),
    ("host-timeout-nan", nothing, ["--host-timeout", "nan"], r"--host-timeout is nan"),
    ("samples", nothing, ["--samples", "0"], r"samples"),
    ("seq-len", nothing, ["--seq-len", "0"], r"seq.len"),
    ("batch", nothing, ["--batch", "0"], r"batch"),
    ("empty-text", text(b""), [], r"text\.txt is empty"),
    ("short-text", text(b"two words"), [], r"fewer than one sample of seq_len=32.*--seq-len"),
    ("binary-text", text(b"\xff\xfe\x00"), [], r"not UTF-8"),
    ("no-tokenizer", no_tokenizer, [], r"no tokenizer\.json.*input_ids"),
    ("nan", edit_tensors(nan_weight), [], r"'model\.layers\.1\.mlp\.up_proj\.weight'.* 2 NaN or infinite"),
]


@pytest.mark.parametrize(("damage", "options", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_is_refused_with_a_reason_and_leaves_nothing(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, options: list[str], message: str
):
    damage(damaged)
    before = set(tmp_path.rglob("*"))
    code = main(
        ["quantize", str(damaged), str(tmp_path / "out"), "--calib", str(damaged / "text.txt"), *FAST, *options]
    )
    said = capsys.readouterr().err
    assert code == 2
    assert re.search(message, said), said
    assert set(tmp_path.rglob("*")) == before


def test_a_missing_source_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["quantize", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "nowhere is not a directory" in capsys.readouterr().err


def test_an_existing_output_is_kept(llama: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    arguments = ["quantize", str(llama.path), str(tmp_path / "out"), "--calib", str(llama.path / "text.txt"), *FAST]
    assert main(arguments) == 2
    assert "choose another name" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 2  # not ours
    assert "no awq_jax_manifest.json in it" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_a_quantized_source_is_refused(llama: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    calib = ["--calib", str(llama.path / "text.txt")]
    assert main(["quantize", str(llama.path), str(tmp_path / "once"), *calib, *FAST]) == 0
    assert main(["quantize", str(tmp_path / "once"), str(tmp_path / "twice"), *calib, *FAST]) == 2
    assert "already quantized" in capsys.readouterr().err


def test_infinite_activations_leave_the_layer_rounded_and_named(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def overflow(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = np.full_like(tensors["model.layers.1.mlp.up_proj.weight"], 1e37)
        tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].copy() * 1e-30

    edit_tensors(overflow)(damaged)
    arguments = ["quantize", str(damaged), str(tmp_path / "out"), "--calib", str(damaged / "text.txt"), *FAST]
    arguments += ["--format", "native", "--scale-dtype", "float32"]
    assert main([*arguments, "--strict"]) == 2
    assert "layers/1/mlp/down are not finite" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(arguments) == 0
    report = json.loads((tmp_path / "out" / "awq_jax_report.json").read_text())
    reasons = {linear["path"]: linear["reason"] for linear in report["layers"][1]["linears"]}
    assert "layers/1/mlp/down are not finite" in reasons["layers/1/mlp/down"]


def test_a_weight_that_becomes_nan_is_named(llama: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def spoiled(checkpoint: HFCheckpoint, index: int, dtype: object = np.float32) -> dict[str, Any]:
        layer = read(checkpoint, index)
        if index == 1:
            layer["mlp"]["up"]["kernel"][5, 3] = np.nan
        return layer

    read = HFCheckpoint.layer
    monkeypatch.setattr(HFCheckpoint, "layer", spoiled)
    arguments = ["quantize", str(llama.path), str(tmp_path / "out"), "--calib", str(llama.path / "text.txt"), *FAST]
    assert main(arguments) == 2
    assert "layers/1/mlp/up/kernel has become NaN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


MAIN = "import sys; from awq_jax.cli import main; sys.exit(main(sys.argv[1:]))"


def quantize_in_a_process(code: str, source: Path, out: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run code that ends by calling ``main`` with its arguments, on a quantization."""
    arguments = ["quantize", str(source), str(out), "--calib", str(source / "text.txt"), *FAST, *options]
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_a_full_disk_leaves_nothing_and_says_what_is_needed(llama: Oracle, tmp_path: Path):
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "from awq_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = quantize_in_a_process(code, llama.path, tmp_path / "out")
    assert done.returncode == 1, done.stderr
    assert "bytes are needed" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.resume"]
    again = quantize_in_a_process(MAIN, llama.path, tmp_path / "out", "--resume", "required")
    assert again.returncode == 0, again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_leaves_nothing(llama: Oracle, tmp_path: Path):
    code = (
        "import os, signal, sys; import awq_jax.layer_loop as p; real = p.layer_report;"
        "p.layer_report = lambda *a: (os.kill(os.getpid(), signal.SIGINT), real(*a))[1];"
        "from awq_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = quantize_in_a_process(code, llama.path, tmp_path / "out")
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert not list(tmp_path.iterdir())
    assert signal.SIGINT  # the signal that was sent


def test_torch_is_never_imported(llama: Oracle, tmp_path: Path):
    code = "import sys; from awq_jax.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = quantize_in_a_process(code, llama.path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
    assert torch  # it is installed here, so that the line above could have been True


EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.\nBufferAssignment: a long table"


@pytest.mark.parametrize(
    ("error", "options", "said", "unsaid"),
    [
        (
            jax.errors.JaxRuntimeError(EXHAUSTED),
            [],
            "a device ran out of memory (RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes). Less "
            "is taken with --hidden-states host or disk, --samples below 2, --seq-len below 32, --batch below 8",
            "a long table",
        ),
        (jax.errors.JaxRuntimeError(EXHAUSTED), ["--refine", "1"], "with --samples below 2", "--hidden-states"),
        (jax.errors.JaxRuntimeError(EXHAUSTED), ["--hidden-states", "host"], "with --seq-len below 32", "--samples"),
        (
            MemoryError(),
            [],
            "the host ran out of memory. Less is taken with --hidden-states disk, --resume never",
            "()",
        ),
        (
            MemoryError("Unable to allocate 2 GiB"),
            ["--resume", "never"],
            "(Unable to allocate 2 GiB)",
            "--resume never",
        ),
    ],
)
def test_whose_memory_ran_out_is_said_and_what_lowers_it(
    llama: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, error, options: list[str], said, unsaid
):
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("awq_jax.layer_loop.float32", fail)
    arguments = ["quantize", str(llama.path), str(tmp_path / "out"), "--calib", str(llama.path / "text.txt"), *FAST]
    assert main([*arguments, *options]) == 1
    heard = capsys.readouterr().err
    assert said in heard and unsaid not in heard and "--dry-run says how much" in heard
    assert not list(tmp_path.iterdir())


def test_layers_finished_before_memory_ran_out_are_kept_and_named(
    llama: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def fail(layer: Any) -> Any:
        done.append(layer)
        if len(done) > 1:
            raise MemoryError
        return grow(layer)

    done: list[Any] = []
    grow = layer_loop.float32
    arguments = ["quantize", str(llama.path), str(tmp_path / "out"), "--calib", str(llama.path / "text.txt"), *FAST]
    with monkeypatch.context() as patched:
        patched.setattr(layer_loop, "float32", fail)
        assert main(arguments) == 1
    assert f"The finished layers in {tmp_path / '.out.resume'} serve the same options" in capsys.readouterr().err
    assert main([*arguments, "--resume", "required"]) == 0


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_outputs_that_do_not_fill_words_are_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dry: list[str]
):
    row = dataclasses.replace(TINY[0], hf={**TINY[0].hf, **SIZES, "intermediate_size": 100})
    save_oracle(row, tmp_path / "odd")
    save_text_tools(tmp_path / "odd")
    monkeypatch.setattr("awq_jax.streams.quantize_and_measure", None)
    monkeypatch.setattr("awq_jax.dry_run.quantize_and_measure", None)
    before = set(tmp_path.rglob("*"))
    arguments = ["quantize", str(tmp_path / "odd"), str(tmp_path / "out"), "--calib", str(tmp_path / "odd/text.txt")]
    keep = ["--override", "*/mlp/down=float"]
    assert main([*arguments, *FAST, *keep, *dry]) == 2
    said = capsys.readouterr().err
    assert re.search(r"gate_proj\.weight' \(layers/0/mlp/gate\) has 100 outputs.*multiple of 8.*native", said), said
    assert set(tmp_path.rglob("*")) == before


def test_parts_of_one_tensor_need_one_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    row = next(row for row in TINY if row.family == "phi3")
    make_source(row, tmp_path / "phi3")
    arguments = ["quantize", str(tmp_path / "phi3"), str(tmp_path / "out"), *FAST]
    assert main([*arguments, "--override", "layers/2/attn/v=float"]) == 2
    assert re.search(r"qkv_proj\.weight' is one tensor.*layers/2/attn/v in floating", capsys.readouterr().err)
