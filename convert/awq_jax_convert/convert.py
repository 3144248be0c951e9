# SPDX-License-Identifier: Apache-2.0
"""A checkpoint directory in one format, written in another: codes and zeros are carried over, never computed again."""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from awq_jax._manifest import MANIFEST, read_manifest
from awq_jax._qtensor import QTensor
from awq_jax._spec import QuantSpec
from awq_jax._tree import leaves
from awq_jax_convert.fit import refuse_unwritable
from awq_jax_convert.formats import FORMATS, open_checkpoint, open_writer, refuse_misfit
from awq_jax_convert.hf_config import FamilyChoice
from awq_jax_convert.readers import unread
from awq_jax_convert.scheme import Scheme
from awq_jax_convert.sink import narrowed, refuse_overlap
from awq_jax_convert.source import Checkpoint
from awq_jax_convert.stored import dequantized

__all__ = ["DTYPES", "TARGETS", "Conversion", "convert_checkpoint"]

TARGETS = (*FORMATS, "dense")
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
_REPORT = "awq_jax_report.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was done.

    Attributes:
      source: format of the source.
      target: format written.
      dtype: of all tensors but codes and zeros; None where each kept its own.
      quantized: how many weights carry codes in the target.
      dequantized: how many gave theirs up.
      bytes_before: of the source's tensors.
      bytes_after: of the target's.
      seconds: wall time.
      warnings: what a user should know.
    """

    source: str
    target: str
    dtype: str | None
    quantized: int
    dequantized: int
    bytes_before: int
    bytes_after: int
    seconds: float
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)


def _carried(node: Any, path: str, to: str, dtype: np.dtype | None) -> Any:
    """A tree with what the target can't hold changed: codes to floats, scales to the dtype that was asked for."""
    if isinstance(node, Mapping):
        return {key: _carried(value, f"{path}/{key}" if path else key, to, dtype) for key, value in node.items()}
    if not isinstance(node, QTensor):
        return node
    if to == "dense":
        return dequantized(node)
    if dtype is None:
        return node
    scale = narrowed(f"{path} (its scales)", node.scale, dtype)
    if not (scale > 0).all():
        raise ValueError(f"scales of {path!r} become zero in {dtype}. Leave --dtype out, or take float32.")
    return dataclasses.replace(node, scale=scale)


