# SPDX-License-Identifier: Apache-2.0
"""The accuracy table of docs/method.md: what each method, rule and option is worth in KL divergence.

    python -m benchmarks.accuracy                          # the shipped model, plain and with planted outliers
    python -m benchmarks.accuracy --second DIR             # and a second one, trained there in minutes if need be
    python -m benchmarks.accuracy --only awq gptq          # these rows anew, the others from the file
    python -m benchmarks.accuracy --model DIR --calib calib.txt --text held_out.txt

Writes benchmarks/results/accuracy.json and prints the table as Markdown.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import tempfile
from typing import Any

import jax

from awq_jax import stdlib_text
from awq_jax._spec import GPTQSpec, QuantSpec, Recipe, RefineSpec, SearchSpec, SmoothSpec, rule
from awq_jax.demo import MODEL, plant_checkpoint
from awq_jax.pipeline import quantize_checkpoint
from awq_jax.run import evaluate_checkpoint
from awq_jax_convert.hf import HFCheckpoint
from benchmarks.second_model import make_second_model

RESULTS = pathlib.Path(__file__).with_name("results") / "accuracy.json"


def recipes() -> dict[str, Recipe]:
    """Every row of the table; `QuantSpec` is set by the column."""
    only = lambda *names: SearchSpec(rules=tuple(rule(name) for name in names), clip_ratios=())
    block = lambda search: Recipe(search=dataclasses.replace(search, objective="block"))
    both, salient = only("paper", "duo"), rule("paper", salient_fraction=0.01)
    return {
        "round to nearest": Recipe(method="minmax"),
        "awq without clipping": Recipe(search=both),
        "awq": Recipe(),
        "gptq": Recipe(method="gptq"),
        "awq+gptq without clipping": Recipe(method="awq+gptq", search=both),
        "awq+gptq": Recipe(method="awq+gptq"),
        "awq+gptq, propagated": Recipe(method="awq+gptq", propagate="quantized"),
        "awq+gptq, propagated, refined": Recipe(method="awq+gptq", propagate="quantized", refine=RefineSpec()),
        "awq+gptq, refined": Recipe(method="awq+gptq", refine=RefineSpec()),
        "awq, refined": Recipe(refine=RefineSpec()),
        "awq, propagated": Recipe(propagate="quantized"),
        "gptq, rows in order, no sweeps": Recipe(method="gptq", gptq=GPTQSpec(order=False, sweeps=0)),
        "awq+gptq, no sweeps": Recipe(method="awq+gptq", gptq=GPTQSpec(sweeps=0)),
        "awq+gptq, block objective": dataclasses.replace(block(SearchSpec()), method="awq+gptq"),
        "awq, block objective": block(SearchSpec()),
        "awq without clipping, block objective": block(both),
        "paper, top 1 % of channels": Recipe(search=SearchSpec(rules=(salient,), clip_ratios=())),
        "paper": Recipe(search=only("paper")),
        "duo": Recipe(search=only("duo")),
        "awq, Gram of all tokens": Recipe(search=SearchSpec(tokens_per_channel=None)),
        **w8a8_recipes(),
    }


def w8a8_recipes() -> dict[str, Recipe]:
    """Rows with int8 activations, which have a table of their own."""
    token, tensor = QuantSpec.w8a8(), QuantSpec.w8a8("tensor")
    half = SmoothSpec(alphas=(0.5,))
    return {
        "W8A8 nearest, by token": Recipe(method="minmax", quant=token),
        "W8A8 nearest, one static step": Recipe(method="minmax", quant=tensor),
        "W8A8 smoothquant, alpha 0.5, by token": Recipe(method="smoothquant", quant=token, smooth=half),
        "W8A8 smoothquant, searched, by token": Recipe(method="smoothquant", quant=token),
        "W8A8 smoothquant, searched, one static step": Recipe(method="smoothquant", quant=tensor),
    }


# The rows that every model gets; the finer ones ask their question of the plain model alone.
ON_EVERY = (
    "round to nearest",
    "awq without clipping",
    "awq",
    "gptq",
    "awq+gptq",
    "awq+gptq, propagated",
    "awq+gptq, propagated, refined",
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and the texts that it is calibrated and measured on."""

    src: pathlib.Path
    calib: pathlib.Path
    text: pathlib.Path


def subjects(work: pathlib.Path, a: argparse.Namespace) -> dict[str, Subject]:
    """The models by their names in the table, each plain and with planted outliers."""
    calib, text = a.calib or work / "calib.txt", a.text or work / "text.txt"
    if a.calib is None:
        calib.write_text(stdlib_text.documentation("calibration"), encoding="utf-8")
    if a.text is None:
        text.write_text(stdlib_text.documentation("heldout"), encoding="utf-8")
    found = {"plain": Subject(a.model, calib, text)}
    if a.second is not None:
        found["second"] = Subject(*make_second_model(a.second))
    for name, subject in list(found.items()):
        planted = work / f"{name} planted"
        plant_checkpoint(subject.src, planted)
        found["planted" if name == "plain" else f"{name} planted"] = dataclasses.replace(subject, src=planted)
    return found


