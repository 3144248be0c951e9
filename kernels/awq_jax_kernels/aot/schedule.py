# SPDX-License-Identifier: Apache-2.0
"""Read libtpu's dumps: the schedule of each kernel and its static profile."""

import collections
import re
from pathlib import Path

__all__ = ["loop_bundles", "profile_cycles", "scheduled_bundles"]

_PROFILE = re.compile(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)')
_BUNDLE = re.compile(r"\s*(?:0x)?[0-9a-f]+ +(?:[A-Z]{2})?: ([> ]*)\{")


def profile_cycles(folder: Path) -> dict[str, int]:
    """Cycles of each operation of the optimized program, by name.

    libtpu plays the scheduled instructions of one core: grid steps, loops of known length and ``pl.when`` on a grid
    index count exactly, stalls of the matrix unit and waits for DMA are included. Its DMA is faster than HBM, so the
    figure is the core's side of the story.
    """
    files = folder.glob("*static_llo_profile.textproto")
    found = [match for file in files for match in _PROFILE.findall(file.read_text(errors="replace"))]
    return {name: int(cycles) for name, cycles in found}


def scheduled_bundles(folder: Path) -> dict[str, int]:
    """Instruction bundles in the grid loop of each kernel, by the name of its operation."""
    found = {}
    for file in folder.glob("*final_bundles.txt"):
        # <stamp>-<operation>-<pass number>-final_bundles.txt; the schedule-analysis twin holds no bundles.
        match = re.match(r"[\d.]+-(.+?)-\d+-final_bundles\.txt$", file.name)
        if match and (count := loop_bundles(file.read_text(errors="replace"))):
            found[match[1]] = count
    return found


def loop_bundles(text: str) -> int:
    """Bundles inside a loop, each counted once; all of them where there is no loop.

    >>> loop_bundles(" 0x1   :  { a }\\n 0x2   : > { b }\\n 0x3   : > { c }\\n")
    2
    """
    depth = collections.Counter(match[1].count(">") for match in map(_BUNDLE.match, text.splitlines()) if match)
    return sum(depth.values()) - depth[0] or sum(depth.values())
