# SPDX-License-Identifier: Apache-2.0
"""How long a kernel takes if its copies and its core overlap as a double buffer lets them.

The compiler's schedule gives the core's time, the grid and the index maps give the bytes::

    t = max(first + core, hbm + core / steps)

A kernel limited by its core waits for the blocks of its first step; one limited by HBM computes its last step after the
last byte has come. XLA's own operations around the kernel add their time.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Traffic", "kernel_traffic"]


@dataclass(frozen=True)
class Traffic:
    """What one kernel moves between HBM and VMEM.

    Attributes:
      steps: of the grid.
      bytes: in and out; a block counts again whenever its index changes.
      first_bytes: in, before the first step can start.
      parallel: cores may share the grid.
    """

    steps: int
    bytes: int
    first_bytes: int
    parallel: bool


def kernel_traffic(jaxpr: Any, hlo: str) -> dict[str, Traffic]:
    """The traffic of each Pallas kernel of a program, by the name of its operation in the optimized HLO."""
    calls = {re.sub(r"\W", "_", name): traffic for name, traffic in _pallas_calls(jaxpr.jaxpr)}
    names = re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*custom_call_target="tpu_custom_call"', hlo, re.MULTILINE)
    return {name: calls[re.sub(r"\W", "_", re.sub(r"\.\d+$", "", name))] for name in names}


def _pallas_calls(jaxpr: Any) -> Any:
    from jax.extend.core import jaxprs_in_params

    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield str(eqn.params["name"]), _traffic(eqn.params["grid_mapping"], eqn.params["compiler_params"])
        else:
            for inner in jaxprs_in_params(eqn.params):
                yield from _pallas_calls(inner)


def _traffic(grid_mapping: Any, compiler_params: Any) -> Traffic:
    import jax
    from jax.extend.core import jaxpr_as_fun

    grid = grid_mapping.grid
    points = np.stack(np.unravel_index(np.arange(math.prod(grid)), grid), axis=1).astype(np.int32)
    total = first = 0
    for number, block in enumerate(grid_mapping.block_mappings):
        index_map = jax.jit(jax.vmap(jaxpr_as_fun(block.index_map_jaxpr)))
        index = np.stack([np.asarray(i) for i in index_map(*points.T)], axis=1)
        fetches = 1 + int(np.any(index[1:] != index[:-1], axis=1).sum())
        dims = [getattr(d, "block_size", d) if d is not None else 1 for d in block.block_shape]
        size = math.prod(d if isinstance(d, int) else 1 for d in dims) * block.array_aval.dtype.itemsize
        total += fetches * size
        first += size if number < grid_mapping.num_inputs else 0
    semantics = getattr(compiler_params, "dimension_semantics", None) or ()
    parallel = any(str(getattr(s, "value", s)).lower().endswith("parallel") for s in semantics)
    return Traffic(len(points), total, first, parallel)
