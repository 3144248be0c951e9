# SPDX-License-Identifier: Apache-2.0
"""Time the products on the device at hand, all in one process, over weights that rotate."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax_kernels.bench import programs
from awq_jax_kernels.int4_matmul import int4_matmul, refusal, xla
from awq_jax_kernels.int4_matmul.config import BlockConfig
from awq_jax_kernels.int4_matmul.reference import dequantize

__all__ = ["compare", "median_us"]

_ROTATE_BYTES = 512 << 20  # more than any cache or VMEM keeps


def compare(m: int, k: int, n: int, *, g: int = 128, interpret: bool = False) -> dict[str, float]:
    """Microseconds of a dense bfloat16 product, the kernel, XLA's grouped product, and dequantize-then-dot."""
    kernel = "gpu" if jax.default_backend() == "gpu" else "tpu"
    config = BlockConfig(interpret=True) if interpret else None
    ours = functools.partial(int4_matmul, implementation=kernel, config=config)
    copies = 1 if interpret else max(2, _ROTATE_BYTES // (k * n // 2))
    x, weights = _operands(m, k, n, g, copies)
    if reason := refusal(kernel, x, *weights[0]):
        raise ValueError(f"nothing to time: {reason}.")
    dense_first, _ = programs.dequantize_then_dot(m=m, k=k, n=n, g=g)
    dense = [(dequantize(*w).astype(jnp.bfloat16),) for w in weights[: max(1, copies // 4)]]
    return {
        "bf16": median_us(jnp.matmul, x, dense),
        "ours": median_us(ours, x, weights),
        "grouped": median_us(xla.grouped, x, weights),
        "dequantize_then_dot": median_us(dense_first, x, weights),
    }


def median_us(product: Callable[..., Any], x: Any, weights: list[tuple[Any, ...]], repeats: int = 7) -> float:
    """The median over repeats of one pass over all weights, per product.

    Passes are dispatched whole before the wait, so that the host's own time hides behind the device's.
    """
    run = jax.jit(product)
    jax.block_until_ready(run(x, *weights[0]))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([run(x, *weight) for weight in weights])
        times.append((time.perf_counter() - start) / len(weights))
    return float(np.median(times) * 1e6)


def _operands(m: int, k: int, n: int, g: int, copies: int) -> tuple[Any, list[tuple[Any, Any, Any]]]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((m, k)), jnp.bfloat16)
    weight = lambda: (
        jnp.asarray(rng.integers(-128, 128, (k // 2, n), np.int8)),
        jnp.asarray(rng.uniform(0.01, 0.02, (k // g, n)), jnp.bfloat16),
        jnp.asarray(rng.integers(0, 16, (k // g, n), np.int8)),
    )
    return x, [weight() for _ in range(copies)]
