# SPDX-License-Identifier: Apache-2.0
"""Parameters of ours that lie in one tensor of theirs: split on reading, joined on writing.

Parts are columns (outputs) of the whole; each kept group of rows has its own scale for every column, so quantized
weights split and join without touching a code.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax.families import Family
from awq_jax.models import DecoderConfig
from awq_jax_convert.keymap import Place, home
from awq_jax_convert.shapes import expected_shape

__all__ = ["Whole", "columns", "split", "wholes"]


def columns(config: DecoderConfig, place: Place) -> list[np.ndarray]:
    """Which columns of a tensor each of its parts takes, in the order of ``place.paths``."""
    if place.layout == "grouped":
        kv, repeats = config.num_kv_heads, config.num_heads // config.num_kv_heads
        numbers = np.arange(kv * (repeats + 2) * config.head_dim).reshape(kv, repeats + 2, config.head_dim)
        return [part.reshape(-1) for part in (numbers[:, :repeats], numbers[:, -2], numbers[:, -1])]
    widths = [expected_shape(config, path)[-1] for path in place.paths]
    ends = np.cumsum(widths)
    return [np.arange(end - width, end) for width, end in zip(widths, ends, strict=True)]


def split(whole: Any, taken: np.ndarray) -> Any:
    """Some columns of an array or a `QTensor`."""
    return jax.tree.map(lambda leaf: np.ascontiguousarray(leaf[..., taken]), whole)


def _join(name: str, parts: Sequence[Any], taken: Sequence[np.ndarray]) -> Any:
    if len({jax.tree.structure(part) for part in parts}) > 1 or len({_grid(part) for part in parts}) > 1:
        raise ValueError(
            f"{name!r} is one tensor in this checkpoint, but its parts were quantized differently. Give all of them "
            "the same override, or write the native format (--format native, or convert --to native)."
        )
    width = sum(len(each) for each in taken)

    def together(*leaves: Any) -> np.ndarray:
        out = np.empty((*leaves[0].shape[:-1], width), leaves[0].dtype)
        for leaf, where in zip(leaves, taken, strict=True):
            out[..., where] = leaf
        return out

    return jax.tree.map(together, *parts)


def _grid(part: Any) -> int:
    return part.group_size if isinstance(part, QTensor) else 0


class Whole(NamedTuple):
    """A checkpoint tensor to be written: its name, our paths in it, whether it is transposed, and what it holds."""

    name: str
    paths: tuple[str, ...]
    transpose: bool
    leaf: Any


def wholes(family: Family, config: DecoderConfig, params: Mapping[str, Any]) -> Iterator[Whole]:
    """The checkpoint's tensors of some of our parameters: parts joined, stacked experts one by one.

    Args:
      family: whose table to use.
      config: of the model.
      params: by path, with layer indices; all parts of a tensor are there.

    Raises:
      ValueError: parts of one tensor are quantized differently.
    """
    for path, leaf in params.items():
        name, place = home(family, path)
        if path != place.paths[0]:
            continue  # it comes with the first part
        if len(place.paths) > 1:
            leaf = _join(name, [params[each] for each in place.paths], columns(config, place))
        if "*" not in name:
            yield Whole(name, place.paths, place.transpose, leaf)
            continue
        for expert in range(leaf.shape[0]):
            one = jax.tree.map(lambda each, at=expert: each[at], leaf)
            yield Whole(name.replace("*", str(expert)), place.paths, place.transpose, one)
