# SPDX-License-Identifier: Apache-2.0
"""The library's own text: held apart by name, free of repeats, the same in every run."""

import subprocess
import sys

import pytest

from awq_jax import stdlib_text
from awq_jax.stdlib_text import Piece, digest, documentation, pieces, source, split_of, unseen

LONG = "Words that go on for long enough to be told from a phrase that many pages share."


def paragraphs(found):
    cleaned = (" ".join(text.replace('"""', " ").split()) for piece in found for text in piece.text.split("\n\n"))
    return {text for text in cleaned if len(text) >= 60}


@pytest.mark.slow
def test_no_paragraph_stands_in_two_splits():
    heldout, calibration, train = (paragraphs(pieces(split)) for split in ("heldout", "calibration", "train"))
    assert not heldout & calibration
    assert not (heldout | calibration) & train
    assert not (heldout | calibration) & paragraphs(source())


def test_every_split_has_text_enough_for_its_use():
    assert len(documentation("heldout")) > 100_000  # 20,000 tokens are scored
    assert len(documentation("calibration")) > 300_000  # 128 samples of 512 tokens
    assert len(documentation("train")) > len(documentation("calibration"))
    assert sum(len(piece.text) for piece in source()) > 5_000_000


def test_names_are_where_their_hash_says():
    for split in ("heldout", "calibration", "train"):
        assert {split_of(piece.name) for piece in pieces(split)} == {split}
    assert {split_of(piece.name) for piece in source()} == {"train"}


@pytest.mark.parametrize(("name", "split"), [("difflib", "heldout"), ("email", "calibration"), ("asyncio", "train")])
def test_splits_do_not_move(name, split):
    # A shipped model was trained on this division: to change the hash is to show it what was held out.
    assert split_of(name) == split_of(f"_{name}.sub.Name") == split


def test_another_process_reads_the_same_text():
    code = "from awq_jax.stdlib_text import *; print(digest(documentation('heldout')))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == digest(documentation("heldout"))


def test_reading_text_needs_neither_jax_nor_numpy():
    code = "import sys; from awq_jax import stdlib_text; print({'jax', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "set()"


def test_unseen_drops_what_is_known_whatever_its_indentation():
    known = [Piece("a", f'    """{LONG}\n    """')]
    assert list(unseen([Piece("b", LONG)], known)) == []
    assert list(unseen([Piece("b", f"Example:\n\n{LONG} More.")], known)) == [Piece("b", f"Example:\n\n{LONG} More.")]


def test_a_python_without_sources_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib_text.sysconfig, "get_path", lambda name: str(tmp_path))
    stdlib_text._files.cache_clear()
    stdlib_text._pieces.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match="--calib FILE"):
            documentation("calibration")
    finally:
        stdlib_text._files.cache_clear()
        stdlib_text._pieces.cache_clear()
