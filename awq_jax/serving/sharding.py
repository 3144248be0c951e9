# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: heads and the MLP's width cut over a mesh axis, each device running the step on its share.

q, k, v, gate, up are cut along n, o and down along k at group boundaries and their products added up by ``psum``; norms
and the embedding are whole everywhere, a head of its own is cut along the vocabulary. Fused weights lie share by share,
``[q0 k0 v0 | q1 k1 v1 | …]``, so that a device's columns are those of its own heads.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from awq_jax._qtensor import QTensor
from awq_jax._tree import leaves, nested
from awq_jax.models import DecoderConfig
from awq_jax.serving.arrange import arranged
from awq_jax.serving.cache import SlotCache
from awq_jax.serving.fuse import fuse_layer
from awq_jax.serving.load import ServingModel, int4_head_of, wide_norms
from awq_jax.serving.steps import Slots, decode, empty_slots, prefill
from awq_jax_convert.formats import open_checkpoint

__all__ = [
    "cut",
    "load_sharded",
    "local_config",
    "padded",
    "shapes_on",
    "sharded_programs",
    "sharded_slots",
    "sharded_step",
]

AXIS = "tp"
_ALONG_N = ("attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up", "lm_head")
_ALONG_K = ("attn/o", "mlp/down")


def local_config(config: DecoderConfig, shares: int) -> DecoderConfig:
    """The config of one share.

    Raises:
      ValueError: something does not divide, or mixes heads in a way that can't be cut.
    """
    if config.num_experts or config.positions == "alibi" or config.qk_norm == "all":
        raise ValueError("mixtures of experts, ALiBi and norms over all heads are not cut over devices here.")
    for name in ("num_heads", "num_kv_heads", "intermediate_size"):
        if getattr(config, name) % shares:
            raise ValueError(f"{name}={getattr(config, name)} can't be cut into {shares} equal shares.")
    local = {name: getattr(config, name) // shares for name in ("num_heads", "num_kv_heads", "intermediate_size")}
    return dataclasses.replace(config, **local)


def load_sharded(path: str | os.PathLike[str], mesh: Mesh, *, dtype: Any = jnp.float32, int4_head: bool = False) -> Any:
    """Read a checkpoint onto a mesh with an axis "tp", a layer at a time; no device holds more than its share.

    Args:
      path: of the directory.
      mesh: its axis "tp" says how many shares.
      dtype: of dense parameters.
      int4_head: as in `awq_jax.serving.load.load`.

    Returns:
      `ServingModel` whose params lie on the mesh.

    Raises:
      ValueError: the model can't be cut into that many shares; the message says which weight.
    """
    checkpoint = open_checkpoint(path)
    shares = mesh.shape[AXIS]
    local_config(checkpoint.config, shares)
    stem = wide_norms(checkpoint.stem(dtype))
    if int4_head:
        stem["lm_head"] = {"kernel": int4_head_of(checkpoint.config, stem)}
    if "lm_head" in stem:
        stem["lm_head"] = {"kernel": padded(stem["lm_head"]["kernel"], shares)}
    place = lambda tree: _placed(tree, mesh, dtype)
    layers = {str(i): place(wide_norms(checkpoint.layer(i, dtype))) for i in range(checkpoint.num_layers)}
    return ServingModel(checkpoint=checkpoint, params={**place(stem), "layers": layers})


def padded(head: Any, shares: int) -> Any:
    """An output head with columns of zeros behind, so that each share has a multiple of 512: what kernels take."""

    def widen(leaf: Any) -> Any:
        return np.pad(np.asarray(leaf), [(0, 0)] * (leaf.ndim - 1) + [(0, -leaf.shape[-1] % (512 * shares))])

    return jax.tree.map(widen, head)


def _placed(tree: Mapping[str, Any], mesh: Mesh, dtype: Any) -> dict[str, Any]:
    """A part of the tree on the mesh: each share is cut and fused on the host, then sent to its devices alone."""
    shares, parts = mesh.shape[AXIS], []
    firsts = np.moveaxis(mesh.devices, mesh.axis_names.index(AXIS), 0).reshape(shares, -1)[:, 0]
    for index, device in enumerate(firsts):
        with jax.default_device(device):
            parts.append(arranged(fuse_layer(_share(tree, index, shares)), dtype))
    return jax.tree.map(functools.partial(_on_mesh, mesh), _specs(parts[0]), *parts, is_leaf=lambda x: isinstance(x, P))


def _on_mesh(mesh: Mesh, spec: P, *parts: Any) -> jax.Array:
    """One array from what each share has of it."""
    sharding = NamedSharding(mesh, spec)
    shape = list(parts[0].shape)
    for axis, name in enumerate(spec):
        shape[axis] *= len(parts) if name == AXIS else 1
    share_of = {device: index[list(mesh.axis_names).index(AXIS)] for index, device in np.ndenumerate(mesh.devices)}
    pieces = [jax.device_put(parts[share_of[device]], device) for device in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, pieces)


def _share(tree: Mapping[str, Any], index: int, shares: int) -> dict[str, Any]:
    """What one share keeps of a tree that is not fused."""
    return nested((path, cut(path, leaf, index, shares)) for path, leaf in leaves(tree))


def cut(path: str, leaf: Any, index: int, shares: int) -> Any:
    """One share of a parameter of a layer or of the stem, of all of it where it is not cut.

    Raises:
      ValueError: it does not divide; of a quantized weight cut along k the groups must.
    """
    module = path.rpartition("/")[0]
    along_k = module in _ALONG_K and path.endswith("/kernel")
    if not along_k and module not in _ALONG_N:
        return leaf

    def part(array: Any) -> Any:
        axis = array.ndim - 2 if along_k else array.ndim - 1
        if array.shape[axis] % shares:
            what = "groups" if along_k and isinstance(leaf, QTensor) else "rows" if along_k else "columns"
            raise ValueError(
                f"{path} has {array.shape[axis]} {what}, which {shares} devices can't share evenly; use a smaller "
                "group size when quantizing, or fewer devices."
            )
        size = array.shape[axis] // shares
        at = [slice(None)] * array.ndim
        at[axis] = slice(index * size, (index + 1) * size)
        return np.ascontiguousarray(array[tuple(at)])

    return jax.tree.map(part, leaf)


def _specs(tree: Mapping[str, Any]) -> Any:
    """Where each leaf of a fused tree is cut."""
    cut_n = (*_ALONG_N, "attn/qkv", "mlp/gate_up")
    tiled = lambda a: a.ndim == 4  # codes in tile order have n first, k second
    along_n = lambda a: P(AXIS) if tiled(a) else P(*[None] * (a.ndim - 1), AXIS)
    along_k = lambda a: P(None, AXIS) if tiled(a) else P(AXIS, None)

    def spec(path: str, leaf: Any) -> Any:
        module, _, name = path.rpartition("/")
        module = "/".join(module.split("/")[-2:]) if module.startswith("layers/") else module
        if module in cut_n:
            return jax.tree.map(along_n, leaf)
        if module in _ALONG_K and name == "kernel":
            return jax.tree.map(along_k, leaf)
        return jax.tree.map(lambda a: P(), leaf)

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Mapping):
            return {key: walk(child, f"{path}/{key}" if path else key) for key, child in node.items()}
        return spec(path, node)

    return walk(tree, "")


