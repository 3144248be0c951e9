# SPDX-License-Identifier: Apache-2.0
"""Look for damaged directories that reach lines or words of the readers which none before did, and keep them.

    python -m tests.convert.grow_corpus --minutes 60

What is kept is damaged further in its turn. `tests/convert/corpus.json` grows by what was found; a crash is printed and
ends the search.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import awq_jax
import awq_jax_convert
from tests.convert.mutants import CORPUS, FORMATS, apply, changes, files_opened, make_originals, mutate, refusal

HOMES = tuple(package.__path__[0] for package in (awq_jax, awq_jax_convert))


class Reached:
    """Lines of the package that run, and words that are said, when a directory is read."""

    def __init__(self) -> None:
        self.lines: set[Any] = set()

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        """For `sys.settrace`."""
        if not frame.f_code.co_filename.startswith(HOMES):
            return None
        if event == "line":
            self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self.trace

    def by(self, form: str, directory: Path, opened: list[str]) -> set[Any]:
        """What reading a directory reaches."""
        self.lines = set()
        sys.settrace(self.trace)
        try:
            said = refusal(directory, opened, form)
        finally:
            sys.settrace(None)
        words = re.sub(r"/\S+|'[^']*'|[^a-z ]+", " ", said.lower()).split()
        return self.lines | {" ".join(words[:4])}


def fewest(rows: list[tuple[dict[str, Any], set[Any]]]) -> list[dict[str, Any]]:
    """Small ones that together reach what all do."""
    left = set().union(*(reached for _, reached in rows))
    chosen = []
    while left:
        row, reached = max(rows, key=lambda item: len(item[1] & left) / len(json.dumps(item[0])))
        chosen.append(row)
        left -= reached
    return chosen


def main() -> None:
    """Grow the corpus for some minutes."""
    p = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    p.add_argument("--minutes", type=float, default=60.0)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    rng = np.random.default_rng(args.seed)
    kept: list[dict[str, Any]] = json.loads(CORPUS.read_text()) if CORPUS.exists() else []
    reached, tried, found = Reached(), 0, []
    with tempfile.TemporaryDirectory() as folder, files_opened() as opened:
        home, copy = Path(folder), Path(folder) / "work" / "copy"
        (home / "originals").mkdir()
        (home / "work").mkdir()
        originals = make_originals(home / "originals")
        seen = set().union(*(reached.by(form, original, opened) for form, original in originals.items()))

        def read(row: dict[str, Any]) -> set[Any]:
            apply(row["changed"], originals[row["form"]], copy)
            try:
                return reached.by(row["form"], copy, opened) - seen
            finally:
                shutil.rmtree(copy)

        found = [(row, read(row)) for row in kept]
        known = set().union(*(new for _, new in found))
        until = time.monotonic() + 60 * args.minutes
        while time.monotonic() < until:
            parent = found[rng.integers(len(found))][0] if found and rng.integers(3) == 0 else None
            form = parent["form"] if parent else FORMATS[rng.integers(len(FORMATS))]
            apply(parent["changed"] if parent else {}, originals[form], copy)
            mutate(rng, copy)
            row = {"form": form, "changed": changes(originals[form], copy)}
            shutil.rmtree(copy)
            tried += 1
            try:
                new = read(row)
            except AssertionError as problem:
                print(problem, json.dumps(row), sep="\n")
                raise
            if new - known:
                known |= new
                found.append((row, new))
                print(f"{tried} tried, {len(found)} of use, {len(known)} reached", flush=True)
    chosen = fewest(found)
    CORPUS.write_text("[\n" + ",\n".join(map(json.dumps, chosen)) + "\n]\n")
    print(f"{tried} tried, {len(chosen)} kept, which reach {len(known)}")


if __name__ == "__main__":
    main()
