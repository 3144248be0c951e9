# SPDX-License-Identifier: Apache-2.0
"""What every client is held to: its own forward on quantized parameters is its own forward on what they stand for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax import QuantSpec, Recipe, adapt
from awq_jax.adapt.kernel import is_kernel

RECIPE = Recipe(quant=QuantSpec(group_size=32))


def dense(params: Any) -> Any:
    """Quantized kernels as the dense ones that they stand for."""
    return jax.tree.map(lambda leaf: leaf.dense() if is_kernel(leaf) else leaf, params, is_leaf=is_kernel)


def distance(a: Any, b: Any) -> float:
    """Largest difference over the largest value of b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def quantized(apply: Callable[..., Any], params: Any, *args: Any, recipe: Recipe = RECIPE, **how: Any) -> Any:
    """(table, quantized params, coverage) of the verbs in a row."""
    table = adapt.propose(apply, params, *args)
    bound = lambda p, batch: apply(p, *batch)
    stats = adapt.observe(bound, params, [args], table)
    return table, *adapt.quantize(params, stats, table, recipe, **how)


def check_client(apply: Callable[..., Any], params: Any, *args: Any, recipe: Recipe = RECIPE) -> tuple[Any, Any]:
    """Quantize a client's model, compare, and see that no weight of a product is missing from the report."""
    table, qparams, coverage = quantized(apply, params, *args, recipe=recipe)
    got = jax.jit(adapt.serve(apply))(qparams, *args)
    wanted = apply(dense(qparams), *args)
    # Sums in float32 along a few dozen products, in another order.
    assert distance(got, wanted) < 2e-5
    assert {linear.path for linear in coverage.linears} == {*table.weights, *table.left}
    assert all(linear.method == "awq" or linear.reason for linear in coverage.linears)
    assert jnp.isfinite(got).all()
    return table, coverage


def rules(table: Any) -> dict[str, set[str]]:
    """{producer: sinks} of a table's groups."""
    return {group.producer: set(group.sinks) for group in table.groups if group.producer}
