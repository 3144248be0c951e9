# SPDX-License-Identifier: Apache-2.0
"""Count the machine instructions of a kernel's main loop in a listing of nvdisasm."""

import re
from collections import Counter

__all__ = ["main_loop"]

_LABEL = re.compile(r"(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_MEMORY = ("LDS", "STS", "LDG", "STG", "LDL", "STL")


def main_loop(listing: str) -> dict[str, int]:
    """Instructions by opcode between the labels of the shortest loop that holds a matrix instruction.

    Memory operations carry their width in bits, ``LDS.32`` where the listing names none. Empty if no loop multiplies.

    >>> main_loop('''
    ... .L_x_1:
    ...     /*0010*/                   LDS.128 R4, [R2] ;
    ...     /*0020*/                   HGMMA.64x16x16.F32.BF16 R8, R4, gdesc[UR4], R8 ;
    ...     /*0030*/              @!P0 BRA `(.L_x_1) ;
    ... ''')
    {'LDS.128': 1, 'HGMMA': 1, 'BRA': 1}
    """
    opcodes: list[str] = []
    starts: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line.strip()):
            starts[label[1]] = len(opcodes)
        elif found := _INSTRUCTION.search(line):
            opcodes.append(_key(found[1]))
            target = re.search(r"\((\.L_\w+)\)", found[2])
            if opcodes[-1] == "BRA" and target and target[1] in starts:
                loops.append((starts[target[1]], len(opcodes)))
    multiplying = [opcodes[a:b] for a, b in loops if any(op.endswith("MMA") for op in opcodes[a:b])]
    return dict(Counter(min(multiplying, key=len, default=[])))


def _key(opcode: str) -> str:
    root, *flags = opcode.split(".")
    if root not in _MEMORY:
        return root
    width = next((flag.lstrip("US") for flag in flags if re.fullmatch(r"[US]?(8|16|64|128)", flag)), "32")
    return f"{root}.{width}"