def measure(subject: Subject, recipe: Recipe, bits: int) -> dict[str, Any]:
    """Quantize and evaluate once."""
    seq_len = min(512, HFCheckpoint.open(subject.src).config.max_position_embeddings)
    with tempfile.TemporaryDirectory() as home:
        out = pathlib.Path(home) / "out"
        if recipe.quant.activations == "float":
            recipe = dataclasses.replace(recipe, quant=QuantSpec(bits=bits))
        report = quantize_checkpoint(
            subject.src, out, recipe=recipe, calib=subject.calib, seq_len=seq_len, format="native"
        )
        found = evaluate_checkpoint(out, subject.text, base=subject.src)
    fell_back = sum(layer.fell_back for layer in report.layers)
    return {**dataclasses.asdict(found), "seconds": sum(report.seconds.values()), "fell_back": fell_back}


Cells = dict[str, dict[tuple[str, int], float]]


def _cells(rows: list[dict[str, Any]]) -> Cells:
    """KL by recipe, and by model and width, of weights alone."""
    cells: Cells = {}
    for row in (row for row in rows if row["recipe"] not in w8a8_recipes()):
        cells.setdefault(row["recipe"], {})[row["model"], row["bits"]] = row["kl"]
    return cells


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace("| --- ", "|---").replace("--- |", "---|")


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """A table for each model: one line per recipe; KL, and in brackets its ratio to round to nearest.

    Recipes that were measured on one model without its planted twin have a table after the others.
    """
    cells, tables, left = _cells(rows), [], []
    base = cells.get("round to nearest", {})
    ratio = lambda kl, c: f" ({kl / base[c]:.2f})" if c in base else ""
    shown = lambda found, c: f"{found[c]:.4f}{ratio(found[c], c)}" if c in found else "–"
    head = lambda columns: ["recipe", *(f"{model} INT{bits}" for model, bits in columns)]
    line = lambda name, columns: [name, *(shown(cells[name], c) for c in columns)]
    for models in (("plain", "planted"), ("second", "second planted")):
        columns = sorted({c for found in cells.values() for c in found if c[0] in models}, key=lambda c: (c[0], -c[1]))
        whole = [name for name, found in cells.items() if all(c in found for c in columns)]
        part = [name for name in cells if name not in whole and any(c in cells[name] for c in columns)]
        if whole and columns:
            tables.append(_table(head(columns), [line(name, columns) for name in whole]))
        kept = [c for c in columns if any(c in cells[name] for name in part)]
        if part:
            left.append(_table(head(kept), [line(name, kept) for name in part]))
    return "\n\n".join(tables + left)


def w8a8_table(rows: list[dict[str, Any]]) -> str:
    """Rows with int8 activations."""
    lines = [
        [
            row["model"],
            row["recipe"],
            f"{row['perplexity']:.2f}",
            f"{row['kl']:.4f}",
            f"{100 * row['top1']:.1f} %",
        ]
        for row in rows
        if row["recipe"] in w8a8_recipes()
    ]
    return _table(["model", "recipe", "perplexity", "KL to dense", "same top-1"], lines) if lines else ""


def below_nearest(rows: list[dict[str, Any]]) -> str:
    """By how much each recipe's KL lies below round to nearest's, in percent, on every model."""
    cells = _cells(rows)
    base = cells.get("round to nearest", {})
    columns = [(model, bits) for bits in (4, 3) for model in ("plain", "planted", "second", "second planted")]
    columns = [c for c in columns if c in base]
    lines = [
        [name, *(f"{100 * (cells[name][c] / base[c] - 1):+.0f}" if c in cells[name] else "" for c in columns)]
        for name in ON_EVERY[1:]
        if name in cells
    ]
    return _table(["recipe, % of KL", *(f"INT{bits} {model}" for model, bits in columns)], lines)


def main() -> None:
    """Run every recipe on every model and width."""
    p = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    p.add_argument("--model", type=pathlib.Path, default=MODEL)
    p.add_argument("--calib", type=pathlib.Path, help="default: the standard library's documentation")
    p.add_argument("--text", type=pathlib.Path, help="default: the held-out part of it")
    p.add_argument("--second", type=pathlib.Path, metavar="DIR", help="and the second model, trained there if need be")
    p.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    p.add_argument("--only", nargs="+", metavar="RECIPE", help="rows to measure; the others keep what --out has")
    p.add_argument("--on", nargs="+", metavar="MODEL", help="models to measure; the others keep what --out has")
    p.add_argument("--out", type=pathlib.Path, default=RESULTS)
    a = p.parse_args()
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    note = ""
    if (a.only or a.on) and a.out.is_file():
        record = json.loads(a.out.read_text(encoding="utf-8"))
        found = {(row["model"], row["bits"], row["recipe"]): row for row in record["rows"]}
        note = record.get("note", "")
    order = {name: place for place, name in enumerate(recipes())}
    a.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as home:
        models = subjects(pathlib.Path(home), a)
        for name, recipe in recipes().items():
            int8 = name in w8a8_recipes()
            for bits in (8,) if int8 else a.bits:
                for model, subject in models.items():
                    asked = (not a.only or name in a.only) and (not a.on or model in a.on)
                    if not asked or (model != "plain" and name not in ON_EVERY and not int8):
                        continue
                    row = {"model": model, "bits": bits, "recipe": name, **measure(subject, recipe, bits)}
                    found[model, bits, name] = row
                    print(json.dumps(row), flush=True)
                    rows = sorted(found.values(), key=lambda row: (order[row["recipe"]], row["model"], -row["bits"]))
                    versions = {"python": platform.python_version(), "jax": jax.__version__}
                    record = {"versions": versions, **({"note": note} if note else {}), "rows": rows}
                    a.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(to_markdown(rows), below_nearest(rows), w8a8_table(rows), sep="\n\n")


if __name__ == "__main__":
    main()
