# SPDX-License-Identifier: Apache-2.0
"""`gated`: activation of one half of a product's columns, times the other half."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
from jaxtyping import Array, Float

from awq_jax_kernels.gated import pallas_gpu, reference

__all__ = ["gated"]


def gated(
    product: Float[Array, "m w"],
    *,
    activation: str,
    ahead: Sequence[Any] = (),
    implementation: Literal["gpu", "reference"] | None = None,
) -> Float[Array, "m half"]:
    """``activation(product[:, :w/2]) * product[:, w/2:]``, what the second product of a gated MLP reads.

    Args:
      product: ``[m, w]``, gate and up side by side.
      activation: "silu", or "gelu_tanh".
      ahead: arrays that what follows reads, such as a weight; a GPU's cache is asked for their beginnings. They change
        nothing of the result.
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
    if activation not in reference.ACTIVATIONS or product.shape[-1] % 2:
        names = ", ".join(reference.ACTIVATIONS)
        raise ValueError(f"gated takes an even number of columns and {names}: {list(product.shape)}, {activation!r}.")
    reason = pallas_gpu.refusal(product)
    if implementation == "gpu" and reason:
        raise ValueError(f"no kernel takes a product {product.dtype}{list(product.shape)}: {reason}.")
    default = functools.partial(reference.gated, activation=activation)
    kernel = functools.partial(pallas_gpu.gated, activation=activation)
    if implementation == "gpu":
        return kernel(product, *ahead)
    if implementation == "reference" or reason or jax.default_backend() != "gpu":
        return default(product)
    return jax.lax.platform_dependent(product, *ahead, cuda=kernel, default=lambda product, *_: default(product))
