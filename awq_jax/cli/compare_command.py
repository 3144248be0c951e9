# SPDX-License-Identifier: Apache-2.0
"""Quantize a model by several methods and compare what they cost it: one page and one table.

SRC is quantized by every method and width with one calibration text, and measured against itself on one held-out text.
OUT gets comparison.html, which needs nothing but a browser, the same as JSON, CSV and Markdown, and a page of each run.

  awq-jax compare Llama-3.2-1B compared --calib my_text.txt --text held_out.txt
  awq-jax compare SRC OUT --methods minmax,awq+gptq --bits 4,3
  awq-jax compare SRC OUT --methods smoothquant
"""

import argparse
import dataclasses
import json
import pathlib

from awq_jax.cli.family_option import add_family
from awq_jax.cli.steps import telling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("src", type=pathlib.Path, metavar="SRC", help="dense Hugging Face directory")
    add("out", type=pathlib.Path, metavar="OUT", help="directory to write; must not exist, or see --overwrite")
    add(
        "--methods",
        default="minmax,awq,gptq,awq+gptq",
        metavar="M,…",
        help="methods (%(default)s); smoothquant is W8A8 alone",
    )
    add("--bits", default="4,3", metavar="B,…", help="widths (%(default)s)")
    add("--group-size", type=int, default=128, metavar="G", help="rows that share a scale (%(default)s)")
    add("--symmetric", action="store_true", help="no zero points")
    add("--calib", type=pathlib.Path, metavar="FILE", help="to calibrate on: text or .jsonl (Python's documentation)")
    add("--text", type=pathlib.Path, metavar="FILE", help="to measure on: text or .jsonl (the other part of it)")
    add("--samples", type=int, default=128, metavar="N", help="calibration samples (%(default)s)")
    add("--seq-len", type=int, default=512, metavar="T", help="tokens of a sample (%(default)s)")
    add("--tokens", type=int, default=20_000, metavar="N", help="of the held-out text (%(default)s)")
    add("--ctx", type=int, default=192, metavar="N", help="tokens of a window of it (%(default)s)")
    add_family(parser)
    add("--overwrite", action="store_true", help="replace OUT if awq-jax wrote it")
    add("--json", action="store_true", help="print the comparison as JSON on stdout")
    add("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Compare."""
    from awq_jax._spec import QuantSpec, Recipe
    from awq_jax.compare import compare_methods, to_markdown

    widths = [item.strip() for item in args.bits.split(",")]
    if not all(width.isdecimal() for width in widths):
        raise ValueError(f"--bits {args.bits!r}: expected whole numbers with commas between them, for example 4,3.")
    with telling("reading", quiet=args.quiet) as begin:
        rows = compare_methods(
            args.src,
            args.out,
            methods=[item.strip() for item in args.methods.split(",")],
            bits=[int(width) for width in widths],
            base=Recipe(quant=QuantSpec(group_size=args.group_size, symmetric=args.symmetric)),
            calib=args.calib,
            text=args.text,
            samples=args.samples,
            seq_len=args.seq_len,
            tokens=args.tokens,
            ctx=args.ctx,
            family=args.family,
            overwrite=args.overwrite,
            progress=begin,
        )
    if args.json:
        plain = [dataclasses.asdict(row) for row in rows]
        print(json.dumps({"src": str(args.src), "out": str(args.out), "rows": plain}, allow_nan=False))
    else:
        print(to_markdown(rows), end="")
        print(f"page: {args.out / 'comparison.html'}")
    return 0
