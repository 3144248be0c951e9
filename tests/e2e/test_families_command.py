# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from awq_jax.cli import main
from awq_jax.families import FAMILIES


def test_every_family_is_listed_with_every_group(capsys: pytest.CaptureFixture[str]):
    assert main(["families", "--json"]) == 0
    found = {family["name"]: family for family in json.loads(capsys.readouterr().out)}
    assert list(found) == list(FAMILIES)
    for name, family in FAMILIES.items():
        assert found[name]["architectures"] == list(family.architectures)
        for row, group in zip(found[name]["groups"], family.groups, strict=True):
            assert [f"layers/*/{path}" for path in row["weights"]] == list(group.sinks)
            assert (row["folds_into"] is None) == (group.producer is None) == bool(row["reason"])


def test_people_read_what_stays_at_identity_and_why(capsys: pytest.CaptureFixture[str]):
    assert main(["families", "gpt2"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "GPT2LMHeadModel" in said
    assert "nothing: a GELU" in said
    assert "LlamaForCausalLM" not in said


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["families", "mamba"]) == 2
    assert "no family is called 'mamba'; these are: llama, " in capsys.readouterr().err


def test_a_table_of_ones_own_is_shown_as_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = 'sinks = ["layers/*/attn/o"]\nreason = "slower [measured] :boom: [/b]"'
    (tmp_path / "mine.toml").write_text(f'base = "llama"\n[[groups]]\n{rows}\n')
    assert main(["families", str(tmp_path / "mine.toml")]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "nothing: slower [measured] :boom: [/b]" in said
