# SPDX-License-Identifier: Apache-2.0
"""What a quantization did, weight by weight: nothing is left out and nothing falls back without being named."""

import csv
import dataclasses
import io
import json
from collections import Counter
from typing import Any, Literal

__all__ = ["GroupReport", "LayerReport", "LinearReport", "Method", "Report", "method_of"]

CSV_HEAD = (
    "layer",
    "linears",
    "bits",
    "rule",
    "exponent",
    "loss_scaled",
    "loss_written",
    "loss_nearest",
    "layer_error",
    "layer_error_nearest",
    "fell_back",
)

Method = Literal["awq", "gptq", "awq+gptq", "smoothquant", "rtn", "float"]

_WORDS: dict[Method, str] = {
    "awq": "with searched scales",
    "awq+gptq": "with searched scales and error feedback",
    "gptq": "with error feedback",
    "smoothquant": "with smoothed scales",
    "rtn": "rounded to nearest",
    "float": "left in floating point",
}


def method_of(*, scaled: bool, fed_back: bool) -> Method:
    """What a quantized weight got: a searched scale other than identity, error feedback, both or neither.

    >>> method_of(scaled=True, fed_back=False)
    'awq'
    """
    if fed_back:
        return "awq+gptq" if scaled else "gptq"
    return "awq" if scaled else "rtn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearReport:
    """One weight.

    Attributes:
      path: for example ``layers/0/attn/q``.
      method: what was written: "awq" (a searched scale), "gptq" (codes chosen by error feedback), "awq+gptq" (both),
        "smoothquant" (a searched scale for int8 activations too), "rtn" (round to nearest) or "float" (not quantized).
      reason: why it is less than the recipe asked for; empty if it is not.
      bits: width of the codes, 16 or 32 for float.
      group_size: rows per scale, 0 for float.
      activations: what multiplies it, as in `QuantSpec`: "float", or int8 by "token" or by "tensor".
      starved: experts that too few calibration tokens reached; they share the scale of their input with the others, and
        their last linear is rounded to nearest.
    """

    path: str
    method: Method
    reason: str = ""
    bits: int = 4
    group_size: int = 128
    activations: str = "float"
    starved: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupReport:
    """One group of linears that share a scale.

    Attributes:
      sinks: paths of the linears.
      producer: path of what absorbed the scale, or None.
      rule: name of the winning rule; where each expert has its own scale, of how many of them.
      power: its exponent on the activation statistic; the mean over experts.
      loss: objective of the winner, summed over experts; None if not finite.
      rtn_loss: objective of identity.
      losses: objective of every candidate, in the order of ``SearchSpec.candidates``; null where not finite.
      written_loss: the linears' own output error after clipping and rounding, comparable with ``loss`` under the Gram
        objective; None if not finite.
      channels: which channels the next three describe: of long inputs the one with the largest activation out of each
        bin of neighbours.
      activation: mean |x| of these channels on the calibration text.
      weight: mean |w| of these rows over the outputs.
      scale: what these rows were multiplied by.
    """

    sinks: tuple[str, ...]
    producer: str | None
    rule: str
    power: float
    loss: float | None
    rtn_loss: float | None
    losses: tuple[float | None, ...]
    written_loss: float | None = None
    channels: tuple[int, ...] = ()
    activation: tuple[float | None, ...] = ()
    weight: tuple[float | None, ...] = ()
    scale: tuple[float | None, ...] = ()

    @property
    def gain(self) -> float | None:
        """``loss / rtn_loss``; None where that says nothing."""
        return self.loss / self.rtn_loss if self.loss is not None and self.rtn_loss else None

    def written_gain(self, objective: str) -> float | None:
        """``written_loss / rtn_loss``; None where that says nothing, as where the objective has another unit."""
        if objective != "gram" or self.written_loss is None or not self.rtn_loss:
            return None
        return self.written_loss / self.rtn_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer.

    Attributes:
      index: of the layer.
      error: squared error of the layer's output, relative to the output's own square, as written; None if not finite.
      rtn_error: the same for round to nearest.
      fell_back: the search did not help this layer's output and round to nearest was written.
    """

    index: int
    error: float | None
    rtn_error: float | None
    fell_back: bool
    groups: tuple[GroupReport, ...]
    linears: tuple[LinearReport, ...]

    @property
    def gain(self) -> float | None:
        """``error / rtn_error``; None where that says nothing."""
        return self.error / self.rtn_error if self.error is not None and self.rtn_error else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A whole quantization.

    Attributes:
      layers: one entry per layer.
      outside: weights outside the layers, and why they stay as they are.
      recipe: the recipe as plain data.
      calibration: where the text came from and how much of it was used.
      seconds: wall time by phase.
      peak_memory_bytes: of the process, as the operating system counts it.
      peak_device_bytes: of the accelerator that held most, as its allocator counts it; 0 on a CPU.
      bytes_before: of the source's tensors.
      bytes_after: of the written tensors.
      warnings: what the user should know.
      inputs: digests of what decided the result: weights, calibration, recipe, versions, devices.
      resumed_layers: layers that an earlier, killed run had finished.
      budget: what `awq_jax.budget` chose, as plain data; None where the recipe says all widths.
    """

    layers: tuple[LayerReport, ...]
    outside: tuple[LinearReport, ...]
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    seconds: dict[str, float]
    peak_memory_bytes: int
    bytes_before: int
    bytes_after: int
    warnings: tuple[str, ...] = ()
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    resumed_layers: int = 0
    peak_device_bytes: int = 0
    budget: dict[str, Any] | None = None

    @property
    def starved(self) -> tuple[str, ...]:
        """A sentence for each weight whose experts saw too few tokens."""
        weights = [linear for layer in self.layers for linear in layer.linears if linear.starved]
        return tuple(f"{w.path}: experts {', '.join(map(str, w.starved))} saw too few tokens" for w in weights)

    @property
    def coverage(self) -> Counter[str]:
        """How many weights got each method."""
        listed = [linear for layer in self.layers for linear in layer.linears] + list(self.outside)
        return Counter(linear.method for linear in listed)

    @property
    def covered(self) -> str:
        """`coverage` in words."""
        found = self.coverage
        return ", ".join(f"{found[method]} {words}" for method, words in _WORDS.items() if found[method])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**dataclasses.asdict(self), "coverage": dict(self.coverage)}

    def to_json(self) -> str:
        """The report as JSON text; never contains NaN or Infinity."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def to_csv(self) -> str:
        """One row for each group of each layer, for a spreadsheet; what is not known or not finite is left empty."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(CSV_HEAD)
        for layer in self.layers:
            bits = {linear.path: linear.bits for linear in layer.linears}
            of_layer = (layer.error, layer.rtn_error, int(layer.fell_back))
            for group in layer.groups:
                names, widths = " ".join(group.sinks), " ".join(str(bits[path]) for path in group.sinks)
                losses = (group.loss, group.written_loss, group.rtn_loss)
                table.writerow((layer.index, names, widths, group.rule, group.power, *losses, *of_layer))
        return text.getvalue()
