# SPDX-License-Identifier: Apache-2.0
"""Native checkpoints: any parameter tree with quantized weights, kept by orbax without loss.

Every width, scale dtype and leading axis is kept as it is in memory; other formats narrow. A checkpoint is a directory
with ``params/`` (orbax) and a manifest of checksums, the recipe, and which subtrees are quantized weights.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from awq_jax._manifest import MANIFEST, make_manifest, read_manifest, tree_digests, verify
from awq_jax._publish import INCOMPLETE, published, write_bytes
from awq_jax._qtensor import QTensor
from awq_jax._tree import get, leaves, put

__all__ = ["load", "read_part", "save", "write_part"]


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp  # half a second that other users of this package need not wait for

    if jax.process_count() == 1:
        return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    # The others are not here: whoever writes or reads does so alone, and orbax must not wait for them.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process {jax.process_index()}",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _plain(node: Any) -> Any:
    """The tree with numpy leaves, a quantized weight as a dict of its arrays."""
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, QTensor):
        arrays = {"packed": node.packed, "scale": node.scale, "zero": node.zero}
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
        }
    array = np.asarray(leaf)
    return {"nbytes": array.nbytes, "dtype": str(array.dtype)}


def write_part(directory: Path, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Write a nested dict of arrays and `QTensor` leaves as one orbax checkpoint.

    Args:
      directory: to create.
      tree: nested dict with text keys.

    Returns:
      What `read_part` needs to know, as JSON values.

    Raises:
      OSError: orbax could not write it.
    """
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(directory.resolve(), _plain(tree))
    except Exception as error:  # orbax and tensorstore raise what they like
        raise OSError(f"cannot write {directory.name!r} of {directory.parent}: {error}") from error
    described = {path: _describe(leaf) for path, leaf in leaves(tree)}
    return {"nbytes": sum(kept["nbytes"] for kept in described.values()), "leaves": described}


def read_part(directory: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `write_part`; leaves are numpy arrays.

    Raises:
      ValueError: the files are damaged, or do not hold what the description says.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is missing; copy the checkpoint again.")
    try:
        with _checkpointer() as checkpointer:
            tree = checkpointer.restore(directory.resolve())
        for path, kept in description["leaves"].items():
            if "bits" in kept:
                tree = put(tree, path, QTensor(**get(tree, path), bits=int(kept["bits"])))
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
      FileExistsError: ``out`` exists.
      OSError: it can't be written.
    """
    with published(out, overwrite=overwrite) as work:
        part = write_part(work / "params", params)
        files = tree_digests(work, skip=(INCOMPLETE,))
        manifest = make_manifest(files, {}, recipe, parts={"params": part})
        write_bytes(work / MANIFEST, json.dumps(manifest, indent=2).encode())


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
