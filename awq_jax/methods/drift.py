# SPDX-License-Identifier: Apache-2.0
"""Weights for inputs that have drifted: what earlier layers' rounding did to a linear's input, the linear makes up for.

A linear was made for inputs X; after quantizing what comes before it receives Z. The weight that maps Z to ``X W`` best
is ``W + (Z'Z)^-1 Z'(X - Z) W``: two sums over tokens, and no activation is kept.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from awq_jax._pytree import pytree
from awq_jax._stats import ActStats, merge, observe

__all__ = ["Drift", "merge_drift", "observe_drift", "realign"]

_DAMPING = 0.01  # of the mean of the Gram matrix's diagonal, as in GPTQ


@pytree
class Drift:
    """Inputs of a linear in the quantized model, beside those of the float model; sums, so merging is addition.

    Attributes:
      stats: of the drifted inputs Z.
      cross: ``Z'(X - Z)``, float32 ``[k, k]``.
    """

    stats: Any
    cross: Any


def observe_drift(x: Float[Array, "*t k"], z: Float[Array, "*t k"], mask: Bool[Array, "*t"]) -> Drift:
    """Statistics of one batch.

    Args:
      x: inputs in the float model.
      z: the same tokens' inputs in the quantized one.
      mask: tokens to count.
    """
    keep = mask[..., None]
    gap = jnp.where(keep, x - z, 0.0).reshape(-1, x.shape[-1])
    wide = jnp.where(keep, z, 0.0).reshape(-1, x.shape[-1])
    return Drift(stats=observe(z, mask), cross=jnp.matmul(wide.T, gap, precision="highest"))


def merge_drift(a: Drift, b: Drift) -> Drift:
    """Statistics of the union of two batches."""
    stats: ActStats = merge(a.stats, b.stats)
    return Drift(stats=stats, cross=a.cross + b.cross)


def realign(weight: Float[Array, "k n"], drift: Drift) -> Float[Array, "k n"]:
    """The weight that makes the float model's outputs of the drifted inputs, in the least-squares sense.

    Damping holds it near the weight in directions that the calibration set hardly has. Where the statistics are not
    finite it is the weight itself.
    """
    gram = drift.stats.gram
    diagonal = jnp.diagonal(gram)
    extra = jnp.where(diagonal > 0, _DAMPING * jnp.mean(diagonal), 1.0)
    factor = jax.scipy.linalg.cho_factor(gram + jnp.diag(extra))
    wanted = jnp.matmul(drift.cross, weight, precision="highest")
    moved = weight + jax.scipy.linalg.cho_solve(factor, wanted)
    return jnp.where(jnp.isfinite(moved).all(), moved, weight)
