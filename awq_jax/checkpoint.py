# SPDX-License-Identifier: Apache-2.0
"""Native checkpoints: any parameter tree with quantized weights, kept by orbax without loss.

Every width, scale dtype and leading axis is kept as it is in memory; other formats narrow. A checkpoint is a directory
with ``params/`` (orbax) and a manifest of checksums, the recipe, and which subtrees are quantized weights.
"""

import errno
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from awq_jax._manifest import read_manifest, verify
from awq_jax._publish import published, write_manifest
from awq_jax._qtensor import QTensor, in_rows
from awq_jax._tree import get, leaves, put

__all__ = ["load", "read_part", "save", "write_part"]

_AT_ONCE = 256 << 20  # bytes that nobody is asked to account for
_RATIO = 100  # of what is claimed to what is on the disk; codes hardly compress


def _checkpointer(together: str = "") -> Any:
    """Orbax for this process alone or, under a name that all give, for all of them."""
    import orbax.checkpoint as ocp  # half a second that other users of this package need not wait for

    if jax.process_count() == 1:
        return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    here, everyone = jax.process_index(), set(range(jax.process_count()))
    # Processes are named in either case: orbax then waits for these alone, and with a limit of time.
    options = ocp.options.MultiprocessingOptions(
        primary_host=0 if together else here,
        active_processes=everyone if together else {here},
        barrier_sync_key_prefix=together or f"process {here}",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _spread(array: np.ndarray) -> Any:
    """A matrix that all processes have, cut so that each writes one part of it; process 0 writes what can't be cut."""
    count = jax.process_count()
    fits = [axis for axis, size in enumerate(array.shape) if size and size % count == 0]
    if array.ndim < 2 or not fits or array.dtype.itemsize > 4:  # jax narrows the wider dtypes
        return array
    firsts: dict[int, Any] = {}
    for device in jax.devices():
        firsts.setdefault(device.process_index, device)
    mesh = jax.sharding.Mesh(np.array([firsts[process] for process in range(count)]), ("process",))
    place = NamedSharding(mesh, P(*[None] * fits[0], "process"))
    return jax.make_array_from_callback(array.shape, place, lambda part: array[part])


def _plain(node: Any) -> Any:
    """The tree with numpy leaves, a quantized weight as a dict of its arrays."""
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, QTensor):
        node = in_rows(node)
        arrays = {"packed": node.packed, "scale": node.scale, "zero": node.zero, "input_scale": node.input_scale}
        return {name: np.asarray(array) for name, array in arrays.items() if array is not None}
    return np.asarray(node)


def _describe(leaf: Any) -> dict[str, Any]:
    """What of a leaf the arrays alone do not say, and what people ask for without opening them."""
    if isinstance(leaf, QTensor):
        return {
            "nbytes": leaf.nbytes,
            "bits": leaf.bits,
            "group_size": leaf.group_size,
            "symmetric": leaf.zero is None,
            **({} if leaf.activations == "float" else {"activations": leaf.activations}),
        }
    array = np.asarray(leaf)
    return {"nbytes": array.nbytes, "dtype": str(array.dtype)}


def write_part(directory: Path, tree: Mapping[str, Any], together: str = "") -> dict[str, Any]:
    """Write a nested dict of arrays and `QTensor` leaves as one orbax checkpoint, and read it back.

    Args:
      directory: to create.
      tree: nested dict with text keys.
      together: where every process of `jax.distributed` calls this with the same tree and a directory that all see, a
        name for the occasion: each then writes its share.

    Returns:
      What `read_part` needs to know, as JSON values.

    Raises:
      OSError: orbax could not write it, or it reads back different.
    """
    plain = _plain(tree)
    try:
        with _checkpointer(together) as checkpointer:
            checkpointer.save(directory.resolve(), jax.tree.map(_spread, plain) if together else plain)
    except Exception as error:  # orbax and tensorstore raise what they like
        raise OSError(f"cannot write {directory.name!r} of {directory.parent}: {error}") from error
    described = {path: _describe(leaf) for path, leaf in leaves(tree)}
    description = {"nbytes": sum(kept["nbytes"] for kept in described.values()), "leaves": described}
    if not together or jax.process_index() == 0:
        _compare(directory, plain, description)
    return description


