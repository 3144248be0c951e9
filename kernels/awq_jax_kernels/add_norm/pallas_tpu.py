# SPDX-License-Identifier: Apache-2.0
"""`add_norm` as a Mosaic kernel: all rows in VMEM at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from awq_jax_kernels.add_norm import reference

__all__ = ["add_norm", "refusal"]

_MOST = 2 << 20  # bytes of an operand


def refusal(x: Any) -> str | None:
    """Why the kernel can't take x, or None if it can."""
    if str(x.dtype) != "bfloat16":
        return f"it is {x.dtype}, not bfloat16"
    if x.shape[1] % 128:
        return "its columns are no multiple of 128"
    if 2 * x.shape[0] * x.shape[1] > _MOST:
        return f"it has more than {_MOST} bytes"
    return None


def add_norm(
    h: Array, delta: Array | None, weight: Array, *, eps: float, offset: float, interpret: Any = False
) -> tuple[Array, Array]:
    """See `awq_jax_kernels.add_norm.add_norm`."""

    def kernel(*refs: Any) -> None:
        h_ref, *delta_ref, weight_ref, total_ref, out_ref = refs
        total = h_ref[...].astype(jnp.float32)
        if delta_ref:
            total = (total + delta_ref[0][...].astype(jnp.float32)).astype(h.dtype).astype(jnp.float32)
        total_ref[...] = total.astype(h.dtype)
        out_ref[...] = reference.norm(total, weight_ref[...], eps, offset).astype(h.dtype)

    operands = [h, *([] if delta is None else [delta]), weight[None]]
    like = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(h).manual_axis_type)
    inside = pl.BlockSpec(memory_space=pltpu.VMEM)
    total, normed = pl.pallas_call(
        kernel,
        in_specs=[inside] * len(operands),
        out_specs=[inside] * 2,
        out_shape=[like(h.shape, h.dtype)] * 2,
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
        name="add_norm",
    )(*operands)
    return total, normed
