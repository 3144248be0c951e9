# SPDX-License-Identifier: Apache-2.0
"""Run a user's function with quantized kernels among its parameters."""

import functools
from collections.abc import Callable
from typing import Any

from awq_jax.adapt.program import Apply, run
from awq_jax.adapt.record import Server

__all__ = ["serve"]


def serve(apply: Apply) -> Callable[..., Any]:
    """``apply`` as a function of parameters some of which are quantized.

    The function is traced as if they were dense; every product of a quantized kernel becomes `awq_jax.matmul`, and no
    dense weight is made. Put it under `jax.jit`: the tracing is then done once. It composes with `grad` (of
    activations and dense parameters), `vmap`, `scan`, `jax.checkpoint` and `shard_map` as any jax function does.

    Args:
      apply: ``apply(params, *args) -> outputs``, pure.

    Raises:
      ValueError: when called, if the program uses a quantized parameter for anything but the product it was quantized
        for.
    """

    @functools.wraps(apply)
    def served(params: Any, *args: Any) -> Any:
        return run(apply, params, args, Server())

    return served
