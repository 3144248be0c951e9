# SPDX-License-Identifier: Apache-2.0
"""The page of a comparison: several recipes on one model, by what they cost it."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from awq_jax.evaluate import with_error
from awq_jax.pages.charts import Series, bars
from awq_jax.pages.frame import document, key, table, tiles

__all__ = ["HEAD", "comparison_page", "table_rows"]

HEAD = ("weights", "method", "KL to dense", "over nearest", "perplexity", "same top-1", "MB", "seconds")

Row = Mapping[str, Any]


def _form(row: Row) -> str:
    """A number format's name."""
    return f"INT{row['bits']}" if row.get("activations", "float") == "float" else "W8A8"


def table_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Cells of each row under `HEAD`.

    Args:
      rows: plain data of `awq_jax.compare.Compared`; KL is also shown over that of "minmax" with the same format.
    """
    nearest = {_form(row): row["kl"] for row in rows if row["method"] == "minmax"}

    def cells(row: Row) -> tuple[str, ...]:
        base, dense = nearest.get(_form(row)), row["method"] == "dense"
        return (
            "dense" if dense else _form(row),
            "" if dense else row["method"],
            "0" if dense else f"{row['kl']:.4f}",
            f"{row['kl'] / base:.2f}" if base else "–",
            with_error(row["perplexity"], row["perplexity_stderr"]),
            f"{100 * row['top1']:.1f} %",
            f"{row['nbytes'] / 1e6:.1f}",
            "" if dense else f"{row['seconds']:.1f}",
        )

    return [cells(row) for row in rows]


def comparison_page(name: str, rows: Sequence[Row], text: str) -> str:
    """HTML of a comparison.

    Args:
      name: of the model.
      rows: plain data of `awq_jax.compare.Compared`, the dense model first.
      text: what was measured on, in words.
    """
    dense, runs = rows[0], rows[1:]
    methods, forms = list(dict.fromkeys(row["method"] for row in runs)), list(dict.fromkeys(map(_form, runs)))
    found = {(_form(row), row["method"]): row for row in runs}
    colours = {method: i for i, method in enumerate(methods)}
    keys = key([(f"k{i}", method) for method, i in colours.items()])
    kl = bars(
        forms,
        [Series(m, [found[form, m]["kl"] if (form, m) in found else None for form in forms]) for m in methods],
        label="KL divergence from the dense model",
    )
    lowest = [min((row for row in runs if _form(row) == form), key=lambda row: row["kl"]) for form in forms]
    body = [
        tiles(
            [
                (f"{dense['perplexity']:.2f}", "perplexity of the dense model"),
                (f"{dense['nbytes'] / 1e6:.1f} MB", "its tensors"),
                *((f"{row['kl']:.4f}", f"lowest KL at {_form(row)}: {row['method']}") for row in lowest),
            ]
        ),
        f"<h2>KL divergence from the dense model</h2><p>Nats a token, on {escape(text)}. Lower is better.</p>",
        f'<div class="card wide">{keys}{kl}</div>',
        table(HEAD, table_rows(rows), best={rows.index(row) for row in lowest}),
        "<h2>Output error by layer</h2><p>Squared error of what a layer adds to the stream, over the square of what it "
        "adds, on the calibration text.</p>",
    ]
    for form in forms:
        series = [Series(m, found[form, m]["layers"]) for m in methods if (form, m) in found]
        names = [str(i) for i in range(len(series[0].values))]
        chart = bars(names, series, label=f"output error by layer, {form}")
        here = key([(f"k{i}", one.name) for i, one in enumerate(series)])  # not every format has every method
        body.append(f'<div class="card wide"><h3>{form}</h3>{here}{chart}</div>')
    return document(name, "Methods compared on one model, one calibration text and one held-out text.", body)
