# SPDX-License-Identifier: Apache-2.0
"""The shapes that speed is stated for."""

__all__ = ["SHAPES", "parse_shapes"]

SHAPES = ((4096, 14336), (14336, 4096), (8192, 8192), (4096, 6144))
"""``(k, n)`` of an 8 B model's gate or up, down and fused qkv projections, and a square of a 70 B model."""


def parse_shapes(text: str | None) -> tuple[tuple[int, int], ...]:
    """``"4096x14336,8192x8192"`` as pairs; `SHAPES` for None.

    >>> parse_shapes("128x256")
    ((128, 256),)
    """
    if text is None:
        return SHAPES
    pairs = (part.split("x") for part in text.split(","))
    return tuple((int(k), int(n)) for k, n in pairs)
