# SPDX-License-Identifier: Apache-2.0
"""The native form of a quantized model: config and tokenizer as Hugging Face keeps them, weights as orbax keeps ours.

One orbax checkpoint for the parameters outside the layers and one for each layer, so that neither writing nor reading
ever holds more than a layer.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax._manifest import MANIFEST, read_manifest, verify
from awq_jax._tree import leaves
from awq_jax.checkpoint import read_part
from awq_jax_convert.hf_config import FamilyChoice, HFConfig, read_config
from awq_jax_convert.safetensors_header import DTYPES
from awq_jax_convert.scheme import Scheme
from awq_jax_convert.shapes import expected_shape, implied_paths
from awq_jax_convert.source import Checkpoint, cast

__all__ = ["FORMAT", "NativeCheckpoint", "is_native", "part_name"]

FORMAT = "native"
STEM = "stem"


def part_name(index: int) -> str:
    """The directory of a layer.

    >>> part_name(7)
    'layer-00007'
    """
    return f"layer-{index:05d}"


def is_native(path: str | os.PathLike[str]) -> bool:
    """Whether a directory is a native checkpoint."""
    return (Path(path) / MANIFEST).is_file() and read_manifest(path).get("format") == FORMAT


def _is_described(part: Any) -> bool:
    """Whether a part of the manifest is what `awq_jax.checkpoint.write_part` gives."""
    if not isinstance(part, dict) or not isinstance(part.get("leaves"), dict):
        return False
    if not all(isinstance(kept, dict) for kept in part["leaves"].values()):
        return False
    counts = [part.get("nbytes"), *(kept.get("nbytes") for kept in part["leaves"].values())]
    return all(type(count) is int for count in counts) and all(map(_is_format, part["leaves"].values()))


def _is_format(kept: Mapping[str, Any]) -> bool:
    if "bits" not in kept:
        return kept.get("dtype") in [str(dtype) for dtype in DTYPES.values()]
    types = [type(kept.get(key)) for key in ("bits", "group_size", "symmetric")]
    inputs = kept.get("activations", "float")
    return types == [int, int, bool] and kept["bits"] in (2, 3, 4, 8) and inputs in ("float", "token", "tensor")


class NativeCheckpoint(Checkpoint):
    """A native checkpoint directory.

    Attributes:
      recipe: what decided the quantization, as JSON values.
    """

    format = FORMAT

    def __init__(self, path: Path, hf: HFConfig, manifest: Mapping[str, Any]) -> None:
        self.path, self.hf, self.recipe = path, hf, manifest.get("recipe")
        self._parts = manifest["parts"]
        wanted = {STEM, *(part_name(i) for i in range(min(self.num_layers, len(self._parts) + 1)))}
        if set(self._parts) != wanted:
            raise ValueError(
                f"{path} holds {len(self._parts) - 1} layers, its config.json implies {self.num_layers}; copy it again."
            )
        if not all(map(_is_described, self._parts.values())):
            raise ValueError(f"{path / MANIFEST} does not describe its parts as awq-jax does; copy it again.")
        if odd := sorted(implied_paths(self.config) ^ set(self.paths())):
            raise ValueError(
                f"{path} does not hold what its config.json implies: {len(odd)} parameters are missing or have no use, "
                f"e.g. {odd[0]!r}; copy it again."
            )
        self.nbytes = sum(int(part["nbytes"]) for part in self._parts.values())

    @classmethod
    def open(cls, path: str | os.PathLike[str], family: FamilyChoice = None) -> "NativeCheckpoint":
        """Open a local directory; ``family`` as for `awq_jax_convert.hf.HFCheckpoint.open`.

        Raises:
          FileNotFoundError: no such directory, or a file of it is missing.
          ValueError: its manifest is of an unknown version, or does not fit config.json.
        """
        directory = Path(path)
        manifest = read_manifest(directory)
        if manifest.get("format") != FORMAT or not isinstance(manifest.get("parts"), dict):
            raise ValueError(f"{directory} is not a native checkpoint; its manifest says {manifest.get('format')!r}.")
        return cls(directory, read_config(directory, family), manifest)

    def _part(self, name: str, prefix: str, dtype: Any) -> dict[str, Any]:
        verify(self.path, name)  # orbax returns wrong values for some damage to its data files
        tree = read_part(self.path / name, self._parts[name])
        found = {f"{prefix}{path}": tuple(leaf.shape) for path, leaf in leaves(tree)}
        if odd := sorted({f"{prefix}{path}" for path in self._parts[name]["leaves"]} ^ set(found)):
            raise ValueError(
                f"{self.path / name} does not hold what the manifest says, e.g. {odd[0]!r}; copy it again."
            )
        self._refuse_shapes(
            f"{path!r} has the shape {shape}, the config implies {expected_shape(self.config, path)}"
            for path, shape in found.items()
            if shape != expected_shape(self.config, path)
        )
        return cast(tree, dtype)

    def paths(self) -> list[str]:
        """All parameter paths, sorted."""
        named = {STEM: "", **{part_name(i): f"layers/{i}/" for i in range(self.num_layers)}}
        return sorted(f"{prefix}{path}" for part, prefix in named.items() for path in self._parts[part]["leaves"])

    def _stored(self, path: str) -> dict[str, Any]:
        part, relative = STEM, path
        if path.startswith("layers/"):
            _, index, relative = path.split("/", 2)
            part = part_name(int(index))
        return self._parts[part]["leaves"][relative]

    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return expected_shape(self.config, path)

    def stored_nbytes(self, path: str) -> int:
        """The bytes that a parameter takes in memory."""
        return int(self._stored(path)["nbytes"])

    def stored_dtype(self, path: str) -> np.dtype:
        """The dtype that a dense parameter is kept in."""
        return np.dtype(self._stored(path)["dtype"])

    def scheme(self, path: str) -> Scheme | None:
        """The number format of a quantized weight, None for a dense parameter."""
        kept = self._stored(path)
        if "bits" not in kept:
            return None
        return Scheme(kept["bits"], kept["group_size"], kept["symmetric"], kept.get("activations", "float"))

    def layer(self, index: int, dtype: Any = np.float32) -> dict[str, Any]:
        """The parameters of one layer; see `Checkpoint.layer`."""
        self._refuse_index(index)
        return self._part(part_name(index), f"layers/{index}/", dtype)

    def stem(self, dtype: Any = np.float32) -> dict[str, Any]:
        """Everything outside the layers; see `Checkpoint.stem`."""
        return self._part(STEM, "", dtype)
