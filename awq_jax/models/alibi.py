# SPDX-License-Identifier: Apache-2.0
"""Attention with linear biases: a penalty that grows with distance, at a slope for each head."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["alibi", "slopes"]


def slopes(heads: int) -> np.ndarray:
    """The slope of each head, float32: ``2**(-8 i / n)`` for i = 1 … n where n is a power of two.

    For other counts the slopes of the next smaller power of two come first, then every second one of the next larger
    (Press et al. 2022, "Train short, test long").

    >>> slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    n = 2 ** math.floor(math.log2(heads))
    own = 2.0 ** (-8.0 * np.arange(1, n + 1) / n)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - n), 2) / n)
    return np.concatenate([own, between]).astype(np.float32)


def alibi(heads: int, held: Int[Array, "b 1 s"]) -> Float[Array, "b h 1 s"]:
    """What is added to the scores of keys at positions ``held``.

    Slope times the key's position: less slope times the query's it is the distance, and a softmax does not see what all
    keys of a query share.
    """
    return jnp.asarray(slopes(heads))[:, None, None] * held[:, None].astype(jnp.float32)