def _compare(directory: Path, plain: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    found = dict(leaves(_plain(read_part(directory, description))))
    for path, array in leaves(plain):
        same = found[path].dtype == array.dtype and found[path].shape == array.shape
        if not same or found[path].tobytes() != array.tobytes():
            said = f"{path!r} reads back different from what was written; check the disk"
            raise OSError(errno.EIO, said, str(directory))


def _refuse_bloated(directory: Path, stored: Any) -> None:
    """Chunks that are not there count as zeros, so a few bytes can claim any size."""
    claimed = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(stored))
    there = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    if claimed > max(_AT_ONCE, _RATIO * there):
        raise ValueError(f"its arrays claim {claimed} bytes, and there are {there} on the disk")


def read_part(directory: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `write_part`; leaves are numpy arrays.

    Raises:
      ValueError: the files are damaged, or do not hold what the description says.
    """
    import orbax.checkpoint as ocp

    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is missing; copy the checkpoint again.")
    try:
        with _checkpointer() as checkpointer:
            described = checkpointer.metadata(directory.resolve()).item_metadata
            if described is None:
                raise ValueError("its metadata is missing or damaged")
            stored = described.tree
            _refuse_bloated(directory, stored)
            # What several devices wrote would otherwise ask for as many again.
            as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), stored)
            tree = checkpointer.restore(directory.resolve(), restore_args=as_numpy)
        for path, kept in description["leaves"].items():
            if "bits" in kept:
                static = {"bits": int(kept["bits"]), "activations": kept.get("activations", "float")}
                tree = put(tree, path, QTensor(**get(tree, path), **static))
    except Exception as error:
        raise ValueError(f"{directory} cannot be read ({error}); copy the checkpoint again.") from error
    return tree


def save(
    out: str | os.PathLike[str],
    params: Mapping[str, Any],
    *,
    recipe: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Save a parameter tree; the directory appears whole or not at all.

    Args:
      out: directory to create.
      params: nested dict of arrays and `QTensor` leaves.
      recipe: JSON values to keep with it.
      overwrite: replace ``out`` if awq-jax wrote it.

    Raises:
      ValueError: ``params`` is another kind of tree; a list would come back as one array.
      FileExistsError: ``out`` exists.
      OSError: it can't be written.
    """
    _refuse_other_trees(params)
    with published(out, overwrite=overwrite) as work:
        part = write_part(work / "params", params)
        write_manifest(work, recipe, parts={"params": part})


def _refuse_other_trees(node: Any, path: str = "") -> None:
    """Refuse what is not a nested dict of arrays and `QTensor`, before anything is written."""
    where = f"{path!r} of the parameters" if path else "the tree of parameters"
    if isinstance(node, Mapping):
        if not path and not node:
            raise ValueError("the tree of parameters is empty; there is nothing to save.")
        for key, value in node.items():
            if not isinstance(key, str) or not key or "/" in key:
                raise ValueError(f"{where} has the key {key!r}; keys are text without '/'.")
            _refuse_other_trees(value, f"{path}/{key}" if path else key)
    elif not path or not isinstance(node, QTensor | jax.Array | np.ndarray | np.generic | int | float):
        raise ValueError(
            f"{where} is of type {type(node).__name__}; nested dicts of arrays and QTensor are saved. Other trees, "
            "such as those with QKernel leaves, orbax's own checkpointer keeps."
        )


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tree that `save` wrote, with numpy leaves.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it is damaged, of an unknown version, or of another form.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     save(f"{home}/x", {"layer": {"scale": np.ones(2, np.float32)}})
    ...     load(f"{home}/x")
    {'layer': {'scale': array([1., 1.], dtype=float32)}}
    """
    parts = read_manifest(path).get("parts")
    if not isinstance(parts, dict) or "params" not in parts:
        raise ValueError(f"{path} holds no single parameter tree; a quantized model is loaded with load_model.")
    verify(path, "params")  # orbax returns wrong values for some damage to its data files
    return read_part(Path(path) / "params", parts["params"])
