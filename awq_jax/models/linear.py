# SPDX-License-Identifier: Apache-2.0
"""The one linear layer, whose kernel may be dense or quantized."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from awq_jax._qtensor import matmul

__all__ = ["Linear", "Tap"]

Tap = Callable[[str, Any], None]
"""Called while tracing with a linear's path and its input: an array, or `ExpertRows` for the experts of a mixture."""


class Linear(nnx.Module):
    """``x @ kernel + bias``; kernel ``[k, n]`` is an array or a `QTensor`."""

    def __init__(self, k: int, n: int, *, bias: bool, dtype: Any, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (k, n), dtype) * k**-0.5)
        self.bias = nnx.Param(jnp.zeros((n,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*b k"]) -> Float[Array, "*b n"]:
        """Outputs in the dtype of x."""
        return self.completed(matmul(x, self.kernel.get_value()))

    def completed(self, product: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
        """What is left to do behind the product: the bias."""
        return product if self.bias is None else product + self.bias.get_value().astype(product.dtype)
