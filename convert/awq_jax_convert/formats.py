# SPDX-License-Identifier: Apache-2.0
"""Formats by name: which reader opens a directory, which writer makes one."""

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from awq_jax._spec import QuantSpec
from awq_jax_convert.autoawq import AutoAWQ
from awq_jax_convert.compressed_tensors import CompressedTensors
from awq_jax_convert.fit import NATIVE
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.hf_config import FamilyChoice
from awq_jax_convert.hf_writer import HFWriter
from awq_jax_convert.int_quantized import IntQuantized
from awq_jax_convert.native import NativeCheckpoint, is_native
from awq_jax_convert.native_writer import NativeFollower, NativeWriter
from awq_jax_convert.sink import ModelWriter
from awq_jax_convert.source import Checkpoint

__all__ = ["FORMATS", "open_checkpoint", "open_follower", "open_writer", "refuse_misfit", "unsaved"]

FORMATS = ("autoawq", "compressed-tensors", "native")


def open_checkpoint(path: str | os.PathLike[str], family: FamilyChoice = None) -> Checkpoint:
    """Open a checkpoint directory of any kind that is read here.

    Args:
      path: of the directory.
      family: a table, the name of one or its TOML file, instead of the one that serves config.json's architecture.

    Raises:
      FileNotFoundError: no such directory, or a file of it is missing.
      ValueError: anything in it that is not understood; each message names it.
    """
    return (NativeCheckpoint if is_native(path) else HFCheckpoint).open(path, family)


def _refuse_for_autoawq(specs: Collection[QuantSpec]) -> None:
    for spec in specs:
        if spec.bits != 4:
            raise ValueError(
                f"AutoAWQ files hold 4 bits, not {spec.bits}. Write "
                f"{'' if spec.bits == 3 else 'compressed-tensors or '}the native format {NATIVE}."
            )
        if spec.scale_dtype != "float16":
            raise ValueError(
                f"AutoAWQ files hold float16 scales, not {spec.scale_dtype}. Write compressed-tensors or the native "
                f"format {NATIVE}."
            )
    sizes = sorted({spec.group_size for spec in specs})
    if len(sizes) > 1:
        raise ValueError(
            f"an AutoAWQ checkpoint has one group size, the overrides ask for {sizes}. Use one, or write "
            f"compressed-tensors or the native format {NATIVE}."
        )


def _refuse_for_compressed_tensors(specs: Collection[QuantSpec]) -> None:
    if len({spec.activations == "float" for spec in specs}) > 1:
        raise ValueError(
            "a compressed-tensors checkpoint is packed words or, with int8 activations, bytes: every quantized weight "
            f"must have int8 activations, or none. Write the native format {NATIVE}."
        )
    if any(spec.bits == 3 for spec in specs):
        raise ValueError(
            "compressed-tensors has two layouts for 3 bits and its files don't say which. Write the native format "
            f"{NATIVE}."
        )
    if len({spec.group_size == -1 for spec in specs}) > 1 or len({spec.symmetric for spec in specs}) > 1:
        raise ValueError(
            "compressed-tensors is written with groups or with whole columns, with zeros or without, not mixed. Write "
            f"the native format {NATIVE}."
        )


def unsaved(format: str, specs: Iterable[QuantSpec]) -> tuple[str, ...]:
    """A warning where fewer bits make no smaller directory, else nothing.

    >>> unsaved("native", [QuantSpec(bits=4)]), len(unsaved("native", [QuantSpec(bits=3)]))
    ((), 1)
    """
    widths = sorted({spec.bits for spec in specs} & {2, 3})
    if format != "native" or not widths:
        return ()
    said = " and ".join(map(str, widths))
    return (
        f"codes of {said} bits take the room of 4 in the native format and in memory, so nothing is saved by them: "
        "they show what fewer bits cost. With 4 instead the directory is as large and the model better",
    )


def refuse_misfit(format: str, specs: Iterable[QuantSpec]) -> None:
    """Refuse number formats that a file format cannot hold, before any work.

    Args:
      format: one of `FORMATS`.
      specs: of the weights that are to be quantized.

    Raises:
      ValueError: saying what would fit.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not written; these are: {', '.join(FORMATS)}.")
    if format == "autoawq":
        _refuse_for_autoawq(set(specs))
    elif format == "compressed-tensors":
        _refuse_for_compressed_tensors(set(specs))


def open_writer(
    format: str,
    source: Checkpoint,
    out: str | os.PathLike[str],
    *,
    group_size: int,
    symmetric: bool = False,
    activations: str = "float",
    dtype: np.dtype | None = None,
    recipe: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    expected_bytes: int = 0,
) -> ModelWriter:
    """The writer of a format; a context manager.

    Args:
      format: one of `FORMATS`, or "dense".
      source: the checkpoint that the new one is made from.
      out: the directory to create.
      group_size: of the quantized weights; formats that have one for a whole checkpoint say it in the config.
      symmetric: no quantized weight has zeros; a format that can then leaves them out.
      activations: of the quantized weights, as in `QuantSpec`; int8 ones are another form of compressed-tensors.
      dtype: of dense parameters; None keeps each as it is in the source.
      recipe: JSON values that the manifest keeps.
      overwrite: replace ``out`` if awq-jax wrote it.
      expected_bytes: refuse at once if the disk has less room.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "recipe": recipe,
        "overwrite": overwrite,
        "expected_bytes": expected_bytes,
    }
    if format == "native":
        return NativeWriter(source, out, **options)
    packed = CompressedTensors(group_size=group_size, symmetric=symmetric)
    codecs = {
        "autoawq": AutoAWQ(group_size),
        "compressed-tensors": packed if activations == "float" else IntQuantized(),
        "dense": None,
    }
    return HFWriter(source, out, codec=codecs[format], **options)


def open_follower(format: str, source: Checkpoint, out: str | os.PathLike[str]) -> ModelWriter | None:
    """What the processes beside the one that writes have, where all may write a format; see `ModelWriter.share`."""
    return NativeFollower(source, out) if format == "native" else None
