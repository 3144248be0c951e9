# SPDX-License-Identifier: Apache-2.0
"""The command line as its users meet it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from awq_jax.cli import COMMANDS, main
from awq_jax.run import load_model, logits
from tests.tiny_models import Oracle, rounding, some_tokens

FAST = ["--group-size", "32", "--samples", "2", "--seq-len", "32"]


@pytest.fixture(scope="module")
def quantized(llama: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    assert main(["quantize", str(llama.path), str(out), "--calib", str(llama.path / "text.txt"), "--quiet", *FAST]) == 0
    return out


def test_help_imports_nothing_heavy():
    heavy = "{'jax', 'flax', 'numpy', 'rich', 'transformers', 'orbax', 'tokenizers'}"
    code = f"import sys; from awq_jax.cli import _parser; _parser().format_help(); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert f"\n  awq-jax {command}" in said, "an example"
    assert len(said.splitlines()) > 8 and max(map(len, said.splitlines())) <= 80


def test_wrong_arguments_exit_with_2(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", "--bits", "5", "a", "b"])
    assert stopped.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_json_is_all_that_stands_on_stdout(llama: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["quantize", str(llama.path), str(tmp_path / "out"), "--calib", str(llama.path / "text.txt"), "--json"]
    assert main([*arguments, *FAST]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report["coverage"]["awq"] + report["coverage"].get("rtn", 0) == 21
    assert re.search(r"3/3 layer 2: output error", said.err)
    assert re.search(r"weights: \d+ with searched scales, ", said.err) and "{" not in said.err
    assert (report["src"], report["out"], report["format"]) == (arguments[1], arguments[2], "autoawq")


def test_without_calibration_text_there_is_a_loud_warning(llama: Oracle, tmp_path: Path, capsys):
    assert main(["quantize", str(llama.path), str(tmp_path / "out"), *FAST]) == 0
    assert "no calibration text was given" in " ".join(capsys.readouterr().err.split())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "no calibration text was given" in card


def test_eval_reports_perplexity_and_kl(quantized: Path, llama: Oracle, capsys: pytest.CaptureFixture[str]):
    arguments = ["eval", str(quantized), "--text", str(llama.path / "text.txt"), "--ctx", "32", "--tokens", "256"]
    assert main([*arguments, "--base", str(llama.path), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["kl"] < 1 and found["tokens"] == 8 * 31
    assert main([*arguments, "--base", str(quantized), "--json", "--quiet"]) == 0
    assert abs(json.loads(capsys.readouterr().out)["kl"]) < 1e-6
    assert main([*arguments, "--quiet"]) == 0
    assert re.match(r"perplexity +\d+\.\d+ ± ", capsys.readouterr().out)


def test_generate_continues_the_prompt(quantized: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", str(quantized), "--prompt", "The quick", "--max-new-tokens", "8", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["prompt"] == "The quick" and len(made["tokens"]) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "a", "--max-new-tokens", "1000"], "Ask for at most 12"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "a", "--temperature", "1", "--top-p", "0"], "top_p is 0.0"),
    ],
)
def test_generate_refuses(quantized: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", str(quantized), *options]) == 2
    assert message in capsys.readouterr().err


def test_inspect_lists_every_weight(quantized: Path, llama: Oracle, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(quantized), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    forms = {row["path"]: row["form"] for row in found["parameters"]}
    assert forms["layers/2/mlp/down/kernel"] == "int4 g32" and forms["norm/scale"] == "float32"
    assert sum(row["nbytes"] for row in found["parameters"]) == found["nbytes"]
    assert main(["inspect", str(llama.path)]) == 0
    assert "dense" in capsys.readouterr().out


def test_what_the_system_refuses_is_said_without_its_number(tmp_path: Path, llama: Oracle, capsys):
    (tmp_path / "file").write_text("")
    calib = ["--calib", str(llama.path / "text.txt")]
    assert main(["quantize", str(llama.path), str(tmp_path / "file" / "out"), *calib, *FAST]) in (1, 2)
    assert main(["quantize", str(llama.path), str(tmp_path / "file"), *calib, *FAST]) == 2
    assert main(["eval", str(llama.path), "--text", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "Errno" not in said
    assert f"{tmp_path / 'file'}: the output exists" in said


def test_the_card_tells_of_mixed_bits(llama: Oracle, tmp_path: Path):
    arguments = ["quantize", str(llama.path), str(tmp_path / "out"), "--calib", str(llama.path / "text.txt"), *FAST]
    mixed = ["--override", "layers/0/*=float", "--override", "*/mlp/down=bits:3", "--format", "native", "--quiet"]
    assert main([*arguments, *mixed]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "INT4 and INT3" in card and "tags: [awq, int4, int3, awq-jax]" in card
    assert "12 of 4 bits in groups of 32, 2 of 3 bits in groups of 32" in card
    assert "codes of 3 bits take the room of 4" in card


def test_a_dry_run_says_which_bits_save_nothing(llama: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["quantize", str(llama.path), str(tmp_path / "out"), "--dry-run", "--bits", "2", *FAST]
    assert main([*arguments, "--format", "native"]) == 0
    assert "codes of 2 bits take the room of 4" in capsys.readouterr().out
    assert main([*arguments, "--format", "compressed-tensors"]) == 0  # packs them as two
    assert "the room of 4" not in capsys.readouterr().out


@pytest.mark.parametrize("wide", [False, True])
def test_logits_are_those_of_the_oracle(llama: Oracle, wide: bool):
    tokens = some_tokens(320)
    model = load_model(llama.path)
    made = logits(model, tokens if wide else tokens[0].tolist())
    wanted = llama.logits(tokens if wide else tokens[:1]).reshape(made.shape)
    assert np.abs(made - wanted).max() <= rounding(model.config) * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("ids", "said"),
    [([], r"\[0\]"), ([0.5], "float64"), ([320], "0 to 319"), ([-1], "from -1"), ([1] * 129, "129 ids do not fit 128")],
)
def test_logits_refuses(llama: Oracle, ids: list[float], said: str):
    with pytest.raises(ValueError, match=said):
        logits(load_model(llama.path), ids)


@pytest.mark.parametrize(
    ("slip", "said"),
    [
        (
            "eval A --text t --tokns 3",
            "awq-jax eval: --tokns is not an option here; did you mean --tokens? See `",
        ),
        (
            "quantize A B --nothing=3",
            "awq-jax quantize: --nothing is not an option here. See `",
        ),
        ("quantize A B C", "awq-jax quantize: 'C' is one argument too many. See"),
        ("quantize A B --bits 5", "awq-jax quantize: argument --bits: invalid choice: 5 (choose"),
        ("convert A B", "awq-jax convert: the following arguments are required: --to. See"),
    ],
)
def test_a_slip_is_answered_in_one_line(slip: str, said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(slip.split())
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", "-1"], "temperature is -1.0; it must be 0 (greedy) or a positive number."),
        (["--temperature", "1", "--top-p", "2"], "top_p is 2.0; it must lie in (0, 1]."),
        (["--top-p", "0.9"], "--top-p 0.9 says nothing at temperature 0, which is greedy. Give --temperature 1."),
        (["--max-new-tokens", "0"], "max_new_tokens is 0; it must be at least 1 (--max-new-tokens)."),
    ],
)
def test_sampling_is_refused_before_the_weights_are_read(options, said, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "nowhere", "--prompt", "a", *options]) == 2
    assert capsys.readouterr().err == f"awq-jax generate: {said}\n"


def test_a_prompt_that_fills_the_model_is_to_be_shorter(llama: Oracle, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", str(llama.path), "--prompt", "word " * 500]) == 2
    assert "Give a shorter one (--prompt)" in capsys.readouterr().err
