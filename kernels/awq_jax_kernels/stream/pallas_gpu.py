# SPDX-License-Identifier: Apache-2.0
"""Both on Hopper GPUs, one launch each: `int4_matmul`'s kernel with other ends."""

import functools
from typing import Any

import jax
from jaxtyping import Array

from awq_jax_kernels.int4_matmul import pallas_gpu
from awq_jax_kernels.int4_matmul.pallas_gpu import FEW, Ends
from awq_jax_kernels.stream.reference import Stream

__all__ = ["FEW", "add_product", "product", "refusal_to_add", "refusal_to_multiply"]


def refusal_to_multiply(stream: Stream, *weight: Any, eps: float, activation: str | None) -> str | None:
    """Why the kernel can't multiply this stream, or None if it can."""
    parts = stream.squares.shape[-1]
    if parts % 4:
        return f"squares of {parts} parts are not in fours, as `add_product` makes them"
    return pallas_gpu.supports_ends(stream.weighted, *weight, ends=Ends(eps=eps, activation=activation))


@functools.partial(jax.jit, static_argnames=("eps", "activation"))  # one lowering for all layers
def product(stream: Stream, *weight: Any, eps: float, activation: str | None) -> Array:
    """See `awq_jax_kernels.stream.api.product`."""
    ends = Ends(eps=eps, activation=activation)
    return pallas_gpu.int4_matmul_between(stream.weighted, *weight, ends=ends, beside=(stream.squares,))


def refusal_to_add(stream: Stream, x: Any, norm_weight: Any, *weight: Any, offset: float) -> str | None:
    """Why the kernel can't add to this stream, or None if it can."""
    if stream.total.dtype != x.dtype:
        return f"the stream is {stream.total.dtype} and x {x.dtype}"
    if str(norm_weight.dtype) != "float32":
        return f"the norm's weight is {norm_weight.dtype}, not float32"
    return pallas_gpu.supports_ends(x, *weight, ends=Ends(adds=True, offset=offset))


@functools.partial(jax.jit, static_argnames="offset")
def add_product(stream: Stream, x: Array, norm_weight: Array, *weight: Any, offset: float) -> Stream:
    """See `awq_jax_kernels.stream.api.add_product`."""
    ends = Ends(adds=True, offset=offset)
    return Stream(*pallas_gpu.int4_matmul_between(x, *weight, ends=ends, beside=(stream.total, norm_weight)))
