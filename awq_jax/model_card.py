# SPDX-License-Identifier: Apache-2.0
"""The README.md of a quantized checkpoint: how it was made and what was measured."""

from awq_jax._version import __version__
from awq_jax.report import LayerReport, Report

__all__ = ["model_card"]


def _row(layer: LayerReport) -> str:
    winners = ", ".join(f"{g.rule} {g.power:.2f}" if g.rule != "identity" else g.rule for g in layer.groups)
    rtn_error, error = ("not finite" if v is None else f"{v:.3e}" for v in (layer.rtn_error, layer.error))
    gain = "-" if layer.gain is None else f"{layer.gain:.2f}"
    note = "fell back to round to nearest" if layer.fell_back else ""
    return f"| {layer.index} | {winners} | {rtn_error} | {error} | {gain} | {note} |"


def model_card(name: str, family: str, report: Report) -> str:
    """Markdown for the output directory.

    Args:
      name: of the source checkpoint.
      family: of the model.
      report: what was done.
    """
    quant = report.recipe["quant"]
    group = "whole columns" if quant["group_size"] == -1 else f"groups of {quant['group_size']}"
    kind = "symmetric" if quant["symmetric"] else "asymmetric"
    covered = ", ".join(f"{count} {method}" for method, count in sorted(report.coverage.items()))
    lines = [
        "---",
        "tags: [awq, int4, awq-jax]",
        "---",
        f"# {name}, INT{quant['bits']}",
        "",
        f"Quantized with awq-jax {__version__} ({family} family): {quant['bits']}-bit {kind} weights in {group}, "
        f"objective `{report.recipe['search']['objective']}`.",
        "",
        f"- size of the tensors: {report.bytes_before / 1e6:.1f} MB before, {report.bytes_after / 1e6:.1f} MB after",
        f"- calibration: {report.calibration['source']}, {report.calibration['samples']} samples, "
        f"{report.calibration['tokens']} tokens, sha256 `{report.calibration['sha256'][:16]}`",
        f"- weights: {covered}",
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
