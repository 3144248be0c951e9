# SPDX-License-Identifier: Apache-2.0
"""Where a quantization's arrays lie: on one device, or over a mesh. The code that computes does not know."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from awq_jax._plan import GroupPlan, LayerPlan
from awq_jax.families import Linear

__all__ = ["AXES", "Layout", "parse_mesh", "refuse_straddling"]

AXES = ("data", "fsdp", "model")
_SIZES = (256, 128, 64, 32, 16)


def parse_mesh(text: str) -> dict[str, int]:
    """Axis sizes from the command line.

    Raises:
      ValueError: an unknown or repeated axis, or a size that is no number from 1 up.

    >>> parse_mesh("data=2,model=4")
    {'data': 2, 'model': 4}
    """
    found: dict[str, int] = {}
    for item in text.split(","):
        name, _, size = item.partition("=")
        if name not in AXES or name in found or not re.fullmatch("[1-9][0-9]{0,5}", size):
            raise ValueError(f"mesh {text!r}: expected axes of {', '.join(AXES)} with sizes, such as data=2,model=4.")
        found[name] = int(size)
    return found


class Layout:
    """Puts arrays on the devices of a mesh; without one, on the default device.

    Samples are spread over ``data`` and ``fsdp``, outputs of a weight over ``model``, its inputs over ``fsdp``. An axis
    of a weight that does not divide evenly stays whole.

    Args:
      axes: name -> size, from `AXES`; None or empty is one device.

    Raises:
      ValueError: more devices than there are.
    """

    def __init__(self, axes: Mapping[str, int] | None = None) -> None:
        sizes = {name: (axes or {}).get(name, 1) for name in AXES}
        needed, there = math.prod(sizes.values()), len(jax.devices())
        if needed > there:
            raise ValueError(
                f"a mesh of {needed} devices was asked for ({_words(sizes)}), and there are {there} (--mesh)."
            )
        self._mesh = None
        if axes:
            kinds = (AxisType.Auto,) * len(AXES)
            devices = np.array(jax.devices()[:needed]).reshape(*sizes.values())
            self._mesh = jax.sharding.Mesh(devices, AXES, axis_types=kinds)
        self._sizes = sizes

    def __str__(self) -> str:
        return f"{jax.devices()[0].device_kind} {_words(self._sizes) if self._mesh else 'x1'}"

    def refuse_batch(self, batch: int) -> None:
        """Refuse samples that do not divide over the devices.

        Raises:
          ValueError: with a batch that would.
        """
        over = self._sizes["data"] * self._sizes["fsdp"]
        if batch % over:
            raise ValueError(
                f"batches of {batch} samples do not spread over {over} devices ({_words(self._sizes)}). "
                f"Use --batch {-(-batch // over) * over}, or fewer devices."
            )

    def _put(self, array: Any, *spec: Any) -> jax.Array:
        if self._mesh is None:
            return jnp.asarray(array)
        return jax.device_put(array, NamedSharding(self._mesh, P(*spec)))

    def activations(self, array: Any) -> jax.Array:
        """``[chunks, b, ...]``, spread over b."""
        return self._put(array, None, ("data", "fsdp"))

    def whole(self, tree: Any) -> Any:
        """The same on every device."""
        return jax.tree.map(self._put, tree)

    def layer(self, params: Any) -> Any:
        """One layer's parameters: matrices ``[*b, k, n]`` are spread, vectors are not."""
        return jax.tree.map(self._weight, params)

    def _weight(self, array: Any) -> jax.Array:
        if array.ndim < 2:
            return self._put(array)
        *b, k, n = array.shape
        rows = "fsdp" if k % self._sizes["fsdp"] == 0 else None
        columns = "model" if n % self._sizes["model"] == 0 else None
        return self._put(array, *(None for _ in b), rows, columns)


def _words(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "one"


def _is_cut_by_rows(group: GroupPlan, path: str) -> bool:
    """Whether tensor parallel serving cuts a weight along its inputs, which are the outputs of one cut by columns."""
    return isinstance(group.group.producer, Linear) or path.rpartition("/")[2] in ("o", "down")


def refuse_straddling(plans: Sequence[LayerPlan], shapes: Mapping[str, tuple[int, ...]], serve_tp: int) -> None:
    """Refuse groups that would lie on two devices of the mesh that is to serve the model.

    Args:
      plans: of the layers.
      shapes: of the kernels, by path relative to a layer.
      serve_tp: devices that a weight will be cut over.

    Raises:
      ValueError: naming a weight, and the group sizes that work for all.
    """
    if serve_tp < 1:
        raise ValueError(f"serve_tp is {serve_tp}; it must be at least 1 (--serve-tp).")
    rows = {
        (path, spec.rows_per_group(shapes[path][-2], path), index)
        for index, plan in enumerate(plans)
        for group in plan.groups
        for path, spec, _ in group.quantized
        if _is_cut_by_rows(group, path)
    }
    widths = {shapes[path][-2] for path, _, _ in rows}
    for path, g, index in sorted(rows, key=lambda row: (row[2], row[0])):
        k = shapes[path][-2]
        if k % serve_tp or (k // serve_tp) % g:
            fits = [str(size) for size in _SIZES if all(width % (serve_tp * size) == 0 for width in widths)]
            remedy = f"group sizes that work: {', '.join(fits)} (--group-size)" if fits else "no group size works"
            raise ValueError(
                f"groups of {g} rows of layers/{index}/{path} straddle devices: {k} rows over {serve_tp} devices "
                f"are {k / serve_tp:g} each. With --serve-tp {serve_tp} {remedy}; or serve on fewer devices."
            )
