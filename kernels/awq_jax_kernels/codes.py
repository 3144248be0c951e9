# SPDX-License-Identifier: Apache-2.0
"""Codes by their width: how many lie in a byte, and which one is a symmetric weight's zero. No arrays."""

__all__ = ["middle", "per_byte"]


def per_byte(bits: int) -> int:
    """Codes in a byte of a packed weight: two of up to four bits, one of eight.

    >>> per_byte(3), per_byte(8)
    (2, 1)
    """
    return 2 if bits <= 4 else 1


def middle(bits: int) -> int:
    """The code that a packed weight keeps as zero, and that stands for zero where a weight is symmetric.

    >>> middle(3), middle(8)
    (8, 128)
    """
    return 8 if bits <= 4 else 128
