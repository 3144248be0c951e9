# SPDX-License-Identifier: Apache-2.0
"""The option --family, which several commands have."""

import argparse

__all__ = ["add_family"]


def add_family(parser: argparse.ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument(
        "--family",
        metavar="NAME|FILE",
        help="read the model by this table: a name of `awq-jax families`, or a .toml file of your own "
        "(docs/families.md); default: by config.json's architecture",
    )
