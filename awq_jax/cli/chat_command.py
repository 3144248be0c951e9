# SPDX-License-Identifier: Apache-2.0
"""Talk to a checkpoint in the terminal.

With a chat template the conversation is kept; a model without one continues each line. An empty line or the end of
input leaves.

  awq-jax chat OUT
"""

import argparse
import pathlib

from awq_jax.cli.family_option import add_family
from awq_jax.cli.sampling_options import add_sampling, sampling_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("dir", type=pathlib.Path, metavar="DIR", help="dense or quantized checkpoint")
    add("--system", metavar="TEXT", help="what the model is told first; wants a chat template")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="tokens of an answer, at most (%(default)s)")
    add("--max-len", type=int, metavar="N", help="positions of the conversation (the model's, at most 4096)")
    add_sampling(parser)
    add_family(parser)
    add("--dense", action="store_true", help="dequantize weights once, when loading; faster on a CPU")
    add("--chat-template", type=pathlib.Path, metavar="FILE", help="instead of the checkpoint's")


def run(args: argparse.Namespace) -> int:
    """Read lines, print answers."""
    from awq_jax.serving.chat import Chat

    chat = Chat(
        args.dir,
        system=args.system,
        chat_template=args.chat_template,
        max_len=args.max_len,
        dense=args.dense,
        family=args.family,
        max_new_tokens=args.max_new_tokens,
        **sampling_of(args),
    )
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()  # the terminal's next line is its own
            return 0
        if not line.strip():
            return 0
        for piece in chat.say(line):
            print(piece, end="", flush=True)
        print()
