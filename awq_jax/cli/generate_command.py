# SPDX-License-Identifier: Apache-2.0
"""Continue a prompt with a dense or quantized checkpoint.

Quantized weights stay packed: every matrix product reads INT4.

  awq-jax generate OUT --prompt "The easiest way to open a file is"
"""

import argparse
import json
import pathlib

from awq_jax.cli.family_option import add_family


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("dir", type=pathlib.Path, metavar="DIR", help="dense or quantized checkpoint")
    add("--prompt", required=True, metavar="TEXT", help="what to continue")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to add, at most (%(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)")
    add("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="sample from the smallest set of probability P")
    add("--seed", type=int, default=0, metavar="S", help="of sampling (%(default)s)")
    add_family(parser)
    add("--json", action="store_true", help="print prompt, text and token ids as JSON")


def run(args: argparse.Namespace) -> int:
    """Generate."""
    from awq_jax.run import generate_text

    result = generate_text(
        args.dir,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        family=args.family,
    )
    print(json.dumps({"dir": str(args.dir), **result}) if args.json else result["prompt"] + result["text"])
    return 0
