# SPDX-License-Identifier: Apache-2.0
"""Find a kernel's main loop in a listing of nvdisasm, and count its machine instructions."""

import re
from collections import Counter

__all__ = ["count", "main_loop"]

_LABEL = re.compile(r"(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_MEMORY = ("LDS", "STS", "LDG", "STG", "LDL", "STL")


def main_loop(listing: str) -> list[tuple[str, str]]:
    """Opcodes and operands of the shortest loop that holds a matrix instruction; empty if no loop multiplies.

    >>> loop = main_loop('''
    ... .L_x_1:
    ...     /*0010*/                   LDS.128 R4, [R2] ;
    ...     /*0020*/                   HGMMA.64x16x16.F32.BF16 R8, R4, gdesc[UR4], R8 ;
    ...     /*0030*/              @!P0 BRA `(.L_x_1) ;
    ... ''')
    >>> count(loop)
    {'LDS.128': 1, 'HGMMA': 1, 'BRA': 1}
    """
    instructions: list[tuple[str, str]] = []
    starts: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line.strip()):
            starts[label[1]] = len(instructions)
        elif found := _INSTRUCTION.search(line):
            instructions.append((found[1], found[2].strip()))
            target = re.search(r"\((\.L_\w+)\)", found[2])
            if found[1] == "BRA" and target and target[1] in starts:
                loops.append((starts[target[1]], len(instructions)))
    bodies = [instructions[a:b] for a, b in loops]
    return min((body for body in bodies if any("MMA" in op for op, _ in body)), key=len, default=[])


def count(instructions: list[tuple[str, str]]) -> dict[str, int]:
    """Instructions by opcode; memory operations carry their width in bits, ``LDS.32`` where the listing names none."""
    return dict(Counter(_key(opcode) for opcode, _ in instructions))


def _key(opcode: str) -> str:
    root, *flags = opcode.split(".")
    if root not in _MEMORY:
        return root
    width = next((flag.lstrip("US") for flag in flags if re.fullmatch(r"[US]?(8|16|64|128)", flag)), "32")
    return f"{root}.{width}"
