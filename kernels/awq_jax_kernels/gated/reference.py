# SPDX-License-Identifier: Apache-2.0
"""The definition, in plain jax; what runs where there is no kernel."""

import functools
from collections.abc import Callable

import jax
from jax import numpy as jnp
from jaxtyping import Array

__all__ = ["ACTIVATIONS", "gated", "of_halves"]

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@functools.cache
def of_halves(activation: str) -> Callable[[Array, Array], Array]:
    """``activation(gate) * up`` in float32, as a function of the two, the same one every time."""
    activated = ACTIVATIONS[activation]
    return lambda gate, up: activated(gate.astype(jnp.float32)) * up.astype(jnp.float32)


def gated(product: Array, *, activation: str) -> Array:
    """See `awq_jax_kernels.gated.gated`."""
    gate, up = jnp.split(product, 2, axis=-1)
    return of_halves(activation)(gate, up).astype(product.dtype)
