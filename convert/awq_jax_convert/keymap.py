# SPDX-License-Identifier: Apache-2.0
"""Names: a family's table of keys, expanded for one model, strictly and in both directions."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from awq_jax.families._table import Family, Key

__all__ = ["Place", "Sizes", "resolve", "theirs"]


@runtime_checkable
class Sizes(Protocol):
    """What of a `DecoderConfig` decides which names exist."""

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        ...

    @property
    def tie_embeddings(self) -> bool:
        """Whether the output head is the embedding."""
        ...


class Place(NamedTuple):
    """Where a checkpoint tensor goes: our path, and whether ours is its transpose."""

    path: str
    transpose: bool


def _pattern(key: Key) -> re.Pattern[str]:
    # An index is written without leading zeros, so that every tensor has one name.
    return re.compile(re.escape(key.theirs).replace(r"\*", "(0|[1-9][0-9]{0,5})"))


def _expand(template: str, index: int | str) -> str:
    return template.replace("*", str(index), 1)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(map(repr, listed[:5])) + more


def _match(keys: Mapping[Key, re.Pattern[str]], name: str, num_layers: int) -> Place | None:
    for key, pattern in keys.items():
        found = pattern.fullmatch(name)
        if found and all(int(index) < num_layers for index in found.groups()):
            path = key.ours
            for index in found.groups():
                path = _expand(path, index)
            return Place(path, key.transpose)
    return None


def _required(family: Family, config: Sizes) -> Iterable[tuple[str, str]]:
    """(their name, our path) of every tensor that must exist."""
    for key in family.keys:
        if key.optional or (config.tie_embeddings and key.ours.startswith("lm_head/")):
            continue
        for index in range(config.num_layers) if "*" in key.theirs else (0,):
            yield _expand(key.theirs, index), _expand(key.ours, index)


def resolve(family: Family, config: Sizes, names: Iterable[str]) -> dict[str, Place]:
    """Where each tensor of a checkpoint goes.

    Args:
      family: whose table of keys to use.
      config: number of layers, and whether the head is tied: then ``lm_head`` may be there or not.
      names: every tensor name of the checkpoint.

    Returns:
      Their name -> our path and whether to transpose, one entry per name that the table gives a path.

    Raises:
      ValueError: names that match no row of the table, two names for one path, or required tensors that are missing;
        each lists up to five and the count.
    """
    names = list(names)
    if config.num_layers > len(names):  # before anything is expanded: the number is the file's own claim
        raise ValueError(
            f"the config claims {config.num_layers} layers, the checkpoint has {len(names)} tensors: config.json is of "
            "another model, or the checkpoint is incomplete."
        )
    keys = {key: _pattern(key) for key in family.keys}
    places = {name: _match(keys, name, config.num_layers) for name in names}
    unknown = [name for name, place in places.items() if place is None]
    if unknown:
        raise ValueError(
            f"{len(unknown)} checkpoint tensors match no key of family {family.name!r} with {config.num_layers} "
            f"layers: {_some(unknown)}. The checkpoint is of another architecture, or the family's table lacks a row."
        )
    found = {name: place for name, place in places.items() if place is not None and place.path}
    held: dict[str, str] = {}
    for name, place in found.items():
        if place.path in held:
            raise ValueError(f"tensors {held[place.path]!r} and {name!r} are both {place.path!r}.")
        held[place.path] = name
    missing = [name for name, path in _required(family, config) if path not in held]
    if missing:
        raise ValueError(
            f"{len(missing)} tensors that family {family.name!r} needs are missing: {_some(missing)}. "
            "Download the checkpoint again."
        )
    return found


def theirs(family: Family, path: str) -> tuple[str, bool]:
    """The inverse: the checkpoint's name of one of our paths, and whether it is the transpose.

    Args:
      family: whose table to use.
      path: with its layer index, for example ``layers/3/attn/q/kernel``.

    Raises:
      KeyError: the family has no such parameter.
    """
    for key in family.keys:
        found = re.fullmatch(re.escape(key.ours).replace(r"\*", "([0-9]+)"), path)
        if found:
            name = key.theirs
            for index in found.groups():
                name = _expand(name, index)
            return name, key.transpose
    raise KeyError(f"family {family.name!r} has no key for the parameter {path!r}.")
