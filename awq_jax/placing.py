# SPDX-License-Identifier: Apache-2.0
"""Where values lie within one compiled step over a mesh: what is shared, what is whole, and what every device has."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

__all__ = ["ALONE", "Placing", "axes_of_weight"]


def axes_of_weight(shape: Sequence[int], sizes: Mapping[str, int], columns: tuple[str, ...]) -> tuple[Any, ...]:
    """Mesh axes of a matrix ``[*b, k, n]``: of ``columns`` as many as divide n, and ``fsdp``, if left, for k."""
    if len(shape) < 2:
        return ()
    *b, k, n = shape
    while columns and n % math.prod(sizes[name] for name in columns):
        columns = columns[:-1]
    rows = "fsdp" if "fsdp" not in columns and k % sizes["fsdp"] == 0 else None
    return (*(None for _ in b), rows, columns or None)


@dataclasses.dataclass(frozen=True)
class Placing:
    """What a step that knows of no devices says of its values; without a mesh it says nothing.

    Attributes:
      mesh: the devices; None is one of them.
      shared: whether devices that see other samples share the outputs of a weight.
    """

    mesh: Mesh | None = None
    shared: bool = False

    def gathered(self, params: Any) -> Any:
        """Weights as samples pass through them: outputs over ``model``, inputs over ``fsdp``, whole along ``data``."""
        if self.mesh is None or not self.shared:
            return params
        return self._spread(params, ("model",))

    def by_outputs(self, params: Any) -> Any:
        """Weights as they are searched: an output by itself, with all its inputs, so that no step of it is a gather."""
        if self.mesh is None:
            return params
        return self._spread(params, ("model", "data", "fsdp") if self.shared else ("model", "fsdp"))

    def cut(self, array: Any) -> Any:
        """Sums that grow batch by batch: along the first axis each device has a part, where it divides."""
        if self.mesh is None or array.shape[0] % self.mesh.size:
            return array
        return self._put(array, self.mesh.axis_names)

    def everywhere(self, tree: Any) -> Any:
        """The same on every device: what each of them multiplies its own outputs with, again and again."""
        return tree if self.mesh is None else jax.tree.map(self._put, tree)

    def _spread(self, params: Any, columns: tuple[str, ...]) -> Any:
        assert self.mesh is not None
        sizes = dict(self.mesh.shape)
        return jax.tree.map(lambda array: self._put(array, *axes_of_weight(array.shape, sizes, columns)), params)

    def _put(self, array: Any, *axes: Any) -> Any:
        assert self.mesh is not None
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, P(*axes)))


ALONE = Placing()
"""One device."""
