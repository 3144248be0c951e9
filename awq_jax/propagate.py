# SPDX-License-Identifier: Apache-2.0
"""Two streams through one layer: the float model's, which says what is wanted, and the quantized model's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from awq_jax._plan import GroupPlan
from awq_jax._qtensor import dequantize_tree
from awq_jax.methods.drift import Drift, merge_drift, observe_drift
from awq_jax.models.config import DecoderConfig
from awq_jax.models.functional import block

__all__ = ["reobserver"]

Params = Any


def reobserver(
    config: DecoderConfig, hidden: Array, stream: Array, mask: Array
) -> Callable[[Params, Params, GroupPlan], Drift]:
    """What reaches a group's linears once the groups before it are quantized, beside the float model's inputs.

    Args:
      config: of the model.
      hidden: the layer's inputs in the float model, ``[chunks, b, t, d]``.
      stream: its inputs in the quantized model.
      mask: ``[chunks, b, t]``.

    Returns:
      ``(folded float parameters, parameters so far quantized, group) -> Drift``.
    """

    def of_group(folded: Params, done: Params, group: GroupPlan) -> Drift:
        name, done = group.group.sinks[0], dequantize_tree(done)

        def at_tap(params: Params, h: Array) -> Array:
            seen: dict[str, Array] = {}
            block(config, params, h, tap=lambda path, x: seen.update({path: x}) if path == name else None)
            return seen[name]

        def observe(chunk: tuple[Array, Array, Array]) -> Drift:
            h, s, keep = chunk
            return observe_drift(at_tap(folded, h), at_tap(done, s), keep)

        # Every token is taken: with 16 a channel, enough for the search, the solution fits their noise and KL rises.
        chunks = (hidden, stream, mask)
        shapes = jax.eval_shape(observe, jax.tree.map(lambda leaf: leaf[0], chunks))
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(lambda total, chunk: (merge_drift(total, observe(chunk)), None), zero, chunks)
        return total

    return of_group
