# SPDX-License-Identifier: Apache-2.0
"""The README.md of a quantized checkpoint: how it was made and what was measured."""

from collections import Counter

from awq_jax._version import __version__
from awq_jax.report import LayerReport, Report

__all__ = ["model_card"]


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
    found = Counter((w.bits, w.group_size) for w in written).most_common()
    if not found:
        return "not quantized", "no weight has codes"
    title = " and ".join(f"INT{bits}" for bits in sorted({bits for (bits, _), _ in found}, reverse=True))
    group = lambda size: "whole columns" if size == -1 else f"groups of {size}"
    if len(found) == 1:
        ((bits, size), _), *_ = found
        return title, f"{bits}-bit {kind} weights in {group(size)}"
    listed = ", ".join(f"{count} of {bits} bits in {group(size)}" for (bits, size), count in found)
    return title, f"{kind} weights of mixed formats ({listed})"


def model_card(name: str, family: str, report: Report) -> str:
    """Markdown for the output directory.

    Args:
      name: of the source checkpoint.
      family: of the model.
      report: what was done.
    """
    title, weights = _widths(report)
    tags = ["awq", *(title.lower().split(" and ") if title.startswith("INT") else []), "awq-jax"]
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
