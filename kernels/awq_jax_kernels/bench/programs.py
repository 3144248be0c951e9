# SPDX-License-Identifier: Apache-2.0
"""The programs that are compared: ours, what XLA makes of the same product, and dense bfloat16."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from awq_jax_kernels.gated import reference as gated
from awq_jax_kernels.int4_matmul import tpu_kernel, xla
from awq_jax_kernels.int4_matmul.config import BlockConfig

__all__ = ["dense", "dequantize_then_dot", "grouped", "operands", "ours", "small_gpu"]


def operands(m: int, k: int, n: int, g: int = 128, zeros: bool = True) -> tuple[Any, Any, Any, Any]:
    """Shapes of x, packed, scale and zero: bfloat16 activations and scales."""
    of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    zero = of((k // g, n), "int8") if zeros else None
    return of((m, k), "bfloat16"), of((k // 2, n), "int8"), of((k // g, n), "bfloat16"), zero


def ours(
    config: dict[str, Any], *, still: bool = False, inside: bool = False, gate: str | None = None, **shape: Any
) -> tuple[Any, Any]:
    """The kernel; `still` for what its core does without copies, `inside` between operations that leave x in VMEM.

    With the name of an activation as `gate`, x is given as gate and up.
    """
    of_halves = None if gate is None else gated.of_halves(gate)

    def product(*arrays: Any) -> Any:
        stacked = jax.tree.map(lambda leaf: leaf[None], arrays)
        return tpu_kernel.fused(*stacked, config=BlockConfig(**config), still=still, of_halves=of_halves)[0]

    def between(x: Any, *weight: Any) -> Any:
        return jnp.tanh(product(jnp.tanh(x), *weight))

    x, *weight = operands(**shape)
    given = x if gate is None else jax.ShapeDtypeStruct((x.shape[0], 2 * x.shape[1]), x.dtype)
    return between if inside else product, (given, *weight)


def grouped(**shape: Any) -> tuple[Any, Any]:
    """One product per group on int4, scaled after: `xla` as it runs on an accelerator."""
    return xla.grouped, operands(**shape)


def dequantize_then_dot(**shape: Any) -> tuple[Any, Any]:
    """The dense weight in bfloat16, even and odd rows apart as XLA unpacks them best, then the products."""

    def product(x: Any, packed: Any, scale: Any, zero: Any) -> Any:
        groups, n = scale.shape
        words = packed.reshape(groups, -1, n).astype(jnp.int32)
        y = jnp.zeros((x.shape[0], n), jnp.float32)
        for start, codes in enumerate(((words << 28) >> 28, words >> 4)):
            centred = codes.astype(jnp.float32) - (zero.astype(jnp.float32) - 8)[:, None]
            weight = (centred * scale.astype(jnp.float32)[:, None]).astype(x.dtype).reshape(-1, n)
            weight = jax.lax.optimization_barrier(weight)  # what "then" means
            y += jnp.matmul(x[:, start::2], weight, preferred_element_type=jnp.float32)
        return y.astype(x.dtype)

    return product, operands(**shape)


def dense(m: int, k: int, n: int, **_: Any) -> tuple[Any, Any]:
    """``x @ w`` in bfloat16, as XLA compiles it."""
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return jnp.matmul, (of(m, k), of(k, n))


def small_gpu(name: str, *, rows: int, dtype: str = "bfloat16", **sizes: int) -> tuple[Any, Any]:
    """What runs on a GPU between two products of a decode step: "add_norm" (d), "gated" (w) or "decode_attention"
    (heads, kv, d, positions), with the kernel's own name for its sizes.
    """
    from awq_jax_kernels import add_norm, decode_attention
    from awq_jax_kernels.gated import gated as gate

    of = lambda *shape, kind=dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(kind))
    if name == "add_norm":
        d = sizes["d"]
        run = functools.partial(add_norm.add_norm, eps=1e-5, implementation="gpu")
        return run, (of(rows, d), of(rows, d), of(d, kind="float32"))
    if name == "gated":
        return functools.partial(gate, activation="silu", implementation="gpu"), (of(rows, sizes["w"]),)
    heads, kv, d, positions = (sizes[key] for key in ("heads", "kv", "d", "positions"))
    held, turns = of(rows, positions * kv, d), of(rows, d, kind="float32")
    run = functools.partial(decode_attention.decode_attention, heads=heads, scale=d**-0.5, implementation="gpu")
    return run, (of(rows, (heads + 2 * kv) * d), (held, held, None, None), of(rows, kind="int32"), (turns, turns))
