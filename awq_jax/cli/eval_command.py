# SPDX-License-Identifier: Apache-2.0
"""Measure a checkpoint: perplexity on a text and, with --base, KL divergence from another checkpoint.

The recipe is fixed so that numbers compare: the first --tokens tokens of the text in windows of --ctx that do not
overlap, each seen on its own; every position but a window's first is predicted.

  awq-jax eval OUT --text held_out.txt --base SRC
"""

import argparse
import dataclasses
import json
import pathlib
import sys

from awq_jax.cli.family_option import add_family


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("dir", type=pathlib.Path, metavar="DIR", help="dense or quantized checkpoint")
    add("--text", type=pathlib.Path, required=True, metavar="FILE", help='text, or .jsonl with "text" or "input_ids"')
    add("--base", type=pathlib.Path, metavar="DENSE", help="checkpoint to compare with, usually the unquantized one")
    add("--tokens", type=int, default=20_000, metavar="N", help="tokens of the text to use (%(default)s)")
    add("--ctx", type=int, default=192, metavar="N", help="tokens of a window (%(default)s)")
    add("--batch", type=int, default=8, metavar="N", help="windows at a time (%(default)s)")
    add("--json", action="store_true", help="print the result as JSON on stdout")
    add("--quiet", action="store_true", help="no progress")
    add_family(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate."""
    from rich.console import Console
    from rich.progress import Progress

    from awq_jax.evaluate import with_error
    from awq_jax.run import evaluate_checkpoint

    console = Console(stderr=True, quiet=args.quiet)
    with Progress(console=console, transient=True, disable=args.quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task("windows", total=None)
        result = evaluate_checkpoint(
            args.dir,
            args.text,
            base=args.base,
            tokens=args.tokens,
            ctx=args.ctx,
            batch=args.batch,
            family=args.family,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if args.json:
        about = {"dir": str(args.dir), "text": str(args.text), "base": str(args.base) if args.base else None}
        measured = {**dataclasses.asdict(result), "ctx": args.ctx}
        print(json.dumps({**about, **measured}, allow_nan=False))
        return 0
    print(f"perplexity  {with_error(result.perplexity, result.perplexity_stderr, places=4)}")
    if result.kl is not None and result.top1 is not None:
        print(f"KL to base  {result.kl:.6f} nats a token")
        print(f"same top-1  {100 * result.top1:.2f} %")
    print(f"tokens      {result.tokens}")
    return 0
