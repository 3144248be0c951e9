# SPDX-License-Identifier: Apache-2.0
"""Planted outliers: give a small model the salient channels that large ones grow, without changing its function.

Large language models have a few activation channels whose magnitude dwarfs the rest, and that is what AWQ protects.
A model of a few million parameters has none. Folding a scale backwards plants them exactly: a norm's channel times 32,
the rows that read it over 32.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from awq_jax._fold import fold_scale
from awq_jax._plan import LayerPlan
from awq_jax._tree import get
from awq_jax.families._table import Norm

__all__ = ["plant_outliers"]


def plant_outliers(
    params: Mapping[str, Any], plan: LayerPlan, *, channels: int = 8, factor: float = 32.0, seed: int = 0
) -> dict[str, Any]:
    """Multiply a few channels of every norm of a layer by ``factor`` and divide the rows that read them.

    Args:
      params: nested dict of one layer, dense.
      plan: the layer's groups; those whose producer is a norm are changed.
      channels: how many per norm.
      factor: how far they stick out; a power of two keeps float weights exact.
      seed: of the choice of channels.

    Returns:
      A tree that computes the same function.
    """
    rng = np.random.default_rng(seed)
    out = dict(params)
    for group in plan.groups:
        producer = group.group.producer
        if isinstance(producer, Norm):
            gain = get(out, producer.path)["scale"]
            t = np.ones(gain.shape, np.float32)
            t[rng.choice(gain.shape[0], size=channels, replace=False)] = 1 / factor
            out = fold_scale(out, group.group, jnp.asarray(t))
    return out
