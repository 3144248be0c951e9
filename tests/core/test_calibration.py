# SPDX-License-Identifier: Apache-2.0
"""Calibration files as people make them, and as nobody should."""

import json
from pathlib import Path

import numpy as np
import pytest

from awq_jax.calibration import read_calibration


def letters(text: str) -> list[int]:
    """One token a character: no tokenizer makes more of prose."""
    return [ord(letter) % 256 for letter in text]


def written(tmp_path: Path, *lines: object, name: str = "x.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"input_ids": [1, 2**31]}, r"line 2: .input_ids. must be a list of integers"),
        ({"input_ids": [-1]}, r"line 2: .*from 0 up"),
        ({"input_ids": [True]}, r"line 2: .input_ids. must be a list of integers"),
        ('{"input_ids": [%s]}' % ("9" * 5000), r"line 2: not JSON"),
        ("[" * 100_000, r"line 2: not JSON"),
        ({"text": None}, r"line 2: .text. must be a string"),
        ("null", r"line 2: expected an object"),
    ],
    ids=["huge", "negative", "bool", "digits", "nested", "null-text", "null"],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str):
    path = written(tmp_path, {"input_ids": [1, 2]}, line)
    with pytest.raises(ValueError, match=message):
        read_calibration(path, letters, samples=4, seq_len=4)


def test_no_more_documents_are_read_than_are_used(tmp_path: Path):
    path = written(tmp_path, {"text": ""}, {"text": "one"}, {"text": "two"}, "not reached")
    found = read_calibration(path, letters, samples=2, seq_len=4)
    assert found.tokens.shape == (2, 3) and found.count == 6 and found.notes == ()


def test_samples_that_are_copies_are_counted(tmp_path: Path):
    lines = [{"input_ids": ids} for ids in ([1, 2], [3], [1, 2], [3, 0], [1, 2])]
    found = read_calibration(written(tmp_path, *lines), None, samples=5, seq_len=4)
    assert found.notes == ("2 of the 5 samples of x.jsonl are copies of others",)
    text = tmp_path / "same.txt"
    text.write_text("abcd" * 8)
    found = read_calibration(text, letters, samples=8, seq_len=4)
    assert found.notes == ("7 of the 8 samples of same.txt are copies of others",)


def test_the_suffix_may_be_in_capitals(tmp_path: Path):
    found = read_calibration(written(tmp_path, {"input_ids": [7, 8]}, name="X.JSONL"), None, samples=1, seq_len=4)
    assert found.tokens.tolist() == [[7, 8]]


@pytest.mark.parametrize("characters_per_token", [1, 3, 40])
def test_of_a_corpus_only_the_start_is_encoded(tmp_path: Path, characters_per_token: int):
    text = "abcdefghijklmnopqrstuvwxyz0123456789 .,;" * 5000
    seen: list[int] = []

    def encode(part: str) -> list[int]:
        seen.append(len(part))
        return letters(part)[::characters_per_token]

    found = read_calibration(written(tmp_path, text, name="x.txt"), encode, samples=4, seq_len=8)
    np.testing.assert_array_equal(found.tokens.ravel(), letters(text)[::characters_per_token][:32])
    assert max(seen) <= 4 * 32 * max(characters_per_token, 8)


def test_a_text_that_is_used_up_is_encoded_whole(tmp_path: Path):
    found = read_calibration(written(tmp_path, "abcdefghij", name="x.txt"), letters, samples=9, seq_len=5)
    assert found.tokens.shape == (2, 5) and found.notes
    with pytest.raises(ValueError, match=r"has 10 tokens.*at most 10"):
        read_calibration(tmp_path / "x.txt", letters, samples=1, seq_len=11)
