# SPDX-License-Identifier: Apache-2.0
"""What the kernel costs on a TPU that is not here, with its operands in VMEM as in a step: libtpu's static profile."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from awq_jax_kernels.add_norm import pallas_tpu
from awq_jax_kernels.aot.program import Program
from awq_jax_kernels.aot.tpu import compile_programs
from awq_jax_kernels.chips import TPUS

__all__ = ["microseconds", "program"]


def program(m: int, d: int, inside: bool = False) -> tuple[Any, Any]:
    """The kernel over ``[m, d]``, `inside` between two operations that XLA makes, and the shapes of its operands."""
    of = lambda shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    kernel = functools.partial(pallas_tpu.add_norm, eps=1e-5, offset=0.0)

    def between(h: Any, delta: Any, weight: Any) -> Any:
        return jax.tree.map(jnp.tanh, kernel(jnp.tanh(h), jnp.tanh(delta), weight))

    return between if inside else kernel, (of((m, d)), of((m, d)), of((d,), "float32"))


def microseconds(generation: str, m: int, d: int) -> float:
    """Of one call; on generations without a profile of the scheduled bundles alone.

    Raises:
      RuntimeError: the kernel does not compile.
    """
    arguments = {"m": m, "d": d, "inside": True}
    (found,) = compile_programs([Program("awq_jax_kernels.add_norm.cost:program", arguments)], generation)
    if found.error:
        raise RuntimeError(f"{generation} {arguments}: {found.error}")
    (kernel,) = found.kernels
    cycles = (found.cycles or {}).get(kernel) or sum((found.bundles or {})[kernel])
    return cycles / TPUS[generation].clock_ghz / 1e3
