# SPDX-License-Identifier: Apache-2.0
"""The two ways to round, as a recipe names them."""

from jaxtyping import Array, Float

from awq_jax._qtensor import QTensor
from awq_jax._round import Ends, quantize
from awq_jax._spec import GPTQSpec, QuantSpec
from awq_jax.methods.gptq import gptq

__all__ = ["round_by"]


def round_by(
    weight: Float[Array, "k n"],
    gram: Float[Array, "..."],
    spec: QuantSpec,
    feedback: GPTQSpec | None,
    ratio: Float[Array, "groups n"] | Ends | None,
) -> QTensor:
    """To the nearest codes, or with error feedback where the recipe says how.

    Args:
      weight: ``[k, n]``, already scaled.
      gram: ``X'X`` of its input, whole or in blocks.
      spec: the number format.
      feedback: how GPTQ rounds; None rounds to nearest.
      ratio: clipping thresholds from `search_clip` or `settle_clip`; None does not clip.

    Raises:
      ValueError: as `quantize` and `gptq`.
    """
    return quantize(weight, spec, ratio) if feedback is None else gptq(weight, gram, spec, feedback, ratio)
