# SPDX-License-Identifier: Apache-2.0
"""Every state that a run's files pass through: what a kill at that moment would leave."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from awq_jax import _publish

CHANGES = ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir")


class Boundaries:
    """Calls ``at_boundary`` before every change that awq-jax asks the system for, and inside its first write to a file.

    Attributes:
      passed: names of the boundaries so far.
    """

    def __init__(self, at_boundary: Callable[[str], None]) -> None:
        self._at_boundary, self._inside = at_boundary, False
        self.passed: list[str] = []

    def reached(self, name: str) -> None:
        if not self._inside:
            self._inside = True  # what the observer does itself does not count
            try:
                self.passed.append(name)
                self._at_boundary(name)
            finally:
                self._inside = False

    def before(self, name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **options: Any) -> Any:
            self.reached(name)
            return change(*args, **options)

        return changed

    def open(self, *args: Any, **options: Any) -> Any:
        self.reached("create")
        return Torn(open(*args, **options), self)


class Torn:
    """A file whose first write is done in two halves."""

    def __init__(self, file: Any, boundaries: Boundaries) -> None:
        self._file, self._boundaries, self._whole = file, boundaries, False

    def __enter__(self) -> "Torn":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, piece: memoryview) -> int:
        if self._whole or len(piece) < 2:
            return self._file.write(piece)
        self._whole = True
        written = self._file.write(piece[: len(piece) // 2])
        self._boundaries.reached("half a write")
        return written


@contextlib.contextmanager
def observed(at_boundary: Callable[[str], None]) -> Iterator[Boundaries]:
    """Call a function at every boundary until the block ends."""
    boundaries = Boundaries(at_boundary)
    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            change = (lambda fd: None) if name == "fsync" else getattr(os, name)  # as good as done: no plug is pulled
            patch.setattr(os, name, boundaries.before(name, change))
        patch.setattr(_publish, "open", boundaries.open, raising=False)
        yield boundaries


def _state(home: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.lstat().st_ino, p.lstat().st_size if p.is_file() else 0) for p in home.rglob("*"))


def snapshots(home: Path, into: Path, job: Callable[[], Any]) -> list[Path]:
    """Run a job and copy ``home`` at each boundary where its files differ from the last copy.

    What the kernel was told to write and what the disk has are taken for the same, as they are after a kill; a power
    cut is what the flushes are for, and no test here can pull the plug.
    """
    states: list[Any] = []
    copies: list[Path] = []

    def copy(name: str) -> None:
        state = _state(home)
        if not states or state != states[-1]:
            states.append(state)
            copies.append(into / f"{len(copies):03d} before {name}")
            shutil.copytree(home, copies[-1])

    with observed(copy):
        job()
    return copies
