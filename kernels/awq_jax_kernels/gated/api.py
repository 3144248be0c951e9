# SPDX-License-Identifier: Apache-2.0
"""`gated`: activation of one half of a product's columns, times the other half."""

import functools
from typing import Any, Literal

from jaxtyping import Array, Float

from awq_jax_kernels.dispatch import Way, cuda, dispatch
from awq_jax_kernels.gated import pallas_gpu, reference
from awq_jax_kernels.product import unmapped

__all__ = ["check", "gated"]


def gated(
    product: Float[Array, "m w"],
    *,
    activation: str,
    implementation: Literal["gpu", "reference"] | None = None,
) -> Float[Array, "m half"]:
    """``activation(product[:, :w/2]) * product[:, w/2:]``, what the second product of a gated MLP reads.

    Args:
      product: ``[m, w]``, gate and up side by side.
      activation: "silu", or "gelu_tanh".
      implementation: "gpu" or "reference"; a refusal is then an error. None takes the kernel where this process has a
        GPU and the kernel takes the operands. On a TPU XLA's fusion is as good as a kernel was.

    Returns:
      ``[m, w/2]`` in the dtype of the product, rounded once from float32.

    Raises:
      ValueError: the kernel was named and does not take these operands, or the activation is none of these.

    >>> import jax.numpy as jnp
    >>> gated(jnp.array([[0.0, 100.0, 5.0, 2.0]]), activation="silu").tolist()
    [[0.0, 200.0]]
    """
    check(product, activation)
    alone = unmapped(pallas_gpu.gated, reference.gated, activation=activation)
    ways = {
        "gpu": Way(functools.partial(pallas_gpu.refusal, product), alone, cuda()),
        "reference": Way(lambda: None, functools.partial(reference.gated, activation=activation)),
    }
    what = f"gated takes a product {product.dtype}{list(product.shape)}"
    return dispatch(implementation, ways, "reference", (product,), what)


def check(product: Any, activation: str) -> None:
    """Raise ValueError where the product has no halves or the activation is none of those there are."""
    if activation not in reference.ACTIVATIONS or product.shape[-1] % 2:
        names = ", ".join(reference.ACTIVATIONS)
        raise ValueError(f"gated takes an even number of columns and {names}: {list(product.shape)}, {activation!r}.")
