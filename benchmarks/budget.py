# SPDX-License-Identifier: Apache-2.0
"""What a budget is worth: KL divergence of chosen widths at several budgets, beside one width for all.

    python benchmarks/budget.py                                   # the shipped model, method awq
    python benchmarks/budget.py --method awq+gptq --budgets 3.5 4.1875
    python benchmarks/budget.py --add --budgets 5 --uniform       # one more row, with what was measured for the others

Sensitivities are measured once; every budget is quantized from them and measured on held-out text. Writes
benchmarks/results/budget.json and prints the table as Markdown.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import tempfile
import time
from typing import Any

import jax

from awq_jax import stdlib_text
from awq_jax._spec import QuantSpec, Recipe
from awq_jax.budget import Question, mean_bits
from awq_jax.demo import MODEL
from awq_jax.hosts import Hosts
from awq_jax.pipeline import quantize_checkpoint
from awq_jax.prepare import chunks_of, open_planned, read_samples
from awq_jax.run import evaluate_checkpoint
from awq_jax.sensitivity import divergences
from awq_jax.sharding import Layout

RESULTS = pathlib.Path(__file__).with_name("results") / "budget.json"


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """One line for each quantization, in the order of their size."""
    lines = ["| widths | bits a weight | KL | layers and groups with 2 / 3 / 4 / 8 bits |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["mean"]):
        shares = " / ".join(str(row["units"].get(str(bits), 0)) for bits in (2, 3, 4, 8))
        lines.append(f"| {row['name']} | {row['mean']:.4f} | {row['kl']:.4f} | {shares} |")
    return "\n".join(lines)


def measured(checkpoint: Any, asked: Question, samples: Any) -> tuple[Any, float]:
    """What each group costs the model at each width, and the seconds that it took to find out."""
    begun = time.perf_counter()
    versions = [asked.version(bits) for bits in asked.widths]
    kl = divergences(
        checkpoint, versions, asked.units, chunks_of(samples, 8), layout=Layout(), hosts=Hosts(), measuring=print
    )
    return kl, time.perf_counter() - begun


def main() -> None:
    """Measure once, then quantize for every budget and for every uniform width."""
    p = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    p.add_argument("--model", type=pathlib.Path, default=MODEL)
    p.add_argument("--method", default="awq")
    p.add_argument("--budgets", type=float, nargs="+", default=[3.1875, 4.1875, 3.5, 4.0, 4.25, 5.0])
    p.add_argument("--uniform", type=int, nargs="*", default=[3, 4])
    p.add_argument("--add", action="store_true", help="keep the rows of --out, and take the sensitivities from there")
    p.add_argument("--out", type=pathlib.Path, default=RESULTS)
    a = p.parse_args()
    old = json.loads(a.out.read_text(encoding="utf-8")) if a.add else {"rows": []}
    recipe, rows = Recipe(method=a.method), old["rows"]
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        work = pathlib.Path(home)
        calib, text = work / "calib.txt", work / "text.txt"
        calib.write_text(stdlib_text.documentation("calibration"), encoding="utf-8")
        text.write_text(stdlib_text.documentation("heldout"), encoding="utf-8")
        checkpoint, plans, _ = open_planned(a.model, recipe, "native")
        samples = read_samples(checkpoint, calib)
        asked = Question.of(checkpoint, plans, recipe, "native", max(a.budgets))
        if a.add:
            kl, seconds = old["divergences"], old["seconds_measuring"]
            assert old["widths"] == list(asked.widths) and {row["method"] for row in rows} == {a.method}
        else:
            kl, seconds = measured(checkpoint, asked, samples)

        def add(name: str, recipe: Recipe, mean: float, **more: Any) -> None:
            out = work / name.replace(" ", "-")
            report = quantize_checkpoint(a.model, out, recipe=recipe, calib=samples, format="native", resume="never")
            found = evaluate_checkpoint(out, text, base=a.model)
            fell_back = sum(layer.fell_back for layer in report.layers)
            row = {"name": name, "mean": mean, **dataclasses.asdict(found), "fell_back": fell_back, **more}
            rows[:] = [*(other for other in rows if other["name"] != name), {"method": a.method, **row}]
            print(json.dumps(row), flush=True)
            record = {
                "versions": {"python": platform.python_version(), "jax": jax.__version__},
                "widths": asked.widths,
                "seconds_measuring": seconds,
                "divergences": kl,
                "rows": rows,
            }
            a.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

        groups = sum(map(len, asked.units))
        for bits in a.uniform:
            mean = mean_bits(checkpoint, asked.version(bits))
            uniform = dataclasses.replace(recipe, quant=QuantSpec(bits=bits))
            add(f"uniform {bits}", uniform, mean, units={str(bits): groups})
        for budget in a.budgets:
            chosen = dataclasses.replace(asked, budget=budget).answer(kl)
            units = {str(bits): sum(c.bits == bits for c in chosen.choices) for bits in chosen.widths}
            bits = [[*choice.sinks, choice.bits] for choice in chosen.choices]
            more = {"units": units, "predicted": chosen.predicted, "bits": bits}
            add(f"budget {budget:g}", chosen.recorded(recipe), chosen.mean, **more)
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
