# SPDX-License-Identifier: Apache-2.0
"""What lies in a directory that we wrote: checksums of files and tensors, and the recipe. safetensors has none."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from awq_jax._files import is_inside, read_json
from awq_jax._version import __version__

__all__ = ["FORMAT_VERSION", "MANIFEST", "make_manifest", "read_manifest", "tree_digests", "verify"]

MANIFEST = "awq_jax_manifest.json"
FORMAT_VERSION = 1


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_digests(directory: Path, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """sha256 of every file under a directory, by relative path."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(p.relative_to(directory)): _digest(p) for p in found if str(p.relative_to(directory)) not in skip}


def make_manifest(
    files: Mapping[str, str], tensors: Mapping[str, str], recipe: Mapping[str, Any] | None, **more: Any
) -> dict[str, Any]:
    """The manifest's content.

    Args:
      files: relative path -> sha256.
      tensors: name -> sha256 of its bytes.
      recipe: what decided the quantization, as JSON values.
      **more: further JSON values.
    """
    return {
        "format_version": FORMAT_VERSION,
        "written_by": f"awq-jax {__version__}",
        "recipe": recipe,
        **more,
        "files": dict(sorted(files.items())),
        "tensors": dict(sorted(tensors.items())),
    }


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a directory.

    Raises:
      FileNotFoundError: the directory has none; other programs don't write one.
      ValueError: it was written by another version, or is damaged.
    """
    found = read_json(Path(path), MANIFEST)
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{Path(path) / MANIFEST} has format_version {version!r}; this awq-jax reads {FORMAT_VERSION}. "
            "Upgrade awq-jax."
        )
    files = found.get("files")
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise ValueError(f"{Path(path) / MANIFEST} lists no files; download it again.")
    return found


def _state(directory: Path, name: str, digest: str) -> str | None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return "lies outside the directory"
    if not (directory / relative).is_file():
        return "missing"
    if not is_inside(directory, directory / relative):
        return "a link out of the directory"
    return None if _digest(directory / relative) == digest else "checksum differs"


def verify(path: str | os.PathLike[str], under: str = "") -> int:
    """Compare every file of a directory with its manifest.

    Args:
      path: of the directory.
      under: only the files in this folder of it.

    Returns:
      How many files were checked.

    Raises:
      ValueError: a file is missing or its checksum differs; all of them are listed.
      FileNotFoundError: there is no manifest.
    """
    inside = f"{under}/" if under else ""
    files = {name: digest for name, digest in read_manifest(path)["files"].items() if name.startswith(inside)}
    if not files:
        raise ValueError(f"{Path(path) / MANIFEST} lists no files of {under or 'the directory'}; copy it again.")
    states = {name: _state(Path(path), name, digest) for name, digest in files.items()}
    wrong = [f"{name}: {state}" for name, state in states.items() if state]
    # Who reads the folder next may follow more than what is listed.
    others = (found for found in (Path(path) / under).rglob("*") if str(found.relative_to(path)) not in files)
    wrong += [f"{other}: a link out of the directory" for other in others if not is_inside(Path(path), other)]
    if wrong:
        raise ValueError(f"{path} is not what was written; copy it again.\n  " + "\n  ".join(wrong))
    return len(files)
