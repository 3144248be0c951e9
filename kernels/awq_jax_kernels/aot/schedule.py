# SPDX-License-Identifier: Apache-2.0
"""Read libtpu's dumps: the schedule of each kernel and its static profile."""

import collections
import re
from pathlib import Path

__all__ = [
    "LATENCY_CYCLES",
    "count_bundles",
    "estimated_cycles",
    "kernel_names",
    "profile_cycles",
    "profile_waits",
    "scheduled_bundles",
]

LATENCY_CYCLES = 600
"""What libtpu takes for the latency of a copy from HBM."""
_PROFILE_BYTES = 982  # a cycle, the rate of copies in its static profile

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


def profile_waits(copied: int | float) -> float:
    """Cycles of a profile in which the core waits for a copy of so many bytes, of operands or of results.

    >>> profile_waits(982)
    601.0
    """
    return LATENCY_CYCLES + copied / _PROFILE_BYTES


def kernel_names(hlo: str) -> list[str]:
    """Operations of an optimized program that are Pallas kernels.

    >>> kernel_names('  ROOT %k.1 = bf16[8] custom-call(%x), custom_call_target="tpu_custom_call"')
    ['k.1']
    """
    return re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*custom_call_target="tpu_custom_call"', hlo, re.MULTILINE)


def estimated_cycles(hlo: str) -> int:
    """The sum of XLA's own estimates for the operations of the entry computation.

    >>> estimated_cycles('ENTRY %main {\\n  %a = f32[] add(), backend_config={"estimated_cycles":"7"}\\n}')
    7
    """
    entry = hlo[hlo.find("ENTRY ") :] if "ENTRY " in hlo else ""
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry)))


def scheduled_bundles(folder: Path) -> dict[str, list[int]]:
    """Instruction bundles of each operation, see `count_bundles`."""
    found = {}
    for file in folder.glob("*final_bundles.txt"):
        # <stamp>-<operation>-<pass number>-final_bundles.txt; the schedule-analysis twin holds no bundles.
        if match := re.match(r"[\d.]+-(.+?)-\d+-final_bundles\.txt$", file.name):
            found[match[1]] = count_bundles(file.read_text(errors="replace"))
    return found


def count_bundles(text: str) -> list[int]:
    """Bundles by loop depth: outside of loops, in a loop, in a loop within one, and so on.

    >>> count_bundles(" 0x1   :  { a }\\n 0x2   : > { b }\\n 0x3 LB: >> { c }\\n 0x4   : >> { d }\\n")
    [1, 1, 2]
    """
    depth = collections.Counter(match[1].count(">") for match in map(_BUNDLE.match, text.splitlines()) if match)
    return [depth[d] for d in range(max(depth, default=-1) + 1)]
