# SPDX-License-Identifier: Apache-2.0
"""What a quantization will cost, said without reading a weight, and how near that comes to what it does cost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from awq_jax import QuantSpec, Recipe
from awq_jax.cli import main
from awq_jax.dry_run import DryRun, dry_run, dry_run_directory
from awq_jax.families import FAMILIES
from awq_jax.models import config_from_hf, param_shapes
from awq_jax.prepare import plans_of
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.keymap import theirs
from awq_jax_convert.safetensors_dir import SafetensorsDir
from benchmarks.memory import make_checkpoint, quantize
from tests.reliability.job import RECIPE, calib, make_source, run

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


def hollow(path: Path, hf: dict[str, Any]) -> Path:
    """A checkpoint with true headers and no bytes: one file that the disk keeps as a hole."""
    family, header, at = FAMILIES["llama"], {}, 0
    for ours, shape in param_shapes(config_from_hf(family, hf)).items():
        name, transpose = theirs(family, ours)
        size = 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": [*shape[:: -1 if transpose else 1]], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.mkdir()
    (path / "config.json").write_text(json.dumps(hf))
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path


def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(SafetensorsDir, "read", refuse)


@pytest.mark.slow
def test_70b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    nothing_is_read(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 40}))
    source = hollow(tmp_path / "70b", LLAMA_70B)
    assert (
        main(
            [
                "quantize",
                str(source),
                str(tmp_path / "out"),
                "--dry-run",
                "--json",
                "--serve-tp",
                "8",
                "--gram-limit",
                "1",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    assert found["bytes_before"] == 2 * 70_553_706_496  # the model's own count of parameters, in bfloat16
    assert 0.27 * found["bytes_before"] < found["bytes_after"] < 0.3 * found["bytes_before"]
    assert len(found["layers"]) == 80
    # Three inputs of 8,192, and of the widest one blocks of 7,168 rows, the largest that take less than 1 GB.
    assert found["gram_bytes"] == 4 * (3 * 8192**2 + 28672 * 7168)
    assert len(found["notes"]) == 1 and "28672 inputs blocks of 7168 rows" in found["notes"][0]
    # They are there whatever is done, and the hidden states of 65,536 tokens.
    assert found["device_bytes"] > found["gram_bytes"] + 4 * 65536 * 8192
    assert found["disk_bytes"] > 2 * found["bytes_after"]
    assert main(["quantize", str(source), str(tmp_path / "out"), "--dry-run", "--serve-tp", "3"]) == 2
    assert "straddle devices" in capsys.readouterr().err


def test_bytes_are_those_that_a_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = make_source(tmp_path / "source")
    done = run(source, tmp_path / "native", format="native")
    nothing_is_read(monkeypatch)
    found = dry_run_directory(source, recipe=RECIPE, format="native", samples=4, seq_len=24, batch=2)
    assert (found.bytes_before, found.bytes_after) == (done.bytes_before, done.bytes_after)
    assert found.tokens == calib().tokens.size
    assert found.to_dict()["flops"] == sum(layer.flops for layer in found.layers)


@pytest.mark.parametrize(("mesh", "share"), [(None, 1), ({"model": 2}, 2)])
def test_a_device_holds_the_next_layer_as_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mesh, share: int
):
    source = make_source(tmp_path / "source")
    options = {"recipe": RECIPE, "format": "native", "samples": 4, "seq_len": 24, "batch": 2, "mesh": mesh}
    dry = lambda: dry_run_directory(source, **options).device_bytes
    on_the_host = dry()  # of a CPU, whose memory holds it as read
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    checkpoint = HFCheckpoint.open(source)
    weights = [path for path in checkpoint.paths() if path.startswith("layers/1/")]
    shared = [path for path in weights if len(checkpoint.shape(path)) > 1]
    one = (
        sum(map(checkpoint.stored_nbytes, weights)) - sum(map(checkpoint.stored_nbytes, shared)) * (share - 1) // share
    )
    assert dry() - on_the_host == one


@pytest.mark.slow
def test_a_layer_that_is_left_alone_costs_its_forward_passes_only(tmp_path: Path):
    checkpoint = HFCheckpoint.open(make_source(tmp_path / "source"))

    def estimate(*overrides: tuple[str, QuantSpec | None]) -> DryRun:
        recipe = Recipe(quant=QuantSpec(group_size=32), overrides=overrides)
        return dry_run(checkpoint, plans_of(checkpoint, recipe), samples=4, seq_len=24, batch=2)

    found = estimate(("layers/1/*", None))
    searched, left = found.layers
    assert left.bytes_after == left.bytes_before and searched.bytes_after < searched.bytes_before
    parameters = sum(
        int(np.prod(checkpoint.shape(f"layers/1/{name}/kernel")))
        for name in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
    )
    assert left.flops == 2 * parameters * 3 * found.tokens  # one pass, and two that measure
    assert searched.flops > 2 * left.flops


@pytest.mark.parametrize(
    ("options", "said"), [(["--samples", "0"], "samples is 0"), (["--group-size", "48"], "group_size=48")]
)
def test_what_a_run_would_refuse_is_refused(tmp_path: Path, options: list[str], said: str, capsys):
    source = make_source(tmp_path / "source")
    assert main(["quantize", str(source), str(tmp_path / "out"), "--dry-run", *options]) == 2
    assert said in capsys.readouterr().err


def exists(out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    out.mkdir()
    return []


def is_not_ours(out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    out.mkdir()
    (out / "theirs").touch()
    return ["--overwrite"]


def lies_under_a_file(out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    out.parent.write_text("a file")
    return []


def may_not_be_written(out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != out.parent.parent)  # who tests may be root
    return []


def has_no_room(out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    return []


def has_nothing_to_resume(out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return ["--resume", "required"]


@pytest.mark.parametrize(
    ("output", "code", "said"),
    [
        (exists, 2, "the output exists; choose another name"),
        (is_not_ours, 2, "not overwritten: no awq_jax_manifest.json in it"),
        (lies_under_a_file, 2, "not a directory, so the output can't be made in it"),
        (may_not_be_written, 1, "not writable, so the output can't be made in it"),
        (has_no_room, 1, "bytes are needed, 1000 are free"),
        (has_nothing_to_resume, 2, "nothing to go on from"),
    ],
)
def test_of_the_output_the_same_is_said_as_by_a_run(tmp_path: Path, monkeypatch, capsys, output, code: int, said: str):
    source, out = make_source(tmp_path / "source"), tmp_path / "home" / "out"
    lines = [json.dumps({"input_ids": row.tolist()}) for row in calib().tokens]
    (tmp_path / "calib.jsonl").write_text("\n".join(lines))
    out.parent.mkdir() if output in (exists, is_not_ours) else None
    shape = ["--group-size", "32", "--grid", "3", "--no-clip", "--calib", str(tmp_path / "calib.jsonl"), "--quiet"]
    arguments = ["quantize", str(source), str(out), *shape, *output(out, monkeypatch)]
    heard = []
    for way in (["--dry-run"], []):
        assert main([*arguments, *way]) == code
        heard.append(capsys.readouterr().err)
        assert not list(out.parent.glob(".*")) if out.parent.is_dir() else True
    assert said in heard[0] and heard[0] == heard[1]


@pytest.mark.parametrize("inside", [True, False])
def test_an_output_in_or_over_the_source_is_refused(tmp_path: Path, capsys, inside: bool):
    source = make_source(tmp_path / "home" / "source")
    out = source / "out" if inside else tmp_path / "home"
    assert main(["quantize", str(source), str(out), "--dry-run", "--group-size", "32"]) == 2
    assert "the source" in capsys.readouterr().err


def test_the_text_says_how_much_there_is_of_it(tmp_path: Path, monkeypatch, capsys):
    source = make_source(tmp_path / "source")
    nothing_is_read(monkeypatch)
    (tmp_path / "calib.jsonl").write_text('{"input_ids": [1, 2, 3, 4, 5, 6, 7, 8]}\n' * 4)
    shape = ["--group-size", "32", "--grid", "3", "--no-clip", "--dry-run", "--json", "--batch", "2"]
    arguments = ["quantize", str(source), str(tmp_path / "out"), *shape, "--calib", str(tmp_path / "calib.jsonl")]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 32
    assert main([*arguments[:-1], str(tmp_path / "missing.jsonl")]) == 2
    assert "missing.jsonl" in capsys.readouterr().err


def test_other_processes_are_not_counted_for(tmp_path: Path, capsys):
    source = make_source(tmp_path / "source")
    assert main(["quantize", str(source), str(tmp_path / "out"), "--dry-run", "--distributed"]) == 2
    assert "--dry-run counts for one process" in capsys.readouterr().err


def test_people_read_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = make_source(tmp_path / "source")
    arguments = ["--dry-run", "--group-size", "32", "--samples", "4", "--seq-len", "24", "--grid", "3", "--no-clip"]
    assert main(["quantize", str(source), str(tmp_path / "out"), *arguments]) == 0
    said = capsys.readouterr().out
    assert "0-1" in said and "device memory" in said and "disk needed" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "inner", "layers"), [(512, 2048, 4), (1024, 4096, 2)])
def test_peak_memory_is_within_a_fifth(tmp_path: Path, hidden: int, inner: int, layers: int):
    make_checkpoint(tmp_path / "src", layers, hidden, inner)
    arguments = ["quantize", str(tmp_path / "src"), "unused", "--samples", "16", "--seq-len", "128"]
    command = [sys.executable, "-m", "awq_jax.cli", *arguments, "--dry-run", "--json"]
    expected = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    measured = quantize(tmp_path / "src", tmp_path / "out")
    assert abs(expected["peak_memory_bytes"] / measured["peak_memory_bytes"] - 1) < 0.2
