# SPDX-License-Identifier: Apache-2.0
"""Where a quantization's arrays lie: on one device, or over a mesh. The code that computes does not know."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from awq_jax._plan import GroupPlan, LayerPlan
from awq_jax.families import Linear
from awq_jax.placing import Placing, axes_of_weight

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

    Samples are spread over ``data`` and ``fsdp``, outputs of a weight over ``model``, its inputs over ``fsdp``. Within
    one process the outputs are spread over ``data`` too: a search looks at each output by itself, so devices that see
    other samples share it, and only the forward pass gathers the weights (`Placing`). While it lasts, outputs are
    spread over ``fsdp`` as well and inputs are whole. An axis of a weight that does not divide evenly stays whole, and
    a vector is whole. Shapes (`jax.ShapeDtypeStruct`) are placed like arrays.

    Of several processes each puts its own part of what all of them hold; ``data`` is the outermost axis, so that it
    runs over processes first and weights are spread within one, where links are fast.

    Args:
      axes: name -> size, from `AXES`; None or empty is one device, or with several processes ``data`` over them and
        ``model`` over the devices of each.
      devices: to choose from; None takes all.

    Raises:
      ValueError: more devices than there are, or not as many of each process.
    """

    def __init__(self, axes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> None:
        devices = jax.devices() if devices is None else devices
        owners = sorted({device.process_index for device in devices})
        if not axes and len(owners) > 1:
            axes = {"data": len(owners), "model": len(devices) // len(owners)}
        self._sizes = {name: (axes or {}).get(name, 1) for name in AXES}
        self._processes, self._kind = len(owners), devices[0].device_kind
        self._mesh = None
        if axes:
            chosen = np.array(_chosen(devices, owners, self._sizes)).reshape(*self._sizes.values())
            self._mesh = jax.sharding.Mesh(chosen, AXES, axis_types=(AxisType.Auto,) * len(AXES))
            self._replicate = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self._mesh, P()))

    def __str__(self) -> str:
        spread = f" over {self._processes} processes" if self._processes > 1 else ""
        return f"{self._kind} {_words(self._sizes) if self._mesh else 'x1'}{spread}"

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

    def _put(self, array: Any, *spec: Any) -> Any:
        if self._mesh is None:
            return array if isinstance(array, jax.ShapeDtypeStruct) else jnp.asarray(array)
        place = NamedSharding(self._mesh, P(*map(self._used, spec)))
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)
        if isinstance(array, jax.Array) and array.sharding.is_equivalent_to(place, array.ndim):
            return array
        if place.is_fully_addressable:
            return jax.device_put(array, place)
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return jax.jit(lambda whole: whole, out_shardings=place)(array)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, place, lambda part: host[part])

    def _used(self, axes: Any) -> Any:
        """Mesh axes that have more than one device, as the compiler names them: others would compile anew."""
        names = (axes,) if isinstance(axes, str) else axes or ()
        used = tuple(name for name in names if self._sizes[name] > 1)
        return used if len(used) > 1 else used[0] if used else None

    def activations(self, array: Any) -> Any:
        """``[chunks, b, ...]``, spread over b."""
        return self._put(array, None, ("data", "fsdp"))

    def hidden(self, array: Any) -> Any:
        """``[chunks, b, t, d]``, spread over b, and over d as a layer's output comes: one compilation serves all."""
        columns = "model" if array.shape[-1] % self._sizes["model"] == 0 else None
        return self._put(array, None, ("data", "fsdp"), None, columns)

    def fetch(self, tree: Any) -> Any:
        """A tree on the host; with several processes all must ask, and each gets all of it."""
        if self._mesh is not None and self._processes > 1:
            tree = self._replicate(tree)
        return jax.device_get(tree)

    def from_first(self, array: np.ndarray | None, shape: Sequence[int]) -> Any:
        """`hidden` of float32 that only process 0 has; sent by bits, for a sum would lose the sign of zeros."""
        if self._mesh is not None and self._processes > 1:
            whole = np.zeros(shape, np.uint32) if array is None else array.view(np.uint32)
            sent = (np.asarray(multihost_utils.broadcast_one_to_all(chunk)) for chunk in whole)
            array = np.stack(list(sent)).view(np.float32)
        return self.hidden(array)

    def fetch_chunks(self, array: jax.Array) -> np.ndarray:
        """`fetch` of ``[chunks, b, ...]``, one chunk on each device at a time."""
        if self._mesh is None or self._processes == 1:
            return np.asarray(array)
        return np.stack([np.asarray(self._replicate(_chunk(array, index))) for index in range(len(array))])

    def whole(self, tree: Any) -> Any:
        """The same on every device."""
        return jax.tree.map(self._put, tree)

    def layer(self, params: Any) -> Any:
        """One layer's parameters as they are searched: matrices ``[*b, k, n]`` are spread, vectors are not."""
        columns = ("model", "data") if self._processes == 1 else ("model",)
        return jax.tree.map(lambda array: self._put(array, *axes_of_weight(array.shape, self._sizes, columns)), params)

    @property
    def placing(self) -> Placing:
        """The same inside `jax.jit`."""
        return Placing(self._mesh, shared=self._processes == 1 and self._sizes["data"] > 1)


@jax.jit
def _chunk(array: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, index, keepdims=False)


def _chosen(devices: Sequence[Any], owners: Sequence[int], sizes: Mapping[str, int]) -> list[Any]:
    """As many devices as a mesh needs, as many of each process."""
    needed = math.prod(sizes.values())
    each = {owner: [device for device in devices if device.process_index == owner] for owner in owners}
    if needed > len(devices):
        raise ValueError(
            f"a mesh of {needed} devices was asked for ({_words(sizes)}), and there are {len(devices)} (--mesh)."
        )
    if needed % len(owners) or needed // len(owners) > min(map(len, each.values())):
        raise ValueError(
            f"a mesh of {needed} devices ({_words(sizes)}) does not take as many of each of {len(owners)} processes, "
            f"which have {', '.join(str(len(row)) for row in each.values())}. Use a multiple of {len(owners)} (--mesh)."
        )
    return [device for owner in owners for device in each[owner][: needed // len(owners)]]


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
