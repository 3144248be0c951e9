# SPDX-License-Identifier: Apache-2.0
"""`int4_matmul` on Hopper GPUs, written for Mosaic GPU.

`kernel` is the dataflow, `pipeline` the ring that feeds it, `reader` the warpgroup that multiplies, `fragment` turns
codes into tensor-core operands, `combine` adds up what was split, `config` chooses.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from awq_jax_kernels.int4_matmul.pallas_gpu.config import BlockConfig, choose, derive
from awq_jax_kernels.int4_matmul.pallas_gpu.kernel import fused
from awq_jax_kernels.mosaic_gpu.device import unsuitable

__all__ = ["BlockConfig", "choose", "derive", "int4_matmul", "supports"]

FLOATS = ("bfloat16", "float16")


def supports(x: Any, packed: Any, scale: Any, zero: Any = None, *, config: BlockConfig | None = None) -> str | None:
    """Why the kernel can't take these 2-d operands (anything with a shape and a dtype), or None if it can.

    If this process has a GPU, it must be a Hopper one; without a GPU the program is taken to be compiled for one.
    """
    (m, k), (groups, n) = x.shape, scale.shape
    g = k // groups
    if str(x.dtype) not in FLOATS:
        return f"x is {x.dtype}; tensor cores take bfloat16 and float16"
    if str(scale.dtype) not in (*FLOATS, "float32"):
        return f"scale is {scale.dtype}, not bfloat16, float16 or float32"
    if not m:
        return "x has no rows"
    if m * n >= 1 << 31:
        return f"y of {m} x {n} has more elements than 32-bit offsets reach"
    if k % 128 or n % 128:
        return f"k={k} and n={n} must be multiples of 128"
    if g not in (32, 64) and g % 128:
        return f"groups of {g} rows: the kernel takes 32, 64 and multiples of 128"
    if g == 32 and _exact(x.dtype, scale.dtype):
        return f"groups of 32 rows are scaled in float16, and scale is {scale.dtype}"
    problem = None if config is None else config.problem(k, n, g)
    return problem or unsuitable()


def int4_matmul(
    x: Float[Array, "m k"],
    packed: Int8[Array, "k2 n"] | Int32[Array, "n128 k64 4 256"],
    scale: Float[Array, "groups n"],
    zero: Int8[Array, "groups n"] | None = None,
    *,
    config: BlockConfig | None = None,
) -> Float[Array, "m n"]:
    """``y = x @ ((q - zero) * scale)`` without a dense weight, in one kernel and no workspace.

    Args:
      x: bfloat16 or float16 ``[m, k]``.
      packed: int8 ``[k/2, n]`` in the layout of `awq_jax_kernels.nibbles`, or the same weight in the order
        of `awq_jax_kernels.int4_matmul.tiles`, which saves a few instructions.
      scale: ``[k/g, n]``; g is 32, 64 or a multiple of 128. Above 32 rows of x the scaled weight is rounded to the
        dtype of x, as a dense weight would be; a float16 x with wider scales excepted.
      zero: int8 codes 0..15 ``[k/g, n]``; None is 8 everywhere.
      config: None takes the tuned one, or derives one.

    Returns:
      ``[m, n]`` in the dtype of x; sums are float32.
    """
    (m, k), (groups, n) = x.shape, scale.shape
    if config is None:
        config = choose(m, k, n, k // groups, exact=_exact(x.dtype, scale.dtype), device=_device_kind())
    rows = m if m < 8 else -(-m // 8) * 8  # a bulk copy fills rows past the end with zeros, up to its tile of eight
    if rows != m:
        x = jnp.pad(x, ((0, rows - m), (0, 0)))
    return _batched(config)(x, packed, scale, zero)[:m]


@functools.cache
def _batched(config: BlockConfig) -> Any:
    """The kernel with a batching rule: a loop, since a bulk copy reads whole operands and not a slice of a stack."""

    @jax.custom_batching.custom_vmap
    def product(x: Any, packed: Any, scale: Any, zero: Any) -> Any:
        return fused(x, packed, scale, zero, config)

    @product.def_vmap
    def _(size: int, mapped: Any, *operands: Any) -> tuple[Any, bool]:
        leaves, structure = jax.tree.flatten(operands)
        flags = jax.tree.leaves(mapped)

        def one(stacked: Any) -> Any:
            rest = iter(stacked)
            chosen = [next(rest) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
            return product(*jax.tree.unflatten(structure, chosen))

        return jax.lax.map(one, [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]), True

    return product


def _exact(dtype: Any, scale_dtype: Any) -> bool:
    """Whether rounding a scale to the dtype of x could leave its range: float16 has no small scales."""
    return str(dtype) == "float16" and str(scale_dtype) != "float16"


def _device_kind() -> str:
    """The GPU that is being traced for: that of an abstract mesh, or this process's own; else nothing."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else ""
