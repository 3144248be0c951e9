# SPDX-License-Identifier: Apache-2.0
"""A user's text: UTF-8 as it stands, or JSON lines. Calibration and evaluation read the same files the same way."""

import itertools
import json
import pathlib
from collections.abc import Callable, Iterable

__all__ = ["Encode", "document_ids", "documents", "encode_start", "is_json_lines", "read_text", "refuse_file"]

Encode = Callable[[str], list[int]]

ENCODING = "utf-8-sig"  # UTF-8, and without the mark that Windows puts in front, which would be a token


def refuse_file(path: pathlib.Path, what: str, option: str) -> None:
    """Refuse what is no text: nothing, a directory, or JSON that is not in lines.

    Raises:
      FileNotFoundError: no such file.
      ValueError: one JSON value; its braces would pass for prose.
    """
    if not path.is_file():
        why = "a directory, not a text" if path.is_dir() else "not there"
        raise FileNotFoundError(f"{what} {path} is {why}; give UTF-8 text or JSON lines ({option}).")
    if path.suffix.lower() == ".json":
        raise ValueError(
            f'{what} {path} is JSON; give JSON lines, one {{"text": ...}} a line in a file named *.jsonl, or plain '
            f"text under another name ({option})."
        )


def is_json_lines(path: pathlib.Path) -> bool:
    """Told by its name."""
    return path.suffix.lower() == ".jsonl"


def read_text(path: pathlib.Path, what: str) -> str:
    """A file that is plain text.

    Raises:
      ValueError: not UTF-8.
    """
    try:
        return path.read_text(encoding=ENCODING)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, what, error) from None


def _not_utf8(path: pathlib.Path, what: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{what} {path} is not UTF-8 (byte {error.start}). Save it as UTF-8.")


def documents(path: pathlib.Path, encode: Encode | None, what: str) -> Iterable[list[int]]:
    """Ids of each line of a ``.jsonl`` file, as they are asked for.

    Args:
      path: lines of ``{"text": ...}`` or pre-tokenized ``{"input_ids": [...]}``.
      encode: text to token ids; None if there is no tokenizer.
      what: names the file in errors.

    Raises:
      ValueError: not UTF-8, or a malformed line, named by its number.
    """
    try:
        with path.open(encoding=ENCODING) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _document(line, encode, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, what, error) from None


def _document(line: str, encode: Encode | None, where: str) -> list[int]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, absurd nesting
        raise ValueError(f"{where}: not JSON ({getattr(error, 'msg', error)}).") from None
    if not isinstance(row, dict) or not ({"text", "input_ids"} & row.keys()):
        raise ValueError(f'{where}: expected an object with "text" or "input_ids".')
    if "input_ids" in row:
        ids = row["input_ids"]
        if not isinstance(ids, list) or any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
            raise ValueError(f'{where}: "input_ids" must be a list of integers, token ids from 0 up.')
        return ids
    if not isinstance(row["text"], str):
        raise ValueError(f'{where}: "text" must be a string.')
    return _encode(row["text"], encode, where)


def _encode(text: str, encode: Encode | None, where: str) -> list[int]:
    if encode is None:
        raise ValueError(
            f"{where}: the checkpoint has no tokenizer.json, so text cannot be encoded. "
            'Give JSON lines of {"input_ids": [...]}.'
        )
    try:
        return encode(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def encode_start(text: str, encode: Encode | None, where: str, tokens: int) -> list[int]:
    """Ids of as much of a text as gives so many: a corpus is not encoded for the sake of its first pages."""
    size = 8 * tokens
    # More than so many, because the last id may be that of a word cut in two.
    while len(ids := _encode(text[:size], encode, where)) <= tokens and size < len(text):
        size *= 4
    return ids


def document_ids(path: pathlib.Path, encode: Encode | None, what: str, tokens: int) -> list[int]:
    """Documents one after the other, as many of them as give so many ids."""
    return list(itertools.islice(itertools.chain.from_iterable(documents(path, encode, what)), tokens))
