# SPDX-License-Identifier: Apache-2.0
"""What `awq-jax quantize --dry-run` prints."""

import itertools
import json
from collections.abc import Iterator

from awq_jax.dry_run import DryRun, LayerCost

__all__ = ["show"]


def _rows(layers: tuple[LayerCost, ...]) -> Iterator[tuple[str, LayerCost]]:
    """Equal layers that follow each other stand in one row."""
    cost = lambda layer: (layer.bytes_before, layer.bytes_after, layer.flops)
    for _, same in itertools.groupby(layers, cost):
        first, *rest = same
        yield (f"{first.index}-{rest[-1].index}" if rest else str(first.index)), first


def show(found: DryRun, about: dict[str, str], *, as_json: bool) -> None:
    """Print an estimate to stdout, for people or, with what it is about, as JSON."""
    if as_json:
        print(json.dumps({**about, **found.to_dict()}, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("layers", "MB each", "MB written", "TFLOP each"):
        table.add_column(column, justify="right")
    for name, layer in _rows(found.layers):
        table.add_row(
            name,
            f"{layer.bytes_before / 1e6:.1f}",
            f"{layer.bytes_after / 1e6:.1f}",
            f"{layer.flops / 1e12:.3f}",
        )
    console = Console(markup=False, emoji=False)
    console.print(table)
    if found.budget is not None:
        from awq_jax.pages.bits import bits_by_layer, bits_in_words

        head, rows = bits_by_layer(found.budget)
        widths = Table(*head, title="bits", title_justify="left")
        for row in rows:
            widths.add_row(*row)
        console.print(widths)
        console.print(f"bits: {bits_in_words(found.budget)}", highlight=False, soft_wrap=True)
    lines = {
        "tensors": f"{found.bytes_before / 1e9:.3f} GB -> {found.bytes_after / 1e9:.3f} GB",
        "disk needed": f"{found.disk_bytes / 1e9:.3f} GB, what is kept to resume from included",
        "work": f"{found.flops / 1e12:.2f} TFLOP on {found.tokens} tokens",
        "device memory": f"{found.device_bytes / 1e9:.2f} GB",
        "of it Gram matrices": f"{found.gram_bytes / 1e9:.2f} GB",
        "host memory": f"{found.host_bytes / 1e9:.2f} GB beside it",
    }
    for name, words in lines.items():
        console.print(f"{name}: {words}", highlight=False)
    for note in found.notes:
        console.print(note, highlight=False, soft_wrap=True)
