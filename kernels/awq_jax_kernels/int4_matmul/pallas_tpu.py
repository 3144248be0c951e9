# SPDX-License-Identifier: Apache-2.0
"""`int4_matmul` as one Mosaic kernel for TPU v4 to v7x.

This file checks operands and brings x to bfloat16; `tpu_kernel` is the kernel.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from awq_jax_kernels.int4_matmul.config import BlockConfig, choose, here, resident
from awq_jax_kernels.int4_matmul.tpu_kernel import OfHalves, fused
from awq_jax_kernels.int4_matmul.unpack import ROWS, split

__all__ = ["BlockConfig", "int4_matmul", "multiply_halves", "multiply_tiles", "supports", "supports_halves"]

_PARTS = {"bfloat16": 1, "float16": 2, "float32": 3}  # bfloat16 terms that hold a value exactly


def supports(x: Any, packed: Any, scale: Any, zero: Any = None, *, config: BlockConfig | None = None) -> str | None:
    """Why the kernel can't take these operands, or None if it can; the platform shows when a program is lowered."""
    (m, k), n, groups = x.shape, packed.shape[1], scale.shape[0]
    g = k // groups
    if not m:
        return "x has no rows"
    if k % ROWS or n % 128:
        return f"k={k} and n={n} must be multiples of 128"
    if g % ROWS and (ROWS % g or g < 32):
        return f"groups of {g} rows are neither 32, 64 nor a multiple of 128"
    if str(x.dtype) not in _PARTS:
        return f"x is {x.dtype}, not one of {', '.join(_PARTS)}"
    return None if config is None else _misfit(config, k, n, g, exact=str(x.dtype) != "bfloat16")


def _misfit(config: BlockConfig, k: int, n: int, g: int, *, exact: bool) -> str | None:
    """What is wrong with a config for these sizes."""
    shares = config.cores * config.splits
    if n % (config.bn * shares) or config.bn % 128:
        return f"bn={config.bn}, a multiple of 128, times {shares} shares must divide n={n}"
    if config.bn % config.tile or config.tile % 128:
        return f"tile={config.tile} must divide bn={config.bn}, in multiples of 128"
    if config.variant in "EFG" and (k % config.chunk or config.chunk % max(g if g < k else 0, ROWS)):
        return f"chunk={config.chunk} must divide k={k}, in multiples of {ROWS} and of the group"
    if config.variant in "EFG" and exact:
        return f"variant {config.variant} rounds weights to bfloat16, x is wider"
    if config.variant == "A" and g % ROWS:
        return f"variant A needs groups of a multiple of {ROWS} rows, not {g}"
    return None


