# SPDX-License-Identifier: Apache-2.0
"""Launching a kernel whose threads are ours to order, and that may write to arrays that it is given."""

from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = ["kernel"]


def kernel(body: Any, *, name: str, out: Any, scratch: Any = (), **mesh: Any) -> Any:
    """A Mosaic GPU kernel, called with arrays and with `jax.Ref`, which it writes where they lie.

    Args:
      body: takes references to inputs, outputs and shared memory.
      name: of the kernel.
      out: shapes of the outputs.
      scratch: shared memory.
      **mesh: grid, cluster and threads, as `plgpu.Mesh` takes them.
    """

    def run(*refs: Any) -> None:
        pl.run_scoped(lambda *shared: body(*refs, *shared), *scratch, collective_axes=mesh["thread_name"])

    params = plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
    return pl.kernel(run, out_type=out, mesh=plgpu.Mesh(kernel_name=name, **mesh), name=name, compiler_params=params)