def _schemes(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Number formats by path, group sizes as numbers unless every weight has one group.

    Zeros of 8 everywhere are no other format: they are written where another weight needs them.
    """
    found = {path: scheme for path in checkpoint.paths() if (scheme := checkpoint.scheme(path))}
    rows = {path: checkpoint.shape(path)[-2] for path in found}
    whole = all(scheme.rows(rows[path]) == rows[path] for path, scheme in found.items())
    named = any(scheme.group_size == -1 for scheme in found.values()) or len(set(rows.values())) > 1
    int8 = {path for path, scheme in found.items() if scheme.activations != "float"}  # has no groups
    size = lambda path: -1 if path in int8 or (whole and named) else found[path].rows(rows[path])
    symmetric = all(scheme.symmetric for scheme in found.values())
    return {path: Scheme(scheme.bits, size(path), symmetric, scheme.activations) for path, scheme in found.items()}


def _refuse(checkpoint: Checkpoint, to: str, schemes: Mapping[str, Scheme]) -> None:
    if to not in TARGETS:
        raise ValueError(f"format {to!r} is not written; these are: {', '.join(TARGETS)}.")
    if to == "dense":
        return
    if not schemes and to != "native":
        raise ValueError(
            f"{checkpoint.path} is not quantized, so there are no codes to write as {to}. Use `awq-jax quantize`."
        )
    linears = (path for path in checkpoint.paths() if path.startswith("layers/") and path.endswith("/kernel"))
    refuse_unwritable(to, checkpoint, {path: schemes.get(path) for path in linears})
    used = set(schemes.values())
    kept = ("bits", "group_size", "symmetric", "activations")
    refuse_misfit(to, [QuantSpec(**{name: getattr(scheme, name) for name in kept}) for scheme in used])


def _refuse_without_codes(layer: Mapping[str, Any], index: int, to: str, schemes: Mapping[str, Scheme]) -> None:
    """A weight whose input factors nothing before it can take is read as floats."""
    named = ((f"layers/{index}/{path}", leaf) for path, leaf in leaves(layer))
    lost = [path for path, leaf in named if path in schemes and not isinstance(leaf, QTensor)]
    if lost and to != "dense":
        raise ValueError(
            f"{len(lost)} weights of layer {index}, e.g. {lost[0]!r}, have factors for their inputs (pre_quant_scale) "
            f"that nothing before them can take, and {to} has no place for these. Use --to dense."
        )


def _expected_bytes(checkpoint: Checkpoint, to: str, dtype: np.dtype | None, schemes: Mapping[str, Scheme]) -> int:
    total = 0
    for path in checkpoint.paths():
        if path in schemes and to != "dense":
            total += checkpoint.stored_nbytes(path)
        else:
            total += math.prod(checkpoint.shape(path)) * (dtype or checkpoint.stored_dtype(path)).itemsize
    return total


def _recipe(checkpoint: Checkpoint, to: str, dtype: np.dtype | None) -> dict[str, Any]:
    """The source's own recipe, if we wrote it, and this step."""
    kept = read_manifest(checkpoint.path).get("recipe") if (checkpoint.path / MANIFEST).is_file() else None
    step = {"from": checkpoint.format, "to": to, "dtype": str(dtype) if dtype else None}
    kept = kept if isinstance(kept, dict) else {}
    before = kept.get("conversions")
    return {**kept, "conversions": [*(before if isinstance(before, list) else []), step]}


def _warnings(
    checkpoint: Checkpoint, to: str, dtype: np.dtype | None, scales: set[str], schemes: Mapping[str, Scheme]
) -> tuple[str, ...]:
    """What is no longer as it was, or will not be once another program loads it.

    compressed-tensors' loaders keep scales in the model's dtype, whatever the file has.
    """
    rounded = sum(scheme.activations != "float" for scheme in schemes.values())
    if to == "dense" and rounded:
        return (f"{rounded} weights multiplied int8 activations; dense ones multiply them as they come",)
    model = str(dtype or checkpoint.hf.dtype)
    lost = sorted(scale for scale in scales if scale != model and (model, scale) != ("float32", "float16"))
    if to != "compressed-tensors" or not lost or (model, lost) == ("float32", ["bfloat16"]):
        return ()
    return (
        f"scales are {', '.join(lost)} and config.json says {model}: loaders that follow it round the scales. Load "
        f"with dtype={lost[0]}, or convert with --dtype {lost[0]}",
    )


def convert_checkpoint(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str,
    dtype: str | None = None,
    family: FamilyChoice = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write a checkpoint directory in another format, one layer in memory at a time.

    Args:
      src: a directory of any format that is read.
      out: the directory to create.
      to: one of `TARGETS`.
      dtype: of everything but codes and zeros, scales too; None keeps each as it is, and takes float32, which holds
        every code times its scale, for weights that are written dense.
      family: a table, the name of one or its TOML file, instead of the one that serves config.json's architecture.
      overwrite: replace ``out`` if awq-jax wrote it.
      progress: called with the number of layers done and of all.

    Returns:
      What was done.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: bad input, or what the target can't hold; named.
    """
    begun = time.perf_counter()
    checkpoint = open_checkpoint(src, family)
    refuse_overlap(checkpoint.path, Path(out))
    schemes = _schemes(checkpoint)
    _refuse(checkpoint, to, schemes)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not written; these are: {', '.join(DTYPES)}.")
    kind = DTYPES[dtype] if dtype else DTYPES["float32"] if to == "dense" and schemes else None
    writer = open_writer(
        to,
        checkpoint,
        out,
        group_size=next((scheme.group_size for scheme in schemes.values()), 128),
        symmetric=any(scheme.symmetric for scheme in schemes.values()),  # as one, as all
        activations=next((scheme.activations for scheme in schemes.values()), "float"),
        dtype=kind,
        recipe=_recipe(checkpoint, to, kind),
        overwrite=overwrite,
        expected_bytes=_expected_bytes(checkpoint, to, kind, schemes),
    )
    scales: set[str] = set()
    with writer:
        writer.write_stem(_carried(checkpoint.stem(None), "", to, kind))
        for index in range(checkpoint.num_layers):
            found = checkpoint.layer(index, None)
            _refuse_without_codes(found, index, to, schemes)
            layer = _carried(found, f"layers/{index}", to, kind)
            scales |= {str(leaf.scale.dtype) for _, leaf in leaves(layer) if isinstance(leaf, QTensor)}
            writer.write_layer(index, layer)
            if progress:
                progress(index + 1, checkpoint.num_layers)
        if (checkpoint.path / MANIFEST).is_file() and (checkpoint.path / _REPORT).is_file():
            writer.copy_file(_REPORT)
    return Conversion(
        source=checkpoint.format,
        target=to,
        dtype=str(kind) if kind else None,
        quantized=0 if to == "dense" else len(schemes),
        dequantized=len(schemes) if to == "dense" else 0,
        bytes_before=checkpoint.nbytes,
        bytes_after=writer.nbytes,
        seconds=time.perf_counter() - begun,
        warnings=(*_warnings(checkpoint, to, kind, scales, schemes), *unread(to, checkpoint.family.name)),
    )
