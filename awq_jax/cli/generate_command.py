# SPDX-License-Identifier: Apache-2.0
"""Continue a prompt with a dense or quantized checkpoint.

Quantized weights stay packed: every matrix product reads INT4.

  awq-jax generate OUT --prompt "The easiest way to open a file is"
"""

import argparse
import json
import pathlib

from awq_jax.cli.family_option import add_family
from awq_jax.cli.sampling_options import add_sampling, sampling_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("dir", type=pathlib.Path, metavar="DIR", help="dense or quantized checkpoint")
    add("--prompt", required=True, metavar="TEXT", help="what to continue")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to add, at most (%(default)s)")
    add_sampling(parser)
    add_family(parser)
    add("--json", action="store_true", help="print prompt, text and token ids as JSON")


def run(args: argparse.Namespace) -> int:
    """Generate."""
    from awq_jax.run import generate_text

    result = generate_text(
        args.dir,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        family=args.family,
        **sampling_of(args),
    )
    print(json.dumps({"dir": str(args.dir), **result}) if args.json else result["prompt"] + result["text"])
    return 0
