# SPDX-License-Identifier: Apache-2.0
"""What decides every bit of a quantization, as one digest for each thing that a user can change."""

import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

import awq_jax_convert
import awq_jax_kernels
from awq_jax._files import read_json, resolve_inside
from awq_jax._version import __version__
from awq_jax.calibration import Samples
from awq_jax_convert.hf_config import CONFIG
from awq_jax_convert.safetensors_dir import INDEX, SINGLE
from awq_jax_convert.sink import BESIDE

__all__ = ["fingerprint"]


_BEGINNING = 1 << 20  # bytes of a file, where only its beginning is read


def fingerprint(
    source: Path, calib: Samples, decided: Mapping[str, Any], devices: str, *, whole: bool = True
) -> dict[str, str]:
    """Digests of the weights, the calibration tokens, the recipe, the code and the devices.

    Args:
      source: directory of the dense checkpoint, already checked.
      calib: tokens and mask.
      decided: the recipe and every option that changes the numbers, as JSON values.
      devices: what the arithmetic runs on; sums are taken in another order elsewhere.
      whole: read all of the weights. Where nothing is kept to resume from, sizes and headers tell enough, and are said
        to be no more.

    Returns:
      Name of the thing -> sha256, or words where they say more.
    """
    shape = json.dumps(calib.tokens.shape)
    text = json.dumps(decided, sort_keys=True)
    return {
        "weights": _directory(source, None) if whole else f"headers {_directory(source, _BEGINNING)}",
        "calibration": hashlib.sha256(f"{shape} {calib.digest}".encode()).hexdigest(),
        "recipe": hashlib.sha256(text.encode()).hexdigest(),
        "versions": _versions(),
        "devices": f"{devices}, x64 {jax.config.jax_enable_x64}, precision {jax.config.jax_default_matmul_precision}",  # pyright: ignore[reportAttributeAccessIssue]
    }


def _sha256(path: Path, most: int | None) -> str:
    with open(path, "rb") as file:
        if most is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(f"{path.stat().st_size} ".encode() + file.read(most)).hexdigest()


def _directory(source: Path, most: int | None) -> str:
    """sha256 over the names and contents of the files that a run reads, or of so many bytes of each and their sizes."""
    names = {name for name in (CONFIG, INDEX, *BESIDE) if (source / name).is_file()}
    names |= set(read_json(source, INDEX)["weight_map"].values()) if INDEX in names else {SINGLE}
    paths = [resolve_inside(source, name) for name in sorted(names)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(functools.partial(_sha256, most=most), paths))
    return hashlib.sha256(json.dumps([*zip(sorted(names), digests, strict=True)]).encode()).hexdigest()


@functools.cache
def _versions() -> str:
    """Released versions, and the code itself: it changes between releases while somebody works on it."""
    code = hashlib.sha256()
    for package in (Path(__file__).parents[1], *(Path(p.__path__[0]) for p in (awq_jax_convert, awq_jax_kernels))):
        for path in sorted(package.rglob("*.py")):
            code.update(path.read_bytes())
    lib = importlib.metadata.version("jaxlib")
    return (
        f"awq-jax {__version__} ({code.hexdigest()[:12]}), jax {jax.__version__}, jaxlib {lib}, numpy {np.__version__}"
    )
