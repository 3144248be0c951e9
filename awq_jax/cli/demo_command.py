# SPDX-License-Identifier: Apache-2.0
"""See it work: quantize the shipped model to INT4 and compare it with the original, in two minutes.

The model is a small Llama that this project trained on the Python standard library's text. It is quantized by rounding
to nearest and by AWQ, as it is and with planted outliers: a rewrite that keeps its function and gives it the few large
channels that big models have, which rounding to nearest handles badly and AWQ does not.

  awq-jax demo
"""

import argparse
import dataclasses
import json
import pathlib

from awq_jax.cli.steps import telling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("awq-jax-demo"),
        metavar="DIR",
        help="where checkpoints and the report go (%(default)s)",
    )
    add("--prompt", default="Return a list of", metavar="TEXT", help="what each model continues (%(default)r)")
    add("--quick", action="store_true", help="less text: half the time, and noisier numbers")
    add("--overwrite", action="store_true", help="replace DIR if awq-jax wrote it")
    add("--json", action="store_true", help="print the comparison as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from awq_jax.demo import run_demo
    from awq_jax.evaluate import with_error

    with telling("importing jax") as begin:
        rows = run_demo(args.out, quick=args.quick, prompt=args.prompt, overwrite=args.overwrite, progress=begin)
    if args.json:
        print(json.dumps({"out": str(args.out), "rows": [dataclasses.asdict(row) for row in rows]}))
        return 0
    console = Console(soft_wrap=True, emoji=False)
    table = Table(box=box.SIMPLE, padding=(0, 1))
    table.add_column("")
    for column in ("perplexity", "KL", "top-1", "MB", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in rows:
        if r.method == "dense":
            table.add_row(f"[bold]{r.model}[/]")
        table.add_row(
            f"  {r.method if r.method == 'dense' else f'INT4, {r.method}'}",
            with_error(r.perplexity, r.perplexity_stderr),
            f"{r.kl:.4f}",
            f"{100 * r.top1:.1f} %",
            f"{r.nbytes / 1e6:.1f}",
            f"{r.seconds:.1f}" if r.seconds else "",
            end_section=r.method == "AWQ",
        )
    console.print(table)
    for r in rows[:3]:
        console.print(
            f"[bold]{r.method}[/] {escape(args.prompt)}[italic]{escape(' '.join(['', *r.sample.split()]))}[/]"
        )
    console.print(f"checkpoints and report: {args.out}", markup=False)
    calib = args.out / "calibration.txt"
    again = f"awq-jax quantize {args.out / 'planted-dense'} tiny-int4 --method awq+gptq --calib {calib}"
    console.print(f"next: {again}", markup=False)
    return 0
