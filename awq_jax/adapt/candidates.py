# SPDX-License-Identifier: Apache-2.0
"""Which parameters of a program are kernels that can be quantized, and which may absorb a scale."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from awq_jax.adapt.columns import Columns
from awq_jax.adapt.layout import Layout
from awq_jax.adapt.program import Apply, flatten, hold_static, run
from awq_jax.adapt.record import Recorder, Use

__all__ = ["Candidate", "candidates_of", "find_weights"]

_BIASES = ("bias", "b", "beta", "offset", "shift")
_ARITHMETIC = {"broadcast_in_dim", "add", "sub", "mul", "div", "max", "min", "neg", "exp", "log", "select_n", "square"}
_FEW = 4  # vectors beside a kernel that are tried as its bias, whatever their names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A parameter that may absorb a scale.

    Attributes:
      path: of the gain or kernel.
      biases: what may be added to its channels.
      lead: sizes of stacked layers and experts.
      channels: of one layer.
      columns: of the kernel, if these are not all.
    """

    path: str
    biases: tuple[str | None, ...]
    lead: tuple[int, ...]
    channels: int
    columns: Columns | None = None


def find_weights(apply: Apply, params: Any, *args: Any) -> tuple[dict[str, Layout], dict[str, str], dict[str, Use]]:
    """(layouts of kernels that can be quantized, reasons for the others, all uses); runs nothing.

    A kernel is a parameter in a product, or one of two axes and more that is read by anything but arithmetic. It can be
    quantized if products are all that reads it.
    """
    leaves, _ = flatten(params)
    recorder = Recorder(cuts=True)
    arrays, restore = hold_static(args)
    jax.eval_shape(lambda p, arrays: run(apply, p, restore(arrays), recorder), params, arrays)
    weights, left = {}, {}
    for path, use in recorder.uses.items():
        if not use.layouts:
            if len(leaves[path].shape) - use.stack > 1 and (read := [o for o in use.others if o not in _ARITHMETIC]):
                left[path] = f"read by {', '.join(dict.fromkeys(read))}"
        elif use.others:
            left[path] = f"also read by {', '.join(dict.fromkeys(use.others))}"
        elif len(set(use.layouts)) > 1:
            left[path] = "multiplied along different axes in different places"
        elif use.layouts[0].k % 2:
            left[path] = f"its contraction dimension {use.layouts[0].k} is odd, and two codes share a byte"
        else:
            weights[path] = use.layouts[0]
    return weights, left, recorder.uses


def candidates_of(leaves: Mapping[str, Any], weights: Mapping[str, Layout], uses: Mapping[str, Use]) -> list[Candidate]:
    """Gains, kernels and the parts that a program cuts kernels into, with what may be the bias beside each."""
    beside: dict[str, list[str]] = {}
    for path in leaves:
        beside.setdefault(path.rpartition("/")[0], []).append(path)
    # What may stand in front of a gain's channels: scanned layers, and experts that a product is mapped over.
    experts = {layout.sizes(layout.batch) for layout in weights.values()}
    axes_of = lambda stack, shape: {shape[:stack]} | {(*shape[:stack], *sizes) for sizes in experts}
    found = []
    for siblings in beside.values():
        plain = [p for p in siblings if p in uses and p not in weights and not uses[p].layouts]
        named = [p for p in plain if p.rpartition("/")[2].lower() in _BIASES]
        kernels = [p for p in siblings if p in weights]
        gains = [p for p in plain if p not in named and leaves[p].shape[:-1] in axes_of(uses[p].stack, leaves[p].shape)]
        for path in [*gains, *kernels]:
            layout = weights.get(path)
            lead = layout.lead if layout else leaves[path].shape[:-1]
            channels = layout.n if layout else leaves[path].shape[-1]
            size = math.prod(lead) * channels
            fits = lambda group, path=path, size=size: [p for p in group if p != path and leaves[p].size == size]
            biases = _biases(fits(named), fits(plain))
            many = _experts(layout, weights) if layout else 0
            splits = [((*lead, many), channels // many)] if many else []
            for columns in (None, *sorted(uses[path].cuts)):
                for axes, width in [*splits, (lead, channels)]:
                    if columns is None or width % columns.period == 0:
                        count = width if columns is None else len(columns.of(width))
                        found.append(Candidate(path=path, biases=biases, lead=axes, channels=count, columns=columns))
    return found


def _biases(named: list[str], plain: list[str]) -> tuple[str | None, ...]:
    """What to try as the bias: the one that is called so, else none and then the few vectors of its size."""
    if named:
        return (named[0],)
    return (None, *plain) if len(plain) < _FEW else (None,)


def _experts(layout: Layout, weights: Mapping[str, Layout]) -> int:
    """Size of a kernel's first output axis if it may be one of experts: some other kernel is mapped over as many."""
    size = layout.factors[layout.out[0]] if len(layout.out) > 1 else 0
    return size if any(size in other.sizes(other.batch) for other in weights.values()) else 0
