# SPDX-License-Identifier: Apache-2.0
"""Calibration at its edges: ids that the model has not, padding alone, a single token, an expert that sees none."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from awq_jax.calibration import Samples
from awq_jax.cli import main
from awq_jax_convert.formats import open_checkpoint
from tests.e2e.conftest import SIZES
from tests.models.families import TINY
from tests.reliability.job import calib, make_source, run
from tests.tiny_models import save_oracle

FAST = ["--grid", "3", "--no-clip", "--quiet"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "model")


def quantize(source: Path, out: Path, lines: list[list[int]], *options: str) -> int:
    """Through the command line, on such samples."""
    file = out.with_suffix(".jsonl")
    file.write_text("\n".join(json.dumps({"input_ids": ids}) for ids in lines))
    return main(["quantize", str(source), str(out), "--calib", str(file), *FAST, *options])


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([[1, 2], [3, 512]], "out.jsonl has token id 512, but the embedding has 512 rows"),
        ([[], []], "out.jsonl holds no tokens; give lines that are not empty"),
    ],
)
def test_what_has_no_usable_token_is_refused_before_anything_is_written(source, tmp_path, capsys, lines, said, dry):
    assert quantize(source, tmp_path / "out", lines, "--group-size", "32", *dry) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_samples_of_a_caller_are_checked_too(source: Path, tmp_path: Path):
    tokens = calib().tokens
    with pytest.raises(ValueError, match="all padding: its mask is True for none of 96 tokens"):
        Samples(tokens=tokens, mask=np.zeros(tokens.shape, bool), source="mine")
    with pytest.raises(ValueError, match=r"tokens \(4, 24\) and mask \(4, 23\) of bool"):
        Samples(tokens=tokens, mask=np.ones((4, 23), bool), source="mine")
    with pytest.raises(ValueError, match="mask of booleans"):
        Samples(tokens=tokens, mask=np.ones(tokens.shape, int), source="mine")
    with pytest.raises(ValueError, match="mine has token id -1"):
        run(source, tmp_path / "out", calib=Samples(tokens=tokens * 0 - 1, mask=calib().mask, source="mine"))
    assert not list(tmp_path.iterdir())


def test_padding_may_hold_any_id(source: Path, tmp_path: Path):
    """It is not looked up as a token that counts: the codes do not depend on it."""
    mask = calib().mask & (np.arange(24) < 20)
    made = []
    for name, filler in (("zeros", 0), ("others", 7)):
        tokens = np.where(mask, calib().tokens, filler).astype(np.int32)
        run(source, tmp_path / name, calib=Samples(tokens=tokens, mask=mask, source="x"))
        made.append((tmp_path / name / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_a_single_token_is_enough_to_run_and_too_few_to_trust(source: Path, tmp_path: Path):
    assert quantize(source, tmp_path / "out", [[5]], "--group-size", "32") == 0
    report = json.loads((tmp_path / "out" / "awq_jax_report.json").read_text())
    few = [said for said in report["warnings"] if "holds 1 token for inputs of up to 192 channels" in said]
    assert len(few) == 1 and "Give at least 3072" in few[0]
    assert all(layer["error"] <= layer["rtn_error"] for layer in report["layers"])


def test_enough_tokens_are_not_complained_of(source: Path, tmp_path: Path):
    many = np.random.default_rng(0).integers(0, 512, (8, 24)).astype(np.int32)
    report = run(source, tmp_path / "out", calib=Samples(tokens=many, mask=np.ones(many.shape, bool), source="x"))
    assert report.warnings == run(source, tmp_path / "less").warnings[1:]


def unreached(source: Path) -> None:
    """Routers that send every token to expert 0 or 1: the others' scores lie between theirs, which are opposite."""
    tensors = load_file(source / "model.safetensors")
    for name in (name for name in tensors if name.endswith(".gate.weight")):
        row = tensors[name][0]
        tensors[name] = np.stack([row, -row, 0.5 * row, 0 * row])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def test_experts_that_no_token_reaches_are_named(tmp_path: Path):
    row = next(row for row in TINY if row.family == "mixtral")
    row = dataclasses.replace(row, hf={**row.hf, **SIZES, "num_experts_per_tok": 1})
    source = save_oracle(row, tmp_path / "mixtral").path
    unreached(source)
    lines = np.random.default_rng(0).integers(0, 320, (4, 96)).tolist()
    assert quantize(source, tmp_path / "out", lines, "--group-size", "32") == 0
    report = json.loads((tmp_path / "out" / "awq_jax_report.json").read_text())
    starved = {w["path"]: w["starved"] for layer in report["layers"] for w in layer["linears"] if w["starved"]}
    # What gate and up read is one input of all experts, which every token passes; down's is each expert's own.
    assert starved == {f"layers/{index}/mlp/experts/down": [2, 3] for index in range(3)}
    assert sum("experts 2, 3 saw too few tokens" in said for said in report["warnings"]) == 3
    open_checkpoint(tmp_path / "out").params(None)  # refuses scales that are not finite and positive
