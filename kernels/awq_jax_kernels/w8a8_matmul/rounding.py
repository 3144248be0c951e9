# SPDX-License-Identifier: Apache-2.0
"""Activations as int8 codes and the step that a code stands for: each token's, or one that was measured before."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

__all__ = ["TOP", "fake_round", "round_rows"]

TOP = 127
"""The code of the largest magnitude, as in Xiao et al. 2022; -128 is reached by clipping alone.

Half of the range, 127.5, would put the largest magnitude of every token at a tie, for the last bit to decide.
"""


def round_rows(
    x: Float[Array, "*b k"], step: Float[Array, ""] | None = None
) -> tuple[Int8[Array, "*b k"], Float[Array, "*b 1"]]:
    """``clip(round(x / s), -128, 127)`` and ``s``, by token ``s = max|x| / 127``.

    Args:
      x: ``[..., k]``; computed in float32.
      step: of all tokens; None is each token's own. Larger values than 127 steps are cut off.

    Returns:
      Codes, and a float32 step for each token: 1 for a token of zeros, NaN for one with a value that is no finite
      number, so that nothing made of it looks like one.

    >>> codes, step = round_rows(jnp.array([[254.0, 3.0]]))
    >>> codes.tolist(), step.tolist()
    ([[127, 2]], [[2.0]])
    """
    wide = x.astype(jnp.float32)
    if step is None:
        peak = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
        each = jnp.where(peak > 0, peak / TOP, 1.0)
    else:
        each = jnp.full((*x.shape[:-1], 1), step.astype(jnp.float32))
    # Asked for by itself: the maximum of a vector with a NaN is a number on some of XLA's backends.
    sound = jnp.isfinite(wide).all(-1, keepdims=True)
    codes = jnp.clip(jnp.round(jnp.where(sound, wide / each, 0.0)), -TOP - 1, TOP)
    return codes.astype(jnp.int8), jnp.where(sound, each, jnp.nan)


def fake_round(x: Float[Array, "*b k"], step: Float[Array, ""] | None = None) -> Float[Array, "*b k"]:
    """What the codes of `round_rows` stand for, float32: what searches evaluate."""
    codes, each = round_rows(x, step)
    return codes.astype(jnp.float32) * each
