# SPDX-License-Identifier: Apache-2.0
"""The page of one quantization, from its report's plain data."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from awq_jax.pages.bits import bits_in_words, bits_tables
from awq_jax.pages.charts import Series, bars, curves, stems
from awq_jax.pages.frame import document, key, table, tiles

__all__ = ["quantization_page", "recipe_in_words"]

Data = Mapping[str, Any]
_FAR = 8.0  # times the median: channels that stand out, however many they are


def recipe_in_words(recipe: Data, budget: Data | None = None) -> str:
    """Format and method of a recipe's plain data, in one line; with a budget, what was chosen instead of a width."""
    quant = recipe["quant"]
    group = "whole columns" if quant["group_size"] == -1 else f"groups of {quant['group_size']}"
    kind = "symmetric" if quant["symmetric"] else "asymmetric"
    moved = ", on the quantized model's inputs" if recipe.get("propagate") == "quantized" else ""
    refine = recipe.get("refine")
    trained = f", refined in {refine['steps']} steps" if refine else ""
    width = f"INT{quant['bits']}" if budget is None else f"{budget['mean']:.4g} bits a weight"
    inputs = {"token": ", int8 activations by token", "tensor": ", int8 activations with a static step"}
    rounded = inputs.get(quant.get("activations", "float"), "")
    return f"{width}, {kind}, {group}{rounded}, method {recipe.get('method', 'awq')}{moved}{trained}"


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _shown(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _rules(recipe: Data) -> Sequence[Data]:
    """Whose candidates competed."""
    method = recipe.get("method", "awq")
    if method == "smoothquant":
        return [{"name": method, "powers": [(alpha, 1 - alpha) for alpha in recipe["smooth"]["alphas"]]}]
    return recipe["search"]["rules"] if "awq" in method else []


def _lines(group: Data, recipe: Data) -> list[tuple[str, list[float], list[float | None]]]:
    """Loss over round to nearest's by exponent, one line for each rule that competed."""
    losses, base = group["losses"], group["rtn_loss"]
    lines, start = [], 1  # identity comes first
    for rule in _rules(recipe) if len(losses) > 1 else ():
        if rule["name"] == "identity":
            continue
        powers = [pair[0] for pair in rule["powers"]]
        ys = [_ratio(loss, base) for loss in losses[start : start + len(powers)]]
        lines.append((rule["name"], powers, ys))
        start += len(powers)
    return lines


def _salient(group: Data) -> set[int]:
    """The largest one in a hundred of the channels shown, and whatever is far above the median."""
    values = [v or 0.0 for v in group["activation"]]
    ranked = sorted(range(len(values)), key=lambda i: -values[i])
    middle = values[ranked[len(ranked) // 2]] if ranked else 0.0
    return {*ranked[: math.ceil(len(ranked) / 100)], *(i for i in ranked if middle and values[i] > _FAR * middle)}


def _group(group: Data, recipe: Data) -> str:
    names = ", ".join(path.split("/", 2)[2] for path in group["sinks"])
    chosen = "identity" if group["rule"] == "identity" else f"{group['rule']} {group['power']:.2f}"
    found, written = (_ratio(group[name], group["rtn_loss"]) for name in ("loss", "written_loss"))
    same_unit = recipe["search"]["objective"] == "gram"
    chips = [chosen, f"scale {_shown(found)}"]
    if same_unit and written is not None:
        chips.append(f"written {_shown(written)}")
    body = "".join(f'<span class="chip">{escape(chip)}</span>' for chip in chips)
    lines = _lines(group, recipe)
    if lines and found is not None:
        best = (group["power"], found) if group["rule"] != "identity" else None
        body += curves(lines, best, label=f"{names}: loss by exponent")
    if group["channels"]:
        rows = zip(group["channels"], group["activation"], group["weight"], group["scale"], strict=True)
        titles = [f"channel {c}: mean |x| {x}, mean |w| {w}, scale {t}" for c, x, w, t in rows]
        body += stems(
            group["channels"],
            group["activation"],
            [group["scale"], group["weight"]],
            titles,
            salient=_salient(group),
            label=f"{names}: magnitudes by channel",
        )
    return f'<div class="card"><h3>{escape(names)}</h3>{body}</div>'


def _layers(report: Data) -> Iterator[str]:
    recipe = report["recipe"]
    rules = [rule["name"] for rule in _rules(recipe) if rule["name"] != "identity"]
    if rules:
        names = [(f"kl{i % 5}", f"rule {name}") for i, name in enumerate(rules)]
        yield key(names, "Curves: loss over round to nearest’s, by exponent")
    drawn = [("kst", "mean |x|"), ("k1", "of a salient channel"), ("kl1", "scale"), ("kl2", "mean |w|")]
    yield key(drawn, "Stems: each over its median, by channel")
    for layer in report["layers"]:
        opened = " open" if layer["index"] < 2 else ""
        gain = _ratio(layer["error"], layer["rtn_error"])
        note = "round to nearest was written" if layer["fell_back"] else f"output error {_shown(gain, 2)} of nearest"
        groups = "".join(_group(group, recipe) for group in layer["groups"])
        yield (
            f'<details{opened}><summary>Layer {layer["index"]} <span class="soft">· {note}</span></summary>'
            f'<div class="groups">{groups}</div></details>'
        )


def _errors(layers: Sequence[Data]) -> str:
    names = [str(layer["index"]) for layer in layers]
    series = [
        Series("round to nearest", [layer["rtn_error"] for layer in layers]),
        Series("as written", [layer["error"] for layer in layers]),
    ]
    keys = key([("k0", "round to nearest"), ("k1", "as written")])
    return f'<div class="card wide">{keys}{bars(names, series, label="output error by layer")}</div>'


def _reasons(report: Data) -> str:
    """Weights that have less than the recipe asked for, one row for each reason."""
    listed: dict[str, list[str]] = {}
    weights = [w for layer in report["layers"] for w in layer["linears"]] + list(report["outside"])
    for weight in weights:
        if weight["reason"]:
            listed.setdefault(weight["reason"], []).append(weight["path"])
    if not listed:
        return "<p>None: every weight has what the recipe asked for.</p>"
    rows = [(paths[0], f"{len(paths)}", reason) for reason, paths in listed.items()]
    return table(("the first such weight", "weights", "reason"), rows, words=True)


def _chosen(budget: Data | None) -> Iterator[str]:
    if budget is not None:
        yield f"<h2>Bits</h2><p>Chosen by group and layer: {escape(bits_in_words(budget))}.</p>"
        yield from bits_tables(budget)


def quantization_page(name: str, report: Data, *, measured: Sequence[tuple[str, str]] = ()) -> str:
    """HTML of one quantization.

    Args:
      name: of the model.
      report: `Report.to_dict()`.
      measured: more (value, what it is) tiles, for example perplexity.
    """
    layers, recipe, budget = report["layers"], report["recipe"], report.get("budget")
    before, after = report["bytes_before"], report["bytes_after"]
    ratios = [r for layer in layers if (r := _ratio(layer["error"], layer["rtn_error"])) is not None]
    mean = sum(ratios) / len(ratios) if ratios else None
    searched = [_ratio(layer["error"], layer["rtn_error"]) for layer in layers if not layer["fell_back"]]
    helped = sum(ratio is not None and ratio < 1.0 for ratio in searched)
    covered = ", ".join(f"{count} {method}" for method, count in sorted(report["coverage"].items()))
    calibration = report["calibration"]
    device = report.get("peak_device_bytes", 0)
    body = [
        tiles(
            [
                (f"{after / 1e6:.1f} MB", f"from {before / 1e6:.1f} MB, {before / max(after, 1):.2f} times smaller"),
                (_shown(mean, 2), "output error of a layer over round to nearest's, mean"),
                (f"{helped} of {len(layers)}", "layers where the method helped"),
                (f"{sum(report['seconds'].values()):.1f} s", "from reading to writing"),
                *measured,
            ]
        ),
        *(f'<p class="warn">{escape(warning)}</p>' for warning in report["warnings"]),
        "<h2>Output error by layer</h2><p>Squared error of what a layer adds to the stream, over the square of what it "
        "adds, on the calibration text.</p>",
        _errors(layers),
        *_chosen(budget),
        "<h2>Groups</h2><p>Linears that read one input share a scale. The curves show the loss of every exponent over "
        "that of round to nearest (dashed, 1), and the ring what was chosen; stems show the input's channels. “scale” "
        "is the loss of the chosen scale, “written” what is left after clipping and rounding.</p>",
        *_layers(report),
        "<h2>Weights with less than the recipe asked for</h2>",
        _reasons(report),
        "<h2>How it was made</h2>",
        table(
            (),
            [
                ("recipe", recipe_in_words(recipe, budget)),
                ("weights", covered),
                (
                    "calibration",
                    f"{calibration['source']}: {calibration['samples']} samples, {calibration['tokens']} tokens",
                ),
                ("text, sha256", str(calibration["sha256"])[:16]),
                ("peak memory", f"{report['peak_memory_bytes'] / 1e9:.2f} GB"),
                *((("peak memory of the device", f"{device / 1e9:.2f} GB"),) if device else ()),
                *((f"time, {phase}", f"{seconds:.1f} s") for phase, seconds in report["seconds"].items()),
            ],
            words=True,
        ),
    ]
    return document(name, escape(recipe_in_words(recipe, budget)), body)
