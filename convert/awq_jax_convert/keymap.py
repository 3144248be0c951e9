# SPDX-License-Identifier: Apache-2.0
"""Names: a family's table of keys, expanded for one model, strictly and in both directions."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from awq_jax.families._table import Family, Key

__all__ = ["Place", "Sizes", "home", "resolve", "theirs"]


@runtime_checkable
class Sizes(Protocol):
    """What of a `DecoderConfig` decides which names exist."""

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        ...

    @property
    def num_experts(self) -> int:
        """How many experts a layer has."""
        ...

    @property
    def tie_embeddings(self) -> bool:
        """Whether the output head is the embedding."""
        ...


class Place(NamedTuple):
    """Where a checkpoint tensor goes.

    Attributes:
      paths: ours; several are parts of the tensor, side by side.
      transpose: whether ours is its transpose.
      layout: how several parts lie (`awq_jax.families.Key`).
      expert: place on the leading axis of a stacked parameter, None where it is not stacked.
    """

    paths: tuple[str, ...]
    transpose: bool
    layout: str = "concat"
    expert: int | None = None


_INDEX = "(0|[1-9][0-9]{0,5})"  # without leading zeros, so that every tensor has one name


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\*", _INDEX))


def _expand(template: str, *indices: int | str) -> str:
    for index in indices:
        template = template.replace("*", str(index), 1)
    return template


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(map(repr, listed[:5])) + more


def _stacked(key: Key) -> bool:
    return key.theirs.count("*") > key.paths[0].count("*") > 0


def _match(keys: Mapping[Key, re.Pattern[str]], name: str, config: Sizes) -> Place | None:
    for key, pattern in keys.items():
        found = pattern.fullmatch(name)
        if found is None:
            continue
        indices = [int(index) for index in found.groups()]
        if any(index >= limit for index, limit in zip(indices, (config.num_layers, config.num_experts), strict=False)):
            continue
        paths = tuple(_expand(path, *indices) for path in key.paths)
        return Place(paths, key.transpose, key.layout, indices[1] if _stacked(key) else None)
    return None


def _required(family: Family, config: Sizes) -> Iterable[tuple[str, tuple[str, int | None]]]:
    """(their name, (our path, expert)) of every tensor that must exist."""
    for key in family.keys:
        if key.optional or (config.tie_embeddings and key.paths[0].startswith("lm_head/")):
            continue
        for layer in range(config.num_layers) if "*" in key.theirs else (0,):
            for expert in range(config.num_experts) if _stacked(key) else (None,):
                indices = (layer,) if expert is None else (layer, expert)
                yield _expand(key.theirs, *indices), (_expand(key.paths[0], layer), expert)


def _refuse_absurd(config: Sizes, tensors: int) -> None:
    """Before anything is expanded: the numbers are the file's own claims."""
    for what, count in (("layers", config.num_layers), ("experts", config.num_layers * config.num_experts)):
        if count > tensors:
            raise ValueError(
                f"the config claims {count} {what}, the checkpoint has {tensors} tensors: config.json is of another "
                "model, or the checkpoint is incomplete."
            )


def resolve(family: Family, config: Sizes, names: Iterable[str]) -> dict[str, Place]:
    """Where each tensor of a checkpoint goes.

    Args:
      family: whose table of keys to use.
      config: number of layers and experts, and whether the head is tied: then ``lm_head`` may be there or not.
      names: every tensor name of the checkpoint.

    Returns:
      Their name -> our paths and how to get there, one entry per name that the table gives a path.

    Raises:
      ValueError: names that match no row of the table, two names for one path, or required tensors that are missing;
        each lists up to five and the count.
    """
    names = list(names)
    _refuse_absurd(config, len(names))
    bare = not any(name.startswith(family.prefix) for name in names)
    keys = {key: _pattern(key.theirs.removeprefix(family.prefix) if bare else key.theirs) for key in family.keys}
    places = {name: _match(keys, name, config) for name in names}
    unknown = [name for name, place in places.items() if place is None]
    if unknown:
        raise ValueError(
            f"{len(unknown)} checkpoint tensors match no key of family {family.name!r} with {config.num_layers} "
            f"layers: {_some(unknown)}. The checkpoint is of another architecture, or the family's table lacks a row."
        )
    found = {name: place for name, place in places.items() if place is not None and place.paths[0]}
    held: dict[tuple[str, int | None], str] = {}
    for name, place in found.items():
        for path in place.paths:
            if (path, place.expert) in held:
                raise ValueError(f"tensors {held[path, place.expert]!r} and {name!r} are both {path!r}.")
            held[path, place.expert] = name
    missing = [name for name, path in _required(family, config) if path not in held]
    if missing:
        raise ValueError(
            f"{len(missing)} tensors that family {family.name!r} needs are missing: {_some(missing)}. "
            "Download the checkpoint again."
        )
    return found


def home(family: Family, path: str) -> tuple[str, Place]:
    """The inverse: the checkpoint tensor that holds one of our paths, and all that it holds.

    Args:
      family: whose table to use.
      path: with its layer index, for example ``layers/3/attn/q/kernel``.

    Returns:
      The tensor's name, with ``*`` for the expert where ours is stacked, and its place.

    Raises:
      KeyError: the family has no such parameter.
    """
    for key in family.keys:
        for ours in key.paths:
            found = re.fullmatch(re.escape(ours).replace(r"\*", "([0-9]+)"), path)
            if found and ours:
                indices = found.groups()
                paths = tuple(_expand(each, *indices) for each in key.paths)
                return _expand(key.theirs, *indices), Place(paths, key.transpose, key.layout)
    raise KeyError(f"family {family.name!r} has no key for the parameter {path!r}.")


def theirs(family: Family, path: str) -> tuple[str, bool]:
    """The name of `home`, and whether ours is the transpose.

    Raises:
      KeyError: the family has no such parameter.
    """
    name, place = home(family, path)
    return name, place.transpose
