# SPDX-License-Identifier: Apache-2.0
"""Formats by name: which reader opens a directory, which writer makes one."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from awq_jax._spec import QuantSpec
from awq_jax_convert.autoawq import AutoAWQ
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.hf_writer import HFWriter
from awq_jax_convert.native import NativeCheckpoint, is_native
from awq_jax_convert.native_writer import NativeWriter
from awq_jax_convert.sink import ModelWriter
from awq_jax_convert.source import Checkpoint

__all__ = ["FORMATS", "open_checkpoint", "open_writer", "refuse_misfit"]

FORMATS = ("autoawq", "native")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint directory of any kind that is read here.

    Raises:
      FileNotFoundError: no such directory, or a file of it is missing.
      ValueError: anything in it that is not understood; each message names it.
    """
    return NativeCheckpoint.open(path) if is_native(path) else HFCheckpoint.open(path)


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
    if format != "autoawq":
        return
    specs = set(specs)
    for spec in specs:
        if spec.bits != 4:
            raise ValueError(f"AutoAWQ files hold 4 bits, not {spec.bits}. Write the native format (--format native).")
        if spec.scale_dtype != "float16":
            raise ValueError(
                f"AutoAWQ files hold float16 scales, not {spec.scale_dtype}. Write the native format (--format native)."
            )
    sizes = sorted({spec.group_size for spec in specs})
    if len(sizes) > 1:
        raise ValueError(
            f"an AutoAWQ checkpoint has one group size, the overrides ask for {sizes}. Use one, or write the native "
            "format (--format native)."
        )


def open_writer(
    format: str,
    source: HFCheckpoint,
    out: str | os.PathLike[str],
    *,
    group_size: int,
    recipe: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    expected_bytes: int = 0,
) -> ModelWriter:
    """The writer of a format; a context manager.

    Args:
      format: one of `FORMATS`.
      source: the checkpoint that the new one is made from.
      out: the directory to create.
      group_size: of the quantized weights; formats that have one for a whole checkpoint say it in the config.
      recipe: JSON values that the manifest keeps.
      overwrite: replace ``out`` if awq-jax wrote it.
      expected_bytes: refuse at once if the disk has less room.
    """
    options: dict[str, Any] = {"recipe": recipe, "overwrite": overwrite, "expected_bytes": expected_bytes}
    if format == "autoawq":
        return HFWriter(source, out, codec=AutoAWQ(group_size), **options)
    return NativeWriter(source, out, **options)
