# SPDX-License-Identifier: Apache-2.0
"""Both directions of the article's formula on one layer: output error of each rule's best candidate over rounding's.

    python benchmarks/directions.py

`article-literal` divides the weight by max|x|^alpha / max|w|, as the article writes it; `article` multiplies it.
"""

import argparse
import pathlib
import tempfile

from awq_jax import stdlib_text
from awq_jax._spec import QuantSpec, Recipe, SearchSpec, rule
from awq_jax.demo import MODEL, plant_checkpoint
from awq_jax.pipeline import quantize_checkpoint
from awq_jax.report import GroupReport

RULES = ("article-literal", "article", "paper", "duo")
FORMATS = {
    "symmetric, one group a column": QuantSpec(symmetric=True, group_size=-1),
    "symmetric, groups of 128": QuantSpec(symmetric=True),
    "asymmetric, groups of 128": QuantSpec(),
}


def best_of_each(group: GroupReport, search: SearchSpec) -> dict[str, float]:
    """The lowest loss of each rule, relative to identity's."""
    named = [name for name, _, _ in ((r.name, p, q) for r, p, q in search.candidates)]
    losses = [(name, loss) for name, loss in zip(named, group.losses, strict=True) if loss is not None]
    assert group.rtn_loss
    return {name: min(loss for other, loss in losses if other == name) / group.rtn_loss for name in RULES}


def main() -> None:
    """Print one row for each format and group of one layer."""
    p = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    p.add_argument("--layer", type=int, default=2)
    a = p.parse_args()
    search = SearchSpec(rules=tuple(rule(name) for name in RULES), clip_ratios=())
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder)
        (home / "calib.txt").write_text(stdlib_text.documentation("calibration"), encoding="utf-8")
        plant_checkpoint(MODEL, home / "planted")
        print("| model | format | linears | " + " | ".join(RULES) + " |")
        print("|---" * (3 + len(RULES)) + "|")
        for model, src in (("plain", MODEL), ("planted", home / "planted")):
            for index, (name, spec) in enumerate(FORMATS.items()):
                recipe = Recipe(quant=spec, search=search)
                out = home / f"{model}{index}"
                report = quantize_checkpoint(src, out, recipe=recipe, calib=home / "calib.txt", format="native")
                for group in report.layers[a.layer].groups:
                    linears = ", ".join(path.split("/", 2)[2] for path in group.sinks)
                    cells = (f"{value:.2f}" for value in best_of_each(group, search).values())
                    print(f"| {model} | {name} | {linears} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
