# SPDX-License-Identifier: Apache-2.0
"""How tokens are drawn: options of what generates text."""

import argparse
from typing import Any

__all__ = ["add_sampling", "sampling_of"]


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    add = parser.add_argument
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)")
    add("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens; wants a temperature")
    add("--top-p", type=float, metavar="P", help="sample from the smallest set of probability P; wants a temperature")
    add("--seed", type=int, default=0, metavar="S", help="of sampling (%(default)s)")


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for.

    Raises:
      ValueError: a choice among tokens where the likeliest is taken.
    """
    chosen = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    for option, value in (("--top-k", args.top_k), ("--top-p", args.top_p)):
        if value is not None and args.temperature == 0:
            raise ValueError(f"{option} {value} says nothing at temperature 0, which is greedy. Give --temperature 1.")
    return chosen
