# SPDX-License-Identifier: Apache-2.0
"""What rounding activations to int8 costs a group of linears, and the step of a static scale.

A group's linears read one input x, ``t`` scales the rows of their weights and divides x. With weights rounded to
``W^ = diag(1/t) Q(diag(t) W)`` and inputs to ``x^ = t * Q(x / t)`` the output error is ``x W - x^ W^ = x D + r W^``,
``D = W - W^`` and ``r = x - x^``. The Gram matrix has ``||X D||^2`` over all tokens; the rest depends on each token's
own rounding and is measured on a sample of them. (SmoothQuant, Xiao et al. 2022, scales by one exponent for all.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax_kernels.w8a8_matmul.rounding import TOP, fake_round

__all__ = ["Sample", "activation_loss", "input_step"]


class Sample(NamedTuple):
    """Inputs of a group's linears.

    Attributes:
      rows: one for each token; of those that do not count zeros, which round to themselves.
      tokens: how many count.
    """

    rows: Float[Array, "m k"]
    tokens: Float[Array, ""]


def input_step(abs_max: Float[Array, " k"]) -> Float[Array, ""]:
    """The step of a static scale, ``max|x| / 127``; 1 where nothing but zeros was seen.

    >>> float(input_step(jnp.array([1.0, 254.0])))
    2.0
    """
    peak = abs_max.max()
    return jnp.where(peak > 0, peak / TOP, 1.0)


def activation_loss(
    sample: Sample,
    dense: Sequence[Float[Array, "k _"]],
    rounded: Sequence[Float[Array, "k _"]],
    t: Float[Array, " k"],
    step: Float[Array, ""] | None,
) -> Float[Array, ""]:
    """What rounding inputs adds to the squared output error of one token: ``||X D + R W^||^2 - ||X D||^2``.

    Args:
      sample: inputs before they are divided by t.
      dense: weights that multiply int8 inputs.
      rounded: the same as written, rows divided by t again.
      t: what divides the inputs.
      step: of all tokens' ``x / t``; None is each token's own.
    """
    x, wide = sample.rows, jnp.concatenate(rounded, axis=1)
    before = jnp.matmul(x, jnp.concatenate(dense, axis=1) - wide, precision="highest")
    added = jnp.matmul(x - fake_round(x / t, step) * t, wide, precision="highest")
    return jnp.sum(added * (added + 2 * before)) / jnp.maximum(sample.tokens, 1.0)
