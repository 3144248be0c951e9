# SPDX-License-Identifier: Apache-2.0
"""The definition, in plain jax; what runs where there is no kernel."""

import jax
from jax import numpy as jnp
from jaxtyping import Array

__all__ = ["ACTIVATIONS", "gated"]

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def gated(product: Array, *, activation: str) -> Array:
    """See `awq_jax_kernels.gated.gated`."""
    gate, up = jnp.split(product.astype(jnp.float32), 2, axis=-1)
    return (ACTIVATIONS[activation](gate) * up).astype(product.dtype)
