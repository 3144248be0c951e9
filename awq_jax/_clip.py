# SPDX-License-Identifier: Apache-2.0
"""Clip search: shrinking a group's range trades a few large errors for many small ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax._gram import PRECISION, diagonal_blocks
from awq_jax._round import fake_quantize
from awq_jax._spec import QuantSpec

__all__ = ["search_clip"]


def search_clip(
    gram: Float[Array, "..."],
    weight: Float[Array, "k n"],
    spec: QuantSpec,
    ratios: tuple[float, ...],
) -> Float[Array, "groups n"]:
    """The threshold of every (group, output) that minimises its own output error.

    For group rows ``i`` the error is ``d_i' G_ii d_i``, exact for that group alone: only the diagonal blocks of the
    Gram matrix enter. Ratio 1 always competes and wins ties.

    Args:
      gram: ``X'X`` of the weight's input, ``[k, k]``, or its diagonal blocks ``[k/b, b, b]`` with whole groups in each.
      weight: ``[k, n]``, already scaled.
      spec: the number format.
      ratios: thresholds to try, as fractions of the group's range.

    Returns:
      ratios, float32 ``[k/g, n]``.
    """
    k, n = weight.shape
    g = spec.rows_per_group(k)
    groups = k // g
    diagonal = diagonal_blocks(gram, g)
    tried = jnp.array((1.0, *(r for r in ratios if r != 1.0)), jnp.float32)

    def evaluate(r: Array) -> Array:
        error = weight - fake_quantize(weight, spec, jnp.full((groups, n), r))
        error = error.reshape(groups, g, n)
        return jnp.sum(error * jnp.matmul(diagonal, error, precision=PRECISION), axis=1)

    losses = jax.lax.map(evaluate, tried)  # [ratios, groups, n]
    losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    return tried[jnp.argmin(losses, axis=0)]
