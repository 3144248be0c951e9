# SPDX-License-Identifier: Apache-2.0
"""Texts as other systems save them: calibration and evaluation read one file alike."""

import json
from pathlib import Path

import pytest

from awq_jax.calibration import read_calibration
from awq_jax.demo import MODEL
from awq_jax.run import evaluate_checkpoint
from awq_jax.stdlib_text import documentation
from awq_jax.texts import document_ids

MARK = b"\xef\xbb\xbf"


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.mark.parametrize(("name", "content"), [("x.txt", b"ab\r\ncd"), ("x.jsonl", b'{"text": "ab\\ncd"}\r\n')])
def test_marks_and_line_ends_of_windows_are_no_tokens(tmp_path: Path, name: str, content: bytes):
    path = tmp_path / name
    path.write_bytes(MARK + content)
    found = read_calibration(path, letters, samples=1, seq_len=5)
    assert found.tokens.tolist() == [letters("ab\ncd")]


def test_documents_follow_one_another_as_far_as_they_are_asked_for(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "abc"}\n\n{"input_ids": [7, 8]}\nnot reached')
    assert document_ids(path, letters, "text file", 5) == [*letters("abc"), 7, 8]


def test_json_lines_measure_as_the_text_in_them(tmp_path: Path):
    words = documentation("heldout")[:4000]
    (tmp_path / "plain.txt").write_text(words)
    (tmp_path / "lines.jsonl").write_text(json.dumps({"text": words}))
    plain, lines = (
        evaluate_checkpoint(MODEL, tmp_path / name, tokens=128, ctx=64) for name in ("plain.txt", "lines.jsonl")
    )
    assert plain == lines


@pytest.mark.parametrize("read", ["calibration", "evaluation"])
def test_one_json_value_is_not_taken_for_prose(tmp_path: Path, read: str):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "words " * 100}]))
    with pytest.raises(ValueError, match=r"rows\.json is JSON; give JSON lines.*\*\.jsonl"):
        if read == "calibration":
            read_calibration(path, letters, samples=1, seq_len=5)
        else:
            evaluate_checkpoint(MODEL, path)


def test_too_few_tokens_are_those_of_the_text_or_those_asked_for(tmp_path: Path):
    path = tmp_path / "x.txt"
    path.write_text("word " * 2000)
    with pytest.raises(ValueError, match=r"^100 tokens were asked for, fewer than one window of ctx=192.*--tokens"):
        evaluate_checkpoint(MODEL, path, tokens=100)
    path.write_text("word")
    with pytest.raises(ValueError, match=r"^the text has \d tokens, fewer than one window of ctx=192\. Give more text"):
        evaluate_checkpoint(MODEL, path)
