# SPDX-License-Identifier: Apache-2.0
"""The proof: random powers of two, folded into every group, leave the outputs as they were."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.adapt.fold import fold_instances
from awq_jax.adapt.program import Apply, flatten, unflatten
from awq_jax.adapt.table import Table

__all__ = ["tolerance_of", "verify"]


def verify(apply: Apply, params: Any, args: Any, table: Table, groups: Any = None) -> float:
    """Fold random powers of two into every group and return how far the outputs move, relative to the largest.

    Powers of two round nothing, so a table that is right gives 0. Gains that stand for ``1 + gain`` would be rounded:
    they are set to powers of two less 1 before, and any values prove the same. Only float16, which ends at 2^-24, is
    allowed its rounding.

    Raises:
      ValueError: the function has no floating outputs, or none of them is finite.
    """
    leaves, tree = flatten(params)
    rng = np.random.default_rng(0)
    power = lambda shape: jnp.asarray(2.0 ** rng.integers(-1, 2, shape), jnp.float32)
    scales = []
    for instance in table.instances():
        if (path := instance.producer) is not None and (groups is None or instance.group in groups):
            layout, lead = table.weights.get(path), table.lead[path]
            size = math.prod(layout.lead) * layout.n if layout else leaves[path].size
            width = size // math.prod(lead)
            columns = instance.group.columns
            scales.append((instance, power((*lead, width if columns is None else len(columns.of(width))))))
            if offset := instance.group.offset:
                leaves[path] = (power(leaves[path].shape) - offset).astype(leaves[path].dtype)
    call = jax.jit(lambda leaves: apply(unflatten(tree, leaves), *args))
    before, after = call(leaves), call(fold_instances(leaves, table, scales))
    floats = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        if jnp.issubdtype(a.dtype, jnp.floating)
    ]
    if not any(np.isfinite(a).any() for a, _ in floats):
        raise ValueError(f"nothing can be proved of this function on this batch: {_why_nothing(floats, leaves)}.")
    return max(_moved(a, b) for a, b in floats)


def _moved(a: np.ndarray, b: np.ndarray) -> float:
    """The largest change over the largest value; infinity where a number is finite in one of them alone."""
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return math.inf
    a, b = a[finite], b[finite]
    return float(np.abs(a - b).max(initial=0.0) / max(np.abs(a).max(initial=0.0), 1e-30))


def _why_nothing(floats: list[Any], leaves: Mapping[str, Any]) -> str:
    """Why outputs can't be compared."""
    if not floats:
        return "it returns no floating outputs; let it return logits"
    if not any(a.size for a, _ in floats):
        return "its outputs are empty; give a few hundred tokens"
    floating = {p: leaf for p, leaf in leaves.items() if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)}
    odd = [path for path, leaf in floating.items() if not jnp.isfinite(leaf).all()]
    return "none of its outputs is finite" + (f", and {odd[0]!r} holds numbers that are not" if odd else "")


def tolerance_of(params: Any) -> float:
    """What may move though a table is right: sums that a compiler orders anew, and float16's smallest numbers."""
    half = any(jnp.result_type(leaf) == jnp.float16 for leaf in jax.tree.leaves(params))
    return 64 * float(jnp.finfo(jnp.float16 if half else jnp.float32).eps)
