# SPDX-License-Identifier: Apache-2.0
"""Several methods on one model, with one calibration text and one held-out text: what each costs."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from awq_jax import stdlib_text
from awq_jax._publish import published, write_bytes, write_manifest
from awq_jax._spec import METHODS, WEIGHT_METHODS, QuantSpec, Recipe
from awq_jax.pages import comparison_page, quantization_page
from awq_jax.pages.comparison import HEAD, table_rows
from awq_jax.pipeline import quantize_checkpoint
from awq_jax.prepare import read_samples
from awq_jax.run import evaluate_checkpoint
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.hf_config import FamilyChoice
from awq_jax_convert.sink import refuse_overlap

__all__ = ["Compared", "compare_methods", "to_csv", "to_markdown"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """One recipe.

    Attributes:
      bits: width of a code; 16 for the dense model.
      activations: what multiplies the weights, as in `QuantSpec`.
      method: as in `Recipe.method`; "dense" for the model itself.
      kl: divergence from the dense model, nats a token.
      perplexity: on the held-out text.
      perplexity_stderr: its standard error; None where the text is a single window.
      top1: share of positions on which it agrees with the dense model.
      nbytes: of its tensors.
      seconds: of quantizing, compilation included.
      layers: output error of each layer on the calibration text, null where not finite.
    """

    bits: int
    method: str
    kl: float
    perplexity: float
    perplexity_stderr: float | None
    top1: float
    nbytes: int
    seconds: float
    activations: str = "float"
    layers: tuple[float | None, ...] = ()


def _recipes(methods: Sequence[str], bits: Sequence[int], base: Recipe) -> Iterator[Recipe]:
    if unknown := [m for m in methods if m not in METHODS]:
        raise ValueError(f"unknown method {unknown[0]!r}; the methods are {', '.join(METHODS)}.")
    if not methods or not bits:
        raise ValueError("nothing to compare: give at least one method and one width.")
    for width in dict.fromkeys(bits):
        quant: QuantSpec = dataclasses.replace(base.quant, bits=width)
        for method in dict.fromkeys(methods):
            if method in WEIGHT_METHODS:
                propagate = "dense" if method == "minmax" else base.propagate
                yield dataclasses.replace(base, quant=quant, method=method, propagate=propagate)
    if "smoothquant" in methods:  # of one format alone; nearest rounding to it stands beside
        quant = QuantSpec.w8a8(scale_dtype=base.quant.scale_dtype)
        for method in ("minmax", "smoothquant"):
            yield dataclasses.replace(base, quant=quant, method=method, propagate="dense", refine=None)


def compare_methods(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    methods: Sequence[str] = WEIGHT_METHODS,
    bits: Sequence[int] = (4, 3),
    base: Recipe = Recipe(),  # noqa: B008 - frozen
    calib: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    samples: int = 128,
    seq_len: int = 512,
    tokens: int = 20_000,
    ctx: int = 192,
    family: FamilyChoice = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> tuple[Compared, ...]:
    """Quantize a model by every method and width, and measure each against it.

    Args:
      src: dense Hugging Face directory.
      out: directory to create: ``comparison.html``, the same as JSON, CSV and Markdown, and a page of every run. The
        quantized weights are not kept.
      methods: of `METHODS`; "smoothquant" is measured once, beside nearest rounding to its format, W8A8.
      bits: widths of the others.
      base: everything else.
      calib: calibration text; None takes the standard library's documentation.
      text: held-out text; None takes the part of it that calibration does not see.
      samples: calibration samples at most.
      seq_len: tokens of a sample at most.
      tokens: of the held-out text, at most.
      ctx: tokens of a window of it, which is seen on its own.
      family: a table, the name of one or its TOML file, instead of the one that serves config.json's architecture.
      overwrite: replace ``out`` if awq-jax wrote it.
      progress: called with what begins.

    Returns:
      The dense model, then every recipe in the order given.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: bad input, named.
    """
    recipes = list(_recipes(methods, bits, base))
    source = HFCheckpoint.open(Path(src), family)
    refuse_overlap(source.path, Path(out))
    chosen = read_samples(source, None if calib is None else Path(calib), samples=samples, seq_len=seq_len)
    with published(out, overwrite=overwrite) as work:
        held = Path(text) if text is not None else work / "heldout.txt"
        if text is None:
            held.write_text(stdlib_text.documentation("heldout"), encoding="utf-8")
        progress("measuring the dense model")
        found = evaluate_checkpoint(src, held, base=src, tokens=tokens, ctx=ctx, family=family)
        rows = [_row(16, "dense", found, source.nbytes, 0.0)]
        for done, recipe in enumerate(recipes, 1):
            quant = recipe.quant
            name = f"{'w8a8' if quant.activations != 'float' else f'int{quant.bits}'}-{recipe.method}"
            progress(f"{done}/{len(recipes)} {name}")
            target = work / name
            report = quantize_checkpoint(
                source.path, target, recipe=recipe, calib=chosen, format="native", family=family, resume="never"
            )
            found = evaluate_checkpoint(target, held, base=src, tokens=tokens, ctx=ctx, family=family)
            errors = tuple(layer.error for layer in report.layers)
            seconds = sum(report.seconds.values())
            row = _row(quant.bits, recipe.method, found, report.bytes_after, seconds, errors)
            rows.append(dataclasses.replace(row, activations=quant.activations))
            measured = [(f"{found.kl:.4f}", "KL to dense, nats a token"), (f"{found.perplexity:.2f}", "perplexity")]
            page = quantization_page(f"{source.path.name}, {name}", report.to_dict(), measured=measured)
            _remove(target)
            write_bytes(work / f"{name}.html", page.encode())
        words = f"{found.tokens} tokens of {held.name}"
        page = comparison_page(source.path.name, [dataclasses.asdict(row) for row in rows], words)
        write_bytes(work / "comparison.html", page.encode())
        record = [dataclasses.asdict(row) for row in rows]
        write_bytes(work / "comparison.json", json.dumps(record, indent=1, allow_nan=False).encode())
        write_bytes(work / "comparison.md", to_markdown(rows).encode())
        write_bytes(work / "comparison.csv", to_csv(rows).encode())
        write_manifest(work, format="comparison")
    return tuple(rows)


def _row(bits: int, method: str, found: Any, nbytes: int, seconds: float, layers: tuple[Any, ...] = ()) -> Compared:
    return Compared(
        bits=bits,
        method=method,
        kl=found.kl,
        perplexity=found.perplexity,
        perplexity_stderr=found.perplexity_stderr,
        top1=found.top1,
        nbytes=nbytes,
        seconds=seconds,
        layers=layers,
    )


def _remove(directory: Path) -> None:
    """A checkpoint that was measured: its files one by one, so that only what was written here can go."""
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    directory.rmdir()


def to_csv(rows: Sequence[Compared]) -> str:
    """The comparison for a spreadsheet, all digits; errors by layer in columns of their own."""
    depth = max((len(row.layers) for row in rows), default=0)
    names = [field.name for field in dataclasses.fields(Compared) if field.name != "layers"]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*names, *(f"error_of_layer_{i}" for i in range(depth))])
    for row in rows:
        table.writerow([*(getattr(row, name) for name in names), *row.layers])
    return text.getvalue()


def to_markdown(rows: Sequence[Compared]) -> str:
    """The comparison as a table."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in table_rows([dataclasses.asdict(row) for row in rows])]
    return "\n".join(lines) + "\n"
