# SPDX-License-Identifier: Apache-2.0
"""`awq-jax compare`: what it measures is what quantizing and evaluating by hand give, and its files agree."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from awq_jax.cli import main
from awq_jax.compare import Compared
from awq_jax.run import evaluate_checkpoint
from tests.tiny_models import Oracle

CALIB = ["--samples", "4", "--seq-len", "32", "--group-size", "32", "--quiet"]


@pytest.fixture(scope="module")
def compared(llama: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods on a text of a single window, which has no standard error."""
    out = tmp_path_factory.mktemp("compare") / "out"
    text = str(llama.path / "text.txt")
    options = ["--methods", "minmax,awq", "--bits", "3", "--calib", text, "--text", text, "--tokens", "128"]
    assert main(["compare", str(llama.path), str(out), *options, "--ctx", "96", *CALIB]) == 0
    return out


def rows_of(out: Path) -> list[dict[str, object]]:
    return json.loads((out / "comparison.json").read_text())


def test_every_recipe_has_a_row_and_a_page(compared: Path):
    rows = rows_of(compared)
    names = [(row["bits"], row["method"]) for row in rows]
    assert names == [(16, "dense"), (3, "minmax"), (3, "awq")]
    for bits, method in names[1:]:
        assert f"INT{bits}" in (compared / f"int{bits}-{method}.html").read_text()
    assert rows[0]["kl"] == 0 and all(row["perplexity_stderr"] is None for row in rows)


def test_the_files_say_the_same(compared: Path):
    rows = rows_of(compared)
    sheet = list(csv.DictReader(io.StringIO((compared / "comparison.csv").read_text())))
    assert [float(line["kl"]) for line in sheet] == [row["kl"] for row in rows]
    assert all(line["perplexity_stderr"] == "" for line in sheet)
    for file in ("comparison.md", "comparison.html"):
        said = (compared / file).read_text()
        assert all(f"{row['perplexity']:.2f}" in said for row in rows) and "±" not in said and "nan" not in said


def test_a_row_is_what_quantizing_and_evaluating_give(compared: Path, llama: Oracle, tmp_path: Path):
    text = llama.path / "text.txt"
    out = tmp_path / "awq"
    options = ["--method", "awq", "--bits", "3", "--format", "native", "--calib", str(text), *CALIB]
    assert main(["quantize", str(llama.path), str(out), *options]) == 0
    by_hand = evaluate_checkpoint(out, text, base=llama.path, tokens=128, ctx=96)
    row = Compared(**{**rows_of(compared)[-1], "layers": ()})
    assert (row.method, row.kl, row.perplexity, row.top1) == ("awq", by_hand.kl, by_hand.perplexity, by_hand.top1)


def test_an_existing_output_is_kept(compared: Path, llama: Oracle, capsys: pytest.CaptureFixture[str]):
    before = (compared / "comparison.json").read_bytes()
    assert main(["compare", str(llama.path), str(compared), *CALIB]) == 2
    assert str(compared) in capsys.readouterr().err
    assert (compared / "comparison.json").read_bytes() == before


def test_a_log_hears_of_every_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def steps(*args: object, progress: Callable[[str], None], **options: object) -> tuple[Compared, ...]:
        progress("1/2 int4-awq")
        return ()

    monkeypatch.setattr("awq_jax.compare.compare_methods", steps)
    assert main(["compare", "src", "out"]) == 0
    assert capsys.readouterr().err == "1/2 int4-awq\n"
    assert main(["compare", "src", "out", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
