# SPDX-License-Identifier: Apache-2.0
"""The README.md of a quantized checkpoint: how it was made and what was measured."""

from collections import Counter

from awq_jax._version import __version__
from awq_jax.report import LayerReport, Report

__all__ = ["model_card"]


_INPUTS = {
    "float": "",
    "token": " that multiply int8 activations, rounded token by token",
    "tensor": " that multiply int8 activations, rounded by a static step",
}


def _row(layer: LayerReport) -> str:
    winners = ", ".join(f"{g.rule} {g.power:.2f}" if g.rule != "identity" else g.rule for g in layer.groups)
    rtn_error, error = ("not finite" if v is None else f"{v:.3e}" for v in (layer.rtn_error, layer.error))
    gain = "-" if layer.gain is None else f"{layer.gain:.2f}"
    note = "fell back to round to nearest" if layer.fell_back else ""
    return f"| {layer.index} | {winners} | {rtn_error} | {error} | {gain} | {note} |"


def _widths(report: Report) -> tuple[str, str]:
    """A title's and a sentence's words for the codes: overrides may have mixed them."""
    kind = "symmetric" if report.recipe["quant"]["symmetric"] else "asymmetric"
    written = [w for layer in report.layers for w in layer.linears if w.method != "float"]
    found = Counter((w.bits, w.group_size, w.activations) for w in written).most_common()
    if not found:
        return "not quantized", "no weight has codes"
    names = sorted({(bits, inputs != "float") for (bits, _, inputs), _ in found}, reverse=True)
    title = " and ".join("W8A8" if rounded else f"INT{bits}" for bits, rounded in names)
    group = lambda size: "whole columns" if size == -1 else f"groups of {size}"
    if len(found) == 1:
        ((bits, size, inputs), _), *_ = found
        return title, f"{bits}-bit {kind} weights in {group(size)}{_INPUTS[inputs]}"
    listed = ", ".join(f"{count} of {bits} bits in {group(size)}{_INPUTS[kind]}" for (bits, size, kind), count in found)
    return title, f"{kind} weights of mixed formats ({listed})"


def model_card(name: str, family: str, report: Report) -> str:
    """Markdown for the output directory.

    Args:
      name: of the source checkpoint.
      family: of the model.
      report: what was done.
    """
    title, weights = _widths(report)
    method = "smoothquant" if report.recipe["method"] == "smoothquant" else "awq"
    tags = [method, *(title.lower().split(" and ") if title[0] in "IW" else []), "awq-jax"]
    lines = [
        "---",
        f"tags: [{', '.join(tags)}]",
        "---",
        f"# {name}, {title}",
        "",
        f"Quantized with awq-jax {__version__} ({family} family): {weights}, "
        f"objective `{report.recipe['search']['objective']}`.",
        "",
        f"- size of the tensors: {report.bytes_before / 1e6:.1f} MB before, {report.bytes_after / 1e6:.1f} MB after",
        f"- calibration: {report.calibration['source']}, {report.calibration['samples']} samples, "
        f"{report.calibration['tokens']} tokens, sha256 `{report.calibration['sha256'][:16]}`",
        f"- weights: {report.covered}",
        *(f"- note: {warning}" for warning in report.warnings),
        "",
        "Squared output error of each layer on the calibration text, relative to what the layer adds:",
        "",
        "| layer | winning rule of each group | round to nearest | as written | ratio | |",
        "|---|---|---|---|---|---|",
        *map(_row, report.layers),
        "",
        "`awq_jax_report.json` holds every group's losses, `awq_jax_manifest.json` the recipe with its overrides.",
        "",
    ]
    return "\n".join(lines)