def _slot_specs(slots: Slots) -> Any:
    """Each share keeps its own heads' rows of keys and values, and their scales; all else is whole."""
    of_held = lambda held: jax.tree.map(lambda leaf: P(None, AXIS) if leaf.shape[1] > 1 else P(None, None, AXIS), held)
    cache = slots.cache
    held = SlotCache(k=tuple(map(of_held, cache.k)), v=tuple(map(of_held, cache.v)), lengths=P())
    return Slots(cache=held, token=P(), start=jax.tree.map(lambda _: P(), slots.start))


def sharded_slots(config: DecoderConfig, mesh: Mesh, batch: int, max_len: int, *, dtype: Any, stops: int = 8) -> Slots:
    """`awq_jax.serving.steps.empty_slots` on a mesh."""
    make = functools.partial(empty_slots, config, batch, max_len, dtype=dtype, stops=stops)
    specs = _slot_specs(jax.eval_shape(make))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
    return jax.jit(make, out_shardings=shardings)()


def sharded_step(config: DecoderConfig, mesh: Mesh, step: Callable[..., Any]) -> Callable[..., Any]:
    """``step(local config, params, slots, *rest, axis=)`` over a mesh, each device on its share."""
    local = local_config(config, mesh.shape[AXIS])

    def run(params: Any, slots: Slots, *rest: Any) -> Any:
        held = _slot_specs(slots)
        specs = (_specs(params), held, *jax.tree.map(lambda _: P(), rest))
        inside = functools.partial(step, local, axis=AXIS)
        return jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=(held, P()), check_vma=False)(
            params, slots, *rest
        )

    return run


def shapes_on(mesh: Mesh, params: Any, slots: Slots) -> tuple[Any, Any]:
    """Shapes of parameters and slots, each with its place on a mesh."""
    place = lambda spec, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
    over = functools.partial(jax.tree.map, place, is_leaf=lambda x: isinstance(x, P))
    return over(_specs(params), params), over(_slot_specs(slots), slots)


def sharded_programs(config: DecoderConfig, mesh: Mesh) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(prefill, decode) over a mesh, for `Engine`: each device runs the step on its share inside `jax.shard_map`."""

    def go_on(params: Any, slots: Slots, *, steps: int, span: int | None = None) -> Any:
        return sharded_step(config, mesh, functools.partial(decode, steps=steps, span=span))(params, slots)

    return (
        jax.jit(sharded_step(config, mesh, prefill), donate_argnums=1),
        jax.jit(go_on, donate_argnums=1, static_argnames=("steps", "span")),
    )
