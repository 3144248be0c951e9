# SPDX-License-Identifier: Apache-2.0
"""Files of one checkpoint directory, named by bytes that nobody vouches for."""

import json
import os
import stat
from pathlib import Path
from typing import Any

__all__ = ["MAX_JSON_BYTES", "is_inside", "parse_json", "read_json", "read_text", "resolve_inside"]

MAX_JSON_BYTES = 100_000_000


def _homes(directory: Path) -> list[Path]:
    """Where the files of a checkpoint may lie: in it, or in the ``blobs`` of a Hugging Face cache."""
    home = Path(os.path.realpath(directory))
    return [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]


def is_inside(directory: Path, path: Path) -> bool:
    """Whether a path under a checkpoint's directory leads to where its files may lie, whatever links it passes."""
    real = Path(os.path.realpath(path))  # of links in a ring the path itself, where Path.resolve raises
    return any(home == real or home in real.parents for home in _homes(directory))


def resolve_inside(directory: Path, name: str) -> Path:
    """The regular file that a checkpoint calls ``name``, refused if it lies elsewhere.

    A symbolic link may point inside the directory, or at the ``blobs`` beside the ``snapshots`` of a Hugging Face
    cache, where every file is one.

    Raises:
      ValueError: the name is a path, or leads out of the directory, or is not a regular file.
      FileNotFoundError: there is no such file.
    """
    if not name or name != os.path.basename(name) or "\\" in name or "\0" in name or name in (".", ".."):
        raise ValueError(
            f"{directory} names the file {name!r}: only plain file names inside the directory are read, no paths."
        )
    real = Path(os.path.realpath(directory / name))
    if real.parent not in _homes(directory):
        raise ValueError(
            f"{directory / name} is a link to {real}, outside its directory; it is not followed. "
            "Copy the file into the directory if you trust it."
        )
    if not real.exists():
        raise FileNotFoundError(f"{directory} has no file {name!r}; give a checkpoint directory, or download again.")
    if not stat.S_ISREG(real.stat().st_mode):
        raise ValueError(f"{directory / name} is not a regular file.")
    return real


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} occurs twice")
    return made


def parse_json(raw: bytes, source: object) -> dict[str, Any]:
    """A JSON object from foreign bytes: duplicate keys, other types and absurd nesting are errors.

    Args:
      raw: UTF-8 text.
      source: what to call it in an error.

    Raises:
      ValueError: the bytes are not such an object.
    """
    try:
        made = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{source} is not valid JSON ({error}); download it again.") from error
    if not isinstance(made, dict):
        raise ValueError(f"{source} holds a JSON {type(made).__name__}, not an object; download it again.")
    return made


def _read_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes; a file of this kind over {MAX_JSON_BYTES} is not read.")
    return path.read_bytes()


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the directory.

    Raises:
      ValueError: larger than 100 MB, or not a JSON object, or outside the directory.
      FileNotFoundError: there is no such file.
    """
    path = resolve_inside(directory, name)
    return parse_json(_read_bytes(path), path)


def read_text(directory: Path, name: str) -> str:
    """The text in a file of the directory.

    Raises:
      ValueError: larger than 100 MB, or not UTF-8, or outside the directory.
      FileNotFoundError: there is no such file.
    """
    path = resolve_inside(directory, name)
    try:
        return _read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); download it again.") from None
