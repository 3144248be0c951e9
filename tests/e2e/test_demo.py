# SPDX-License-Identifier: Apache-2.0
"""The shipped model and the claim that the demo makes."""

from pathlib import Path

import numpy as np
import pytest

from awq_jax.cli import main
from awq_jax.demo import MODEL, DemoRow, plant_checkpoint, run_demo
from awq_jax_convert.formats import open_checkpoint
from tests.tiny_models import logits_of, rounding, some_tokens


def test_planted_outliers_keep_the_function(tmp_path: Path):
    plant_checkpoint(MODEL, tmp_path / "planted")
    plain, planted = open_checkpoint(MODEL), open_checkpoint(tmp_path / "planted")
    tokens = some_tokens(2048, batch=1)
    before, after = (logits_of(plain.config, found.params(), tokens) for found in (plain, planted))
    assert np.abs(after - before).max() <= rounding(plain.config) * np.abs(before).max()
    gain = planted.layer(2)["input_norm"]["scale"] / plain.layer(2)["input_norm"]["scale"]
    assert sorted(set(gain.tolist())) == [1.0, 32.0]


@pytest.mark.slow
def test_awq_keeps_what_rounding_loses(tmp_path: Path):
    rows = {(row.model, row.method): row for row in run_demo(tmp_path / "demo", quick=True)}
    for model in ("plain", "planted outliers"):
        assert rows[model, "AWQ"].kl < rows[model, "round to nearest"].kl
        assert rows[model, "dense"].kl < 1e-6
    assert rows["planted outliers", "AWQ"].kl < 1.05 * rows["plain", "AWQ"].kl
    assert rows["planted outliers", "round to nearest"].kl > 2.5 * rows["plain", "round to nearest"].kl
    assert (tmp_path / "demo" / "report.md").is_file()
    with pytest.raises(FileExistsError, match="choose another name"):
        run_demo(tmp_path / "demo")


def test_prompts_that_look_like_markup_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch, capsys):
    row = DemoRow(
        model="plain",
        method="dense",
        perplexity=2.0,
        perplexity_stderr=None,
        kl=0.0,
        top1=1.0,
        nbytes=1,
        seconds=0.0,
        sample="] = 1",
    )
    monkeypatch.setattr("awq_jax.demo.run_demo", lambda *args, **options: (row,))
    assert main(["demo", "--out", "a[b]", "--prompt", "x[i] :boom: [/b]"]) == 0
    said = capsys.readouterr().out
    assert "dense x[i] :boom: [/b] ] = 1" in said
    assert "report: a[b]" in said
    assert "quantize a[b]/planted-dense" in said
