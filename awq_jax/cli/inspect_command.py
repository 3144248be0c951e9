# SPDX-License-Identifier: Apache-2.0
"""Show what is in a checkpoint: every weight with its shape, format and size, layer by layer.

Reads headers alone; nothing is loaded.

  awq-jax inspect OUT
"""

import argparse
import json
import pathlib

from awq_jax.cli.family_option import add_family


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("dir", type=pathlib.Path, metavar="DIR", help="dense or quantized checkpoint")
    parser.add_argument("--all", action="store_true", help="every layer, also where all are alike")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    add_family(parser)


def run(args: argparse.Namespace) -> int:
    """Inspect."""
    from awq_jax_convert.describe import describe

    found = describe(args.dir, args.family)
    if args.json:
        print(json.dumps({"dir": str(args.dir), **found.to_dict()}))
        return 0

    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, markup=False, emoji=False)
    size = f"{found.nbytes / 1e6:.1f} MB"
    console.print(f"{args.dir}: {found.family}, {found.num_layers} layers, {size}, {found.format}")
    table = Table(box=box.SIMPLE, padding=(0, 1))
    for column in ("weight", "shape", "format", "bytes", "bits", "count"):
        text = column in ("weight", "format")
        table.add_column(column, justify="left" if text else "right", overflow="fold" if text else "ellipsis")
    for row in found.rows(collapse=not args.all):
        shape = "x".join(map(str, row.shape))
        table.add_row(
            row.path.removesuffix("/kernel"),
            shape,
            row.form,
            f"{row.nbytes:,}",
            f"{row.bits_per_weight:.2f}",
            str(row.count),
        )
    console.print(table)
    return 0
