# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory, dense or quantized, read one layer at a time."""

import dataclasses
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax._tie import Tie
from awq_jax._tree import nested
from awq_jax_convert.codecs import codec_of
from awq_jax_convert.factors import FACTORS, apply, producers
from awq_jax_convert.floats import nonfinite, widened
from awq_jax_convert.fused import columns, split
from awq_jax_convert.hf_config import FamilyChoice, HFConfig, read_config
from awq_jax_convert.keymap import Place, resolve, theirs
from awq_jax_convert.safetensors_dir import SafetensorsDir
from awq_jax_convert.safetensors_header import DTYPES, FLOATS
from awq_jax_convert.scheme import Scheme
from awq_jax_convert.shapes import expected_shape, implied_paths
from awq_jax_convert.source import Checkpoint, cast

__all__ = ["HFCheckpoint"]

_AT_ONCE = 4  # tensors that are read, checked and decoded side by side: a layer of them has three large ones


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a parameter comes from: one dense tensor, or the parts of a quantized linear; all of it or some columns."""

    name: str
    place: Place
    parts: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def tensors(self) -> dict[str, str]:
        """part -> tensor name; a dense one has the part ''."""
        return {part: f"{self.module}.{part}" for part in self.parts} or {"": self.name}


class HFCheckpoint(Checkpoint):
    """A Hugging Face checkpoint directory whose names, shapes and dtypes have all been checked.

    Attributes:
      tensors: its files.
      codec: how its quantized linears are stored, None for a dense checkpoint.
    """

    def __init__(self, path: Path, hf: HFConfig) -> None:
        self.path, self.hf = path, hf
        self.codec = codec_of(hf.quantization)
        self.format = "dense" if self.codec is None else self.codec.name
        self.tensors = SafetensorsDir(path)
        self.nbytes = self.tensors.nbytes
        parts = self._parts()
        places = resolve(self.family, self.config, parts)
        self._sources: dict[str, tuple[_Source, ...]] = {}  # more than one where experts are stacked
        for name, place in sorted(places.items(), key=lambda item: item[1].expert or 0):
            source = _Source(name, place, parts[name])
            self._sources |= {path: (*self._sources.get(path, ()), source) for path in place.paths}
        self._shapes = {path: self._shape(path) for path in self._sources}
        self._with_factors = [path for path, found in self._sources.items() if any(FACTORS in s.parts for s in found)]
        self._widened = self._take_factors()
        self._refuse_differences()
        self._refuse_shapes(self._misfits())

    @classmethod
    def open(cls, path: str | os.PathLike[str], family: FamilyChoice = None) -> "HFCheckpoint":
        """Open a local directory; reads headers and config, no tensor.

        Args:
          path: holds ``config.json`` and safetensors files.
          family: a table, the name of one or its TOML file, instead of the one that serves config.json's architecture.

        Raises:
          FileNotFoundError: no such directory, or a file of it is missing.
          ValueError: anything in it that is not understood or does not fit together; each message names it.
        """
        return cls(Path(path), read_config(Path(path), family))

    def _parts(self) -> dict[str, tuple[str, ...]]:
        """``module.weight`` -> the parts that the codec keeps it in; () for a dense tensor."""
        dense: dict[str, tuple[str, ...]] = {}
        quantized: dict[str, tuple[str, ...]] = {}
        parts = () if self.codec is None else self.codec.parts
        # A weight may keep its name when it becomes codes: what lies beside it tells.
        named = [name.rpartition(".") for name in self.tensors.names()]
        coded = {module for module, _, part in named if part in parts and part != "weight"}
        for module, dot, part in named:
            name = f"{module}{dot}{part}"
            if part not in parts or module not in coded:
                dense[name] = ()
            else:
                quantized[f"{module}.weight"] = (*quantized.get(f"{module}.weight", ()), part)
        both = sorted(dense.keys() & quantized.keys())
        if both:
            raise ValueError(f"{self.path} has {len(both)} weights both dense and quantized, e.g. {both[0]!r}.")
        return {**dense, **quantized}

    def _shape(self, path: str) -> tuple[int, ...]:
        """Shape of a parameter; a whole tensor's where its parts do not add up to it or experts differ."""
        sources = self._sources[path]
        shapes = [self._stored_shape(source) for source in sources]
        odd = next((shape for shape in shapes if shape != shapes[0]), None)
        place, shape = sources[0].place, odd or shapes[0]
        if odd is None and len(place.paths) > 1:
            taken = columns(self.config, place)
            if shape[-1] == sum(map(len, taken)):
                shape = (*shape[:-1], len(taken[place.paths.index(path)]))
        return shape if odd or place.expert is None else (len(sources), *shape)

    def _stored_shape(self, source: _Source) -> tuple[int, ...]:
        metas = {part: self.tensors.info(name) for part, name in source.tensors.items()}
        if source.parts and self.codec is not None:
            return self.codec.shape(source.module, metas)
        meta = metas[""]
        if meta.dtype not in FLOATS:
            raise ValueError(
                f"weight {source.name!r} of {self.path} is {meta.dtype}; weights are {', '.join(FLOATS)}. If the "
                "checkpoint is quantized, its config.json does not say how: start from the dense one."
            )
        return meta.shape[::-1] if source.place.transpose else meta.shape

    def _take_factors(self) -> set[str]:
        """Modules that take the factors of others, and become float32 by it."""
        having: dict[str, set[str]] = {}
        for path in self._with_factors:
            if not path.startswith("layers/"):
                raise ValueError(f"{self._sources[path][0].module!r} of {self.path} has {FACTORS}: it is not read.")
            _, index, module = path.removesuffix("/kernel").split("/", 2)
            having.setdefault(f"layers/{index}", set()).add(module)
        groups = self.family.groups
        return {f"{layer}/{path}" for layer, modules in having.items() for path in producers(groups, modules)}

    def _is_tied_head(self, path: str) -> bool:
        return self.config.tie_embeddings and path.startswith("lm_head/")

    def _misfits(self) -> Iterable[str]:
        for path, found in self._shapes.items():
            wanted = expected_shape(self.config, path)
            if found != wanted:
                yield f"{self._sources[path][0].name!r} gives {path!r} the shape {found}, the config implies {wanted}"

    def _refuse_differences(self) -> None:
        """Optional tensors, such as biases, are there exactly where the config says so."""
        wanted = implied_paths(self.config)
        said = [f"{theirs(self.family, path)[0]!r} is missing" for path in sorted(wanted - set(self.paths()))]
        said += [f"{self._sources[path][0].name!r} has no use" for path in sorted(set(self.paths()) - wanted)]
        if said:
            more = f" and {len(said) - 5} more" if len(said) > 5 else ""
            raise ValueError(f"{self.path} does not hold what its config.json implies: {', '.join(said[:5])}{more}.")

    def paths(self) -> list[str]:
        """All parameter paths, sorted."""
        return sorted(path for path in self._sources if not self._is_tied_head(path))

    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of a parameter, from the headers."""
        return self._shapes[path]

    def stored_dtype(self, path: str) -> np.dtype:
        """The dtype that a parameter has in the files; for a quantized one, that of its scales."""
        if path.rpartition("/")[0] in self._widened:
            return np.dtype(np.float32)
        source = self._sources[path][0]
        part = self.codec.scale_part if source.parts and self.codec is not None else ""
        return DTYPES[self.tensors.info(source.tensors[part]).dtype]

    def stored_nbytes(self, path: str) -> int:
        """The bytes that a parameter takes in the files; of a tensor that holds several, its share."""
        sources = self._sources[path]
        total = sum(self.tensors.info(name).nbytes for source in sources for name in source.tensors.values())
        widths = [self._shapes[each][-1] for each in sources[0].place.paths]
        return total * self._shapes[path][-1] // sum(widths)

    def scheme(self, path: str) -> Scheme | None:
        """The number format of a quantized weight, None for a dense parameter."""
        source = self._sources[path][0]
        return self.codec.scheme(source.module, source.parts) if source.parts and self.codec is not None else None

    def _read(self, path: str, dtype: Any) -> np.ndarray | QTensor:
        sources = self._sources[path]
        found = [self._read_one(path, source, dtype) for source in sources]
        return found[0] if sources[0].place.expert is None else jax.tree.map(lambda *each: np.stack(each), *found)

    def _read_one(self, path: str, source: _Source, dtype: Any) -> Any:
        arrays = {part: self.tensors.read(name) for part, name in source.tensors.items()}
        whole: Any
        if source.parts and self.codec is not None:
            whole = self.codec.decode(source.module, arrays)
        else:
            whole = arrays[""].T if source.place.transpose else arrays[""]
            if bad := nonfinite(arrays[""]):
                raise ValueError(
                    f"tensor {source.name!r} of {self.path} has {bad} NaN or infinite values of {whole.size}: the "
                    "checkpoint is damaged. Download it again."
                )
        paths = source.place.paths
        if len(paths) > 1:
            whole = split(whole, columns(self.config, source.place)[paths.index(path)])
        if source.parts:
            return cast(whole, dtype)
        return whole if dtype is None else np.ascontiguousarray(widened(whole, np.dtype(dtype)))

    def _tree(self, paths: Iterable[str], prefix: str, dtype: Any) -> dict[str, Any]:
        paths = list(paths)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            read = list(pool.map(lambda path: self._read(path, dtype), paths))
        return nested(zip((path.removeprefix(prefix) for path in paths), read, strict=True))

    def layer(self, index: int, dtype: Any = np.float32) -> dict[str, Any]:
        """The parameters of one layer; see `Checkpoint.layer`."""
        self._refuse_index(index)
        prefix = f"layers/{index}/"
        paths = [path for path in self._sources if path.startswith(prefix)]
        having = [path for path in self._with_factors if path.startswith(prefix)]
        if not having:
            return self._tree(paths, prefix, dtype)
        factors = {path.removeprefix(prefix).removesuffix("/kernel"): self._factors(path) for path in having}
        c = self.config
        tie = Tie(kv_heads=c.num_kv_heads, repeats=c.num_heads // c.num_kv_heads)
        return cast(apply(self.family.groups, self._tree(paths, prefix, None), factors, tie), dtype)

    def _factors(self, path: str) -> np.ndarray:
        """What the inputs of a linear are multiplied by, ``[k]`` or ``[e, k]``; ones for an expert without any."""
        found = []
        for source in self._sources[path]:
            name = f"{source.module}.{FACTORS}"
            each = self.tensors.read(name).astype(np.float32) if FACTORS in source.parts else np.float32(1)
            if not (np.isfinite(each) & (each > 0)).all():
                raise ValueError(f"tensor {name!r} of {self.path} has factors that are not positive: it is damaged.")
            found.append(np.broadcast_to(each, self._shapes[path][-2:-1]))
        return found[0] if self._sources[path][0].place.expert is None else np.stack(found)

    def stem(self, dtype: Any = np.float32) -> dict[str, Any]:
        """Everything outside the layers; see `Checkpoint.stem`."""
        outside = [path for path in self._sources if not path.startswith("layers/")]
        for path in filter(self._is_tied_head, outside):
            self._refuse_second_head(self._sources[path][0].name, self._sources["embed/embedding"][0].name)
        return self._tree((path for path in outside if not self._is_tied_head(path)), "", dtype)

    def _refuse_second_head(self, head: str, embedding: str) -> None:
        if not np.array_equal(self.tensors.read(head), self.tensors.read(embedding)):
            raise ValueError(
                f"{self.path}: config.json says tie_word_embeddings, but {head!r} differs from {embedding!r}. Set "
                "tie_word_embeddings to false if the head is meant to be its own."
            )