def int4_matmul(
    x: Float[Array, "m k"],
    packed: Int8[Array, "k2 n"],
    scale: Float[Array, "groups n"],
    zero: Int8[Array, "groups n"] | None = None,
    *,
    config: BlockConfig | None = None,
) -> Float[Array, "m n"]:
    """``y = x @ ((q - zero) * scale)`` without the dense weight.

    float32 and float16 activations are split into bfloat16 terms, one set of rows each, so that their product is as
    exact as in float32 while the weight is fetched and unpacked once.

    Raises:
      ValueError: a config that does not fit the operands.
    """
    (m, k), n = x.shape, packed.shape[1]
    parts = _PARTS[str(x.dtype)]
    if config is None:
        config = choose(parts * m, k, n, k // scale.shape[0], zeros=zero is not None, exact=parts > 1)
    if reason := supports(x, packed, scale, zero, config=config):
        raise ValueError(f"{config} does not fit x {x.shape} and packed {packed.shape}: {reason}.")
    return _in_bfloat16(x, scale, lambda rows, s, out: _batchable(config, out)(rows, packed, s, zero))


def _in_bfloat16(x: Any, scale: Any, multiply: Callable[[Any, Any, str | None], Any]) -> Any:
    """``multiply(x, scale, dtype of y)`` with x as rows of bfloat16 terms, whose results are added up."""
    parts = _PARTS[str(x.dtype)]
    if scale.dtype == jnp.float16:
        scale = scale.astype(jnp.float32)  # Mosaic has no float16
    if parts == 1:
        return multiply(x, scale, None)
    rows = jnp.concatenate(split(x.astype(jnp.float32), parts), axis=-2).astype(jnp.bfloat16)
    y = multiply(rows, scale, "float32")
    return y.reshape(*x.shape[:-2], parts, x.shape[-2], y.shape[-1]).sum(-3).astype(x.dtype)


@functools.cache
def _batchable(config: BlockConfig, out_dtype: str | None) -> Any:
    """The kernel with a batching rule: leading axes become an axis of its grid."""

    @jax.custom_batching.custom_vmap
    def product(x: Any, packed: Any, scale: Any, zero: Any) -> Any:
        stacked = (
            jax.tree.map(lambda leaf: leaf[None], (x, packed, scale, zero)) if x.ndim == 2 else (x, packed, scale, zero)
        )
        y = fused(*stacked, config=config, out_dtype=out_dtype)
        return y[0] if x.ndim == 2 else y

    @product.def_vmap
    def _(size: int, mapped: Any, *operands: Any) -> tuple[Any, bool]:
        spread = lambda leaf, over: leaf if over else jnp.broadcast_to(leaf, (size, *leaf.shape))
        stacked = jax.tree.map(spread, operands, tuple(mapped))
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[-2:]), stacked)
        y = product(*flat)
        return y.reshape(*stacked[0].shape[:-1], y.shape[-1]), True

    return product


def supports_halves(
    halves: Any, packed: Any, scale: Any, zero: Any = None, *, config: BlockConfig | None = None
) -> str | None:
    """Why `multiply_halves` can't take these operands, or None if it can."""
    (m, w), n, groups = halves.shape, packed.shape[1], scale.shape[0]
    x = jax.ShapeDtypeStruct((m, w // 2), halves.dtype)
    if reason := supports(x, packed, scale, zero, config=config):
        return reason
    if str(x.dtype) != "bfloat16":
        return f"the halves are {x.dtype}, not bfloat16"
    if config is None and here() is None:
        return "no TPU is being traced for, so nothing is known of its VMEM"
    config = config or choose(m, w // 2, n, w // 2 // groups, zeros=zero is not None, exact=False)
    return None if resident(config, m, w, n) else f"{m} rows of {w} and {n} columns do not stay in VMEM"


def multiply_halves(
    halves: Float[Array, "m w"],
    packed: Int8[Array, "k2 n"],
    scale: Float[Array, "groups n"],
    zero: Int8[Array, "groups n"] | None = None,
    *,
    of_halves: OfHalves,
    config: BlockConfig | None = None,
) -> Float[Array, "m n"]:
    """``of_halves(halves[:, :k], halves[:, k:]) @ ((q - zero) * scale)``, few rows, in one kernel."""
    (m, w), n = halves.shape, packed.shape[1]
    config = config or choose(m, w // 2, n, w // 2 // scale.shape[0], zeros=zero is not None, exact=False)
    scale = scale.astype(jnp.float32) if scale.dtype == jnp.float16 else scale
    stacked = jax.tree.map(lambda leaf: leaf[None], (halves, packed, scale, zero))
    return fused(*stacked, config=config, of_halves=of_halves)[0]


def multiply_tiles(
    tiles: Float[Array, "b m k"],
    packed: Int8[Array, "e k2 n"],
    scale: Float[Array, "e groups n"],
    zero: Int8[Array, "e groups n"] | None,
    experts: Int32[Array, " b"],
    *,
    config: BlockConfig | None = None,
) -> Float[Array, "b m n"]:
    """Each tile of rows times the weight of its expert, in one kernel."""
    (_, m, k), n = tiles.shape, packed.shape[2]
    parts = _PARTS[str(tiles.dtype)]
    config = config or choose(parts * m, k, n, k // scale.shape[1], zeros=zero is not None, exact=parts > 1)
    run = lambda rows, s, out: fused(rows, packed, s, zero, experts, config=config, out_dtype=out)
    return _in_bfloat16(tiles, scale, run)
