# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint in another format: AutoAWQ, compressed-tensors, native or dense.

Codes and zeros are carried over, never computed again; scales keep their dtype unless --dtype changes it. SRC may also
be in formats that are only read (docs/formats.md lists them). OUT appears only when it is complete.

  awq-jax convert Llama-3.2-1B-AWQ OUT --to compressed-tensors
  awq-jax convert Llama-3.2-1B-AWQ OUT --to dense --dtype bfloat16
"""

import argparse
import json
import pathlib
import sys

from awq_jax.cli.family_option import add_family


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("src", type=pathlib.Path, metavar="SRC", help="checkpoint directory, dense or quantized")
    add("out", type=pathlib.Path, metavar="OUT", help="directory to write; must not exist")
    add(
        "--to",
        required=True,
        choices=("autoawq", "compressed-tensors", "native", "dense"),
        help="the format to write",
    )
    add(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="of all but codes and zeros, scales too (each its own; float32 for weights that become dense)",
    )
    add_family(parser)
    add("--overwrite", action="store_true", help="replace OUT if awq-jax wrote it")
    add("--json", action="store_true", help="print what was done as JSON on stdout")
    add("--quiet", action="store_true", help="no progress and no summary")


def run(args: argparse.Namespace) -> int:
    """Convert."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from awq_jax_convert.convert import convert_checkpoint

    console = Console(stderr=True, quiet=args.quiet, soft_wrap=True, emoji=False)
    columns = (TextColumn("layer {task.completed}/{task.total}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=args.quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task("converting", total=None)
        done = convert_checkpoint(
            args.src,
            args.out,
            to=args.to,
            dtype=args.dtype,
            family=args.family,
            overwrite=args.overwrite,
            progress=lambda layers, total: bar.update(task, completed=layers, total=total),
        )
    moved = f"{done.quantized} weights with their codes" if done.quantized else f"{done.dequantized} weights to floats"
    size = f"{done.bytes_before / 1e6:.1f} MB -> {done.bytes_after / 1e6:.1f} MB"
    console.print(f"{escape(str(args.out))}: {done.source} -> {done.target}, {moved}, {size}, {done.seconds:.1f} s")
    for warning in done.warnings:
        console.print(f"[bold yellow]warning[/]: {escape(warning)}")
    if args.json:
        print(json.dumps({"src": str(args.src), "out": str(args.out), **done.to_dict()}))
    return 0
