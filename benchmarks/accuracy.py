# SPDX-License-Identifier: Apache-2.0
"""The accuracy table of docs/method.md: what each method, rule and option is worth in KL divergence.

    python benchmarks/accuracy.py                          # the shipped model, plain and with planted outliers
    python benchmarks/accuracy.py --only awq gptq          # these rows anew, the others from the file
    python benchmarks/accuracy.py --model DIR --calib calib.txt --text held_out.txt

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
from awq_jax._spec import GPTQSpec, QuantSpec, Recipe, RefineSpec, SearchSpec, rule
from awq_jax.demo import MODEL, plant_checkpoint
from awq_jax.pipeline import quantize_checkpoint
from awq_jax.run import evaluate_checkpoint

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
    }


# Planted outliers ask one question, whether a search finds them; the finer ones are asked on the plain model.
ON_PLANTED = ("round to nearest", "awq", "gptq", "awq+gptq")


def measure(src: pathlib.Path, recipe: Recipe, bits: int, calib: pathlib.Path, text: pathlib.Path) -> dict[str, Any]:
    """Quantize and evaluate once."""
    with tempfile.TemporaryDirectory() as home:
        out = pathlib.Path(home) / "out"
        recipe = dataclasses.replace(recipe, quant=QuantSpec(bits=bits))
        report = quantize_checkpoint(src, out, recipe=recipe, calib=calib, format="native")
        found = evaluate_checkpoint(out, text, base=src)
    fell_back = sum(layer.fell_back for layer in report.layers)
    return {**dataclasses.asdict(found), "seconds": sum(report.seconds.values()), "fell_back": fell_back}


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """One line per recipe; KL, and in brackets its ratio to round to nearest."""
    columns = list(dict.fromkeys((r["model"], r["bits"]) for r in rows))
    by_name: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["recipe"], {})[row["model"], row["bits"]] = row
    base = by_name.get("round to nearest", {})
    lines = [
        "| recipe | " + " | ".join(f"{model} INT{bits}" for model, bits in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, found in by_name.items():
        ratio = {c: f" ({row['kl'] / base[c]['kl']:.2f})" if c in base else "" for c, row in found.items()}
        cells = (f"{found[c]['kl']:.4f}{ratio[c]}" if c in found else "" for c in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run every search on every model and width."""
    p = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    p.add_argument("--model", type=pathlib.Path, default=MODEL)
    p.add_argument("--calib", type=pathlib.Path, help="default: the standard library's documentation")
    p.add_argument("--text", type=pathlib.Path, help="default: the held-out part of it")
    p.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    p.add_argument("--only", nargs="+", metavar="RECIPE", help="rows to measure; the others keep what --out has")
    p.add_argument("--out", type=pathlib.Path, default=RESULTS)
    a = p.parse_args()
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    if a.only and a.out.is_file():
        kept = json.loads(a.out.read_text(encoding="utf-8"))["rows"]
        found = {(row["model"], row["bits"], row["recipe"]): row for row in kept}
    with tempfile.TemporaryDirectory() as home:
        work = pathlib.Path(home)
        calib, text = a.calib or work / "calib.txt", a.text or work / "text.txt"
        if a.calib is None:
            calib.write_text(stdlib_text.documentation("calibration"), encoding="utf-8")
        if a.text is None:
            text.write_text(stdlib_text.documentation("heldout"), encoding="utf-8")
        plant_checkpoint(a.model, work / "planted")
        for name, recipe in recipes().items():
            for bits in a.bits:
                for model, src in (("plain", a.model), ("planted", work / "planted")):
                    if (model == "planted" and name not in ON_PLANTED) or (a.only and name not in a.only):
                        continue
                    row = {"model": model, "bits": bits, "recipe": name, **measure(src, recipe, bits, calib, text)}
                    found[model, bits, name] = row
                    print(json.dumps(row), flush=True)
    order = {name: place for place, name in enumerate(recipes())}
    rows = sorted(found.values(), key=lambda row: (order[row["recipe"]], row["model"], -row["bits"]))
    record = {"versions": {"python": platform.python_version(), "jax": jax.__version__}, "rows": rows}
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
