# SPDX-License-Identifier: Apache-2.0
"""Bits under a budget: measured right, kept to, written, said everywhere, and not measured twice."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from awq_jax import QTensor, QuantSpec, Recipe
from awq_jax._tree import leaves
from awq_jax.budget import Question, kept_beside, mean_bits
from awq_jax.cli import main
from awq_jax.hosts import Hosts
from awq_jax.prepare import chunks_of, open_planned
from awq_jax.run import load_model, logits
from awq_jax.sensitivity import divergences
from awq_jax.sharding import Layout
from awq_jax_convert.formats import open_checkpoint
from awq_jax_convert.hf import HFCheckpoint
from tests.reliability.job import RECIPE, calib, contents, make_source, run

BUDGET = 4.0  # groups of 32 take 0.75 bits for scale and zero
PLAIN = dataclasses.replace(RECIPE, method="minmax")  # compiles in a moment


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("budget") / "source")


def mixed(source: Path, out: Path, **options: Any) -> Any:
    return run(source, out, **{"recipe": PLAIN, "budget": BUDGET, "format": "native", **options})


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("made") / "out"
    return out, mixed(source, out)


def codes(out: Path) -> Iterator[tuple[str, QTensor]]:
    for path, leaf in leaves(open_checkpoint(out).params(None)):
        if isinstance(leaf, QTensor):
            yield path, leaf


def test_the_budget_is_kept_in_what_is_written(made: tuple[Path, Any]):
    out, report = made
    bits = weights = 0
    for path, leaf in codes(out):
        choice = next(c for c in report.budget["choices"] if path.removesuffix("/kernel") in c["sinks"])
        assert leaf.bits == choice["bits"], path
        weights += math.prod(leaf.shape)
        bits += math.prod(leaf.shape) * leaf.bits + 8 * leaf.scale.nbytes + 8 * leaf.zero.nbytes
    assert bits / weights == pytest.approx(report.budget["mean"], rel=1e-12)
    assert report.budget["mean"] <= BUDGET
    assert len({c["bits"] for c in report.budget["choices"]}) > 1
    assert {"q", "k", "v"} <= {path.rpartition("/")[2] for path in report.budget["choices"][0]["sinks"]}


@pytest.mark.parametrize("recipe", [PLAIN, pytest.param(RECIPE, marks=pytest.mark.slow)], ids=lambda r: r.method)
def test_a_sensitivity_is_the_divergence_of_the_model_with_that_group_alone_rounded(
    source: Path, recipe: Recipe, tmp_path: Path
):
    checkpoint, plans, recipe = open_planned(source, recipe, "native")
    asked = Question.of(checkpoint, plans, recipe, "native", BUDGET)
    found = divergences(
        checkpoint, [asked.version(3)], asked.units, chunks_of(calib(), 2), layout=Layout(), hosts=Hosts()
    )
    assert [len(rows) for rows in found] == [4, 4]
    alone = tuple((f"layers/0/{path}", dataclasses.replace(recipe.quant, bits=3)) for path in asked.units[0][1])
    one = dataclasses.replace(recipe, overrides=(*alone, ("*", None)))
    report = run(source, tmp_path / "alone", recipe=one, format="native")
    assert not any(layer.fell_back for layer in report.layers)
    tokens = calib().tokens[:2]  # the first batch
    base, other = (
        np.asarray(jax.nn.log_softmax(logits(load_model(path), tokens)), np.float64)
        for path in (source, tmp_path / "alone")
    )
    wanted = float(np.mean(np.sum(np.exp(base) * (base - other), axis=-1)))
    # Both come of float32 logits whose rounding errors add up to some 1e-7 of a KL this small.
    assert found[0][1][0] == pytest.approx(wanted, rel=1e-3, abs=1e-7)


@pytest.mark.slow
def test_a_mesh_measures_the_same(source: Path):
    checkpoint, plans, recipe = open_planned(source, PLAIN, "native")
    asked = Question.of(checkpoint, plans, recipe, "native", BUDGET)
    versions = [asked.version(bits) for bits in (3, 8)]
    one, spread = (
        divergences(checkpoint, versions, asked.units, chunks_of(calib(), 2), layout=Layout(axes), hosts=Hosts())
        for axes in (None, {"data": 2, "model": 2})
    )
    np.testing.assert_allclose(np.array(spread), np.array(one), rtol=1e-3, atol=1e-7)


def test_uniform_bits_that_fit_are_never_better(made: tuple[Path, Any]):
    """Of what was measured: three bits for all fit the budget, so what was chosen loses at most as much."""
    budget = made[1].budget
    uniform = sum(choice["kl"][budget["widths"].index(3)] for choice in budget["choices"])
    assert budget["predicted"] <= uniform


def test_the_recipe_that_is_written_makes_the_same_model_without_a_budget(
    source: Path, made: tuple[Path, Any], tmp_path: Path
):
    out, report = made
    overrides = tuple((path, QuantSpec(**spec)) for path, spec in report.recipe["overrides"])
    run(source, tmp_path / "again", recipe=dataclasses.replace(PLAIN, overrides=overrides), format="native")
    for (path, one), (_, other) in zip(codes(out), codes(tmp_path / "again"), strict=True):
        np.testing.assert_array_equal(one.packed, other.packed, err_msg=path)
        assert one.bits == other.bits


def test_a_run_that_is_stopped_does_not_measure_again(source: Path, made: tuple[Path, Any], tmp_path: Path):
    tried: list[int] = []

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        mixed(source, out, progress=stop, measuring=lambda done, layers: tried.append(done))
    assert tried == [1, 2] and kept_beside(out).is_file()
    with pytest.raises(ValueError, match=r"other budget \(budget 4.0 bits, now 4.25 bits\)"):
        mixed(source, out, budget=BUDGET + 0.25)
    mixed(source, out, measuring=stop)
    assert not kept_beside(out).exists()
    assert contents(out) == contents(made[0])


def test_report_page_and_dry_run_show_the_bits(
    source: Path, made: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, report = made
    assert json.loads((out / "awq_jax_report.json").read_text())["budget"]["choices"] == json.loads(
        json.dumps(report.budget["choices"])
    )
    page = (out / "awq_jax_report.html").read_text()
    assert f"{report.budget['mean']:.4g} bits a weight" in page and "KL at 3" in page
    text = tmp_path / "ids.jsonl"
    text.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in calib().tokens))
    options = ["--calib", str(text), "--seq-len", "24", "--batch", "2", "--group-size", "32", "--method", "minmax"]
    assert main(["quantize", str(source), str(tmp_path / "no"), *options, "--budget", "4", "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["budget"]["mean"] <= 4 and said["format"] == "native"
    assert not (tmp_path / "no").exists() and not kept_beside(tmp_path / "no").exists()


def test_an_override_is_not_chosen_and_counts(source: Path):
    recipe = dataclasses.replace(
        RECIPE, overrides=(("*/down", QuantSpec(bits=4, group_size=32)), ("layers/0/attn/o", None))
    )
    checkpoint, plans, recipe = open_planned(source, recipe, "native")
    asked = Question.of(checkpoint, plans, recipe, "native", BUDGET)
    free = {path for units in asked.units for unit in units for path in unit}
    assert "mlp/down" not in free
    assert [len(units) for units in asked.units] == [2, 3]  # o of the first layer is dense, down is fixed
    least = mean_bits(checkpoint, asked.version(2))
    with pytest.raises(ValueError, match=f"2 bits wherever there is a choice come to {least:.4g}"):
        Question.of(checkpoint, plans, recipe, "native", least - 0.01)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "4", "--format", "autoawq"], "autoawq holds 4 bits alone"),
        (["--budget", "4", "--bits", "4"], "does not go with --bits"),
        (["--budget", "2.1"], "can't be kept: 2 bits"),
        (["--budget", "nan"], "can't be kept"),
        (["--budget", "4", "--override", "*=bits:3"], "nothing to choose"),
        (["--budget", "4", "--override", "*/q=bits:4", "--format", "compressed-tensors"], "attn/q has an override"),
    ],
)
def test_refusals_come_before_any_work(
    source: Path, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["quantize", str(source), str(tmp_path / "out"), "--group-size", "32", *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_tensor_that_is_one_in_the_files_takes_one_width(source: Path):
    checkpoint = HFCheckpoint.open(source)
    _, plans, recipe = open_planned(source, Recipe(quant=QuantSpec(group_size=32)), "compressed-tensors")
    asked = Question.of(checkpoint, plans, recipe, "compressed-tensors", BUDGET)
    assert 3 not in asked.widths and len(asked.widths) > 1
    assert all({"mlp/gate", "mlp/up"} <= {*units[2]} for units in asked.units)
