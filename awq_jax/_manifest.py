# SPDX-License-Identifier: Apache-2.0
"""What lies in a directory that we wrote: checksums of files and tensors, and the recipe. safetensors has none."""

import hashlib
import os
from pathlib import Path
from typing import Any

from awq_jax._files import read_json
from awq_jax._version import __version__

__all__ = ["FORMAT_VERSION", "MANIFEST", "file_digest", "make_manifest", "read_manifest", "verify"]

MANIFEST = "awq_jax_manifest.json"
FORMAT_VERSION = 1


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_manifest(files: dict[str, str], tensors: dict[str, str], recipe: dict[str, Any] | None) -> dict[str, Any]:
    """The manifest's content.

    Args:
      files: name -> sha256.
      tensors: name -> sha256 of its bytes.
      recipe: what decided the quantization, as JSON values.
    """
    return {
        "format_version": FORMAT_VERSION,
        "written_by": f"awq-jax {__version__}",
        "recipe": recipe,
        "files": dict(sorted(files.items())),
        "tensors": dict(sorted(tensors.items())),
    }


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a directory.

    Raises:
      FileNotFoundError: the directory has none; other programs don't write one.
      ValueError: it was written by a newer version, or is damaged.
    """
    found = read_json(Path(path), MANIFEST)
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{Path(path) / MANIFEST} has format_version {version!r}; this awq-jax reads {FORMAT_VERSION}. "
            "Upgrade awq-jax."
        )
    if not isinstance(found.get("files"), dict):
        raise ValueError(f"{Path(path) / MANIFEST} lists no files; download it again.")
    return found


def verify(path: str | os.PathLike[str]) -> int:
    """Compare every file of a directory with its manifest.

    Returns:
      How many files were checked.

    Raises:
      ValueError: a file is missing or its checksum differs; all of them are listed.
      FileNotFoundError: there is no manifest.
    """
    files = read_manifest(path)["files"]
    wrong = []
    for name, digest in files.items():
        found = Path(path) / os.path.basename(name)
        if not found.is_file():
            wrong.append(f"{name}: missing")
        elif file_digest(found) != digest:
            wrong.append(f"{name}: checksum differs")
    if wrong:
        raise ValueError(f"{path} is not what was written; copy it again.\n  " + "\n  ".join(wrong))
    return len(files)
