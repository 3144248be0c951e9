# SPDX-License-Identifier: Apache-2.0
"""A layer's parameter tree as named arrays and a description, and back, bit for bit."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax._tree import leaves, nested
from awq_jax.report import GroupReport, LayerReport, LinearReport

__all__ = ["from_tensors", "report_of", "to_tensors"]

_PARTS = ("packed", "scale", "zero", "input_scale")


def to_tensors(tree: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by name, and what JSON must keep beside them.

    Args:
      tree: nested dict; leaves are arrays or `QTensor`.
    """
    tensors: dict[str, np.ndarray] = {}
    described: dict[str, Any] = {}
    for path, leaf in leaves(tree):
        parts = {part: getattr(leaf, part) for part in _PARTS} if isinstance(leaf, QTensor) else {"": leaf}
        arrays = {part: np.asarray(array) for part, array in parts.items() if array is not None}
        tensors |= {f"{path}:{part}": array for part, array in arrays.items()}
        described[path] = {"dtypes": {part: str(array.dtype) for part, array in arrays.items()}}
        if isinstance(leaf, QTensor):
            described[path] |= {"bits": leaf.bits, "activations": leaf.activations}
    return tensors, described


def from_tensors(tensors: Mapping[str, np.ndarray], described: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `to_tensors`, with numpy leaves."""

    def leaf(path: str, row: Mapping[str, Any]) -> Any:
        arrays = {part: tensors[f"{path}:{part}"].view(dtype) for part, dtype in row["dtypes"].items()}
        static = {"bits": row["bits"], "activations": row["activations"]} if "bits" in row else None
        return QTensor(**arrays, **static) if static else arrays[""]

    return nested((path, leaf(path, row)) for path, row in described.items())


def _tuples(node: Any) -> Any:
    """Lists, which JSON makes of tuples, as tuples again."""
    return tuple(map(_tuples, node)) if isinstance(node, list) else node


def report_of(row: Mapping[str, Any]) -> LayerReport:
    """A `LayerReport` from its plain data after a way through JSON."""
    plain = {key: _tuples(value) for key, value in row.items()}
    groups = tuple(GroupReport(**{key: _tuples(value) for key, value in group.items()}) for group in row["groups"])
    linears = tuple(LinearReport(**{key: _tuples(value) for key, value in linear.items()}) for linear in row["linears"])
    return LayerReport(**{**plain, "groups": groups, "linears": linears})
