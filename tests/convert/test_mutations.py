# SPDX-License-Identifier: Apache-2.0
"""Damaged, foreign and hostile directories: each is read, or refused by name; none hangs, none is believed blindly."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from awq_jax_convert.formats import open_checkpoint
from tests.convert.mutants import CORPUS, FORMATS, apply, files_opened, make_originals, mutate, refusal


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_originals(tmp_path_factory.mktemp("originals"))


@pytest.fixture(scope="module")
def opened() -> Iterator[list[str]]:
    with files_opened() as names:
        yield names


def survive(originals: dict[str, Path], work: Path, opened: list[str], seeds: range, forms: tuple[str, ...]) -> int:
    """Mutate and read; returns how many were refused."""
    refused = 0
    for seed in seeds:
        form = forms[seed % len(forms)]
        shutil.copytree(originals[form], work / "copy")
        mutate(np.random.default_rng(seed), work / "copy")
        refused += bool(refusal(work / "copy", opened, f"seed {seed} of {form}"))
        shutil.rmtree(work / "copy")
    return refused


def test_what_once_reached_something_new(originals, tmp_path, opened):
    """What `python -m tests.convert.grow_corpus` kept: each reached code or words that none before it did."""
    refused = []
    for number, row in enumerate(json.loads(CORPUS.read_text())):
        apply(row["changed"], originals[row["form"]], tmp_path / "copy")
        refused.append(refusal(tmp_path / "copy", opened, f"number {number}, of {row['form']}"))
        shutil.rmtree(tmp_path / "copy")
    assert sum(map(bool, refused)) > len(refused) // 2


def test_a_few_hundred_mutations(originals, tmp_path, opened):
    refused = survive(originals, tmp_path, opened, range(240), FORMATS[:-1])
    assert refused > 120  # most do harm


@pytest.mark.slow
def test_ten_thousand_mutations(originals, tmp_path, opened):
    survive(originals, tmp_path, opened, range(1000, 11_000), FORMATS[:-1])


@pytest.mark.slow
def test_a_thousand_mutations_of_a_native_directory(originals, tmp_path, opened):
    survive(originals, tmp_path, opened, range(20_000, 21_000), FORMATS[-1:])


@pytest.mark.parametrize("form", FORMATS)
def test_unharmed_they_are_read(originals, form):
    assert open_checkpoint(originals[form]).params(None)
    assert os.listdir(originals[form])
