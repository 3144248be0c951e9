# SPDX-License-Identifier: Apache-2.0
"""The one table of shapes for every implementation of the INT4 product."""

from typing import NamedTuple

__all__ = ["ALIGNED", "LLAMA", "ODD", "Case"]


class Case(NamedTuple):
    """``[m, k] @ [k, n]`` with one scale for g rows of a column."""

    m: int
    k: int
    n: int
    g: int

    def __str__(self) -> str:
        return f"{self.m}x{self.k}x{self.n}g{self.g}"


ALIGNED = (  # what the kernels are for: k and n multiples of 128
    Case(1, 256, 128, 128),
    Case(16, 512, 256, 128),
    Case(7, 256, 256, 64),
    Case(8, 256, 128, 32),
    Case(5, 384, 384, 384),  # one group per column, and no power of two
    Case(33, 1024, 128, 128),
    Case(130, 512, 256, 128),  # two blocks of rows for most block sizes, the second nearly empty
)

ODD = (  # what they refuse, and XLA takes
    Case(3, 96, 40, 32),
    Case(2, 64, 10, 8),
    Case(4, 20, 6, 20),
    Case(9, 130, 128, 26),
)

LLAMA = (  # the shapes that performance is stated for, by (k, n): gate or up, down, square, a fused qkv
    (4096, 14336),
    (14336, 4096),
    (8192, 8192),
    (4096, 6144),
)
