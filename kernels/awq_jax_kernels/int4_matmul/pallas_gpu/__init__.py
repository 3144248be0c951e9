# SPDX-License-Identifier: Apache-2.0
"""`int4_matmul` on Hopper GPUs, written for Mosaic GPU.

`kernel` is the dataflow, `work` what a block computes, `pipeline` the ring that feeds it, `reader` the warpgroup that
multiplies, `fragment` turns codes into tensor-core operands, `combine` adds up what was split, `ends` writes the
results, `config` chooses.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from awq_jax_kernels.int4_matmul.pallas_gpu.config import BlockConfig, choose, derive, paired
from awq_jax_kernels.int4_matmul.pallas_gpu.ends import Ends
from awq_jax_kernels.int4_matmul.pallas_gpu.kernel import fused
from awq_jax_kernels.mosaic_gpu.device import unsuitable

__all__ = [
    "FEW", "BlockConfig", "Ends", "choose", "derive", "int4_matmul", "int4_matmul_between", "supports", "supports_ends",
]  # fmt: skip

FLOATS = ("bfloat16", "float16")
FEW = 32  # rows of x up to which a kernel with other ends has the registers it needs


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
    return _batched(config)(_in_eights(x), packed, scale, zero)[:m]


def supports_ends(x: Any, packed: Any, scale: Any, zero: Any = None, *, ends: Ends) -> str | None:
    """Why `int4_matmul_between` can't take these 2-d operands, or None if it can."""
    (m, k), (groups, n) = x.shape, scale.shape
    if str(x.dtype) != "bfloat16":
        return f"x is {x.dtype}; rows that are not divided yet could leave another range than bfloat16's"
    if m > FEW:
        return f"{m} rows of x are more than {FEW}"
    if ends.activation is not None and (n % 256 or k // groups < 128):
        return f"halves of n={n} are no multiples of 128, or groups of {k // groups} are shorter than that"
    return supports(x, packed, scale, zero)


def int4_matmul_between(
    x: Float[Array, "m k"],
    packed: Int8[Array, "k2 n"] | Int32[Array, "n128 k64 4 256"],
    scale: Float[Array, "groups n"],
    zero: Int8[Array, "groups n"] | None,
    *,
    ends: Ends,
    beside: tuple[Array, ...],
) -> Any:
    """A product of up to 32 rows with what lies before and behind it, as `ends` says; no batching rule.

    Args:
      x: bfloat16 ``[m, k]``.
      packed, scale, zero: as in `int4_matmul`.
      ends: what is done beside multiplying.
      beside: what that reads, rows as in x; see `kernel.fused`.
    """
    (m, k), (groups, n) = x.shape, scale.shape
    config = choose(m, k, n, k // groups, exact=False, device=_device_kind())
    config = config if ends.activation is None else paired(config)
    beside = tuple(_in_eights(leaf) if leaf.ndim == 2 else leaf for leaf in beside)
    return jax.tree.map(lambda y: y[:m], fused(_in_eights(x), packed, scale, zero, config, ends, *beside))


def _in_eights(x: Array) -> Array:
    """Rows up to a multiple of eight; fewer than eight a bulk copy itself fills with zeros, up to its tile."""
    m = x.shape[0]
    return x if m < 8 or m % 8 == 0 else jnp.pad(x, ((0, -m % 8), (0, 0)))


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
