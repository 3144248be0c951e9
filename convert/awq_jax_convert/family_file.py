# SPDX-License-Identifier: Apache-2.0
"""A user's own table of a model family: a TOML file with the rows of `awq_jax.families.Family`. It is data, no code.

docs/families.md tells how to write one.
"""

import dataclasses
import os
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from awq_jax._files import resolve_inside
from awq_jax.families import FAMILIES, Family, Group, Key, Linear, Norm
from awq_jax.families._rows import linear, norm
from awq_jax.models import DecoderConfig
from awq_jax_convert.shapes import KNOWN_LINEARS, KNOWN_NORMS, KNOWN_TENSORS

__all__ = ["FAMILY_FILE", "Table", "open_table", "parse_table", "table_beside"]

FAMILY_FILE = "awq_jax_family.toml"
"""What a directory calls the table that it is to be read with; we write it beside what was made with one."""

_MAX_BYTES = 1 << 20
_FIELDS = {
    name: kind
    for name, kind in typing.get_type_hints(DecoderConfig).items()
    if name not in ("rope_scaling", "sliding_layers")  # read from what config.json always calls them
}


class Table(typing.NamedTuple):
    """A family and the text that it was read from; None for one that is a Python object."""

    family: Family
    text: str | None


def open_table(given: Family | str | os.PathLike[str]) -> Table:
    """The table that a user asked for: the name of one that there is, or a TOML file.

    Raises:
      FileNotFoundError, ValueError: there is no such name or file, or something in the file is not understood.

    >>> open_table("qwen2").family.name
    'qwen2'
    """
    if isinstance(given, Family):
        return Table(given, None)
    if given in FAMILIES:
        return parse_table(f'base = "{given}"\n', given)
    path = Path(given)
    if path.suffix != ".toml":
        raise ValueError(
            f"no family is called {str(given)!r}; these are: {', '.join(FAMILIES)}. A table of your own is a file "
            "whose name ends in .toml."
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    return parse_table(_read(path), path)


def table_beside(directory: Path) -> Table | None:
    """The table that a checkpoint directory has with it.

    Raises:
      ValueError: something in it is not understood, or it lies elsewhere.
    """
    if not os.path.lexists(directory / FAMILY_FILE):
        return None
    return parse_table(_read(resolve_inside(directory, FAMILY_FILE)), directory / FAMILY_FILE)


def _read(path: Path) -> str:
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has more than {_MAX_BYTES} bytes; a table has a few thousand.")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}).") from None


def parse_table(text: str, source: object) -> Table:
    """A table from its text.

    Args:
      text: TOML.
      source: what to call it in an error.

    Raises:
      ValueError: it is not TOML, or something in it is not understood; the message names the place.

    >>> parse_table('base = "llama"\\noptions.qkv_bias = true', "here").family.options
    (('qkv_bias', True),)
    """
    try:
        return Table(_family(tomllib.loads(text)), text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{source} is not TOML: {error}.") from error
    except _WrongTable as error:
        raise ValueError(f"{source}: {error} docs/families.md tells how to write a table.") from None


class _WrongTable(Exception):
    """What is wrong, without the file's name."""


def _refuse(condition: bool, said: str) -> None:
    if condition:
        raise _WrongTable(said)


def _row(given: Any, where: str, kinds: Mapping[str, Any], needs: Sequence[str]) -> dict[str, Any]:
    """A TOML table whose keys are known and whose values are of their types."""
    _refuse(not isinstance(given, dict), f"{where} is {str(given)[:80]!r}; it must be a table.")
    unknown = sorted(set(given) - set(kinds))
    _refuse(bool(unknown), f"{where} has {', '.join(map(repr, unknown))}; it may have {', '.join(kinds)}.")
    for key, value in given.items():
        _refuse(not _fits(value, kinds[key]), f"{where}: {key} is {str(value)[:80]!r}; that is not a value for it.")
    missing = [key for key in needs if key not in given]
    _refuse(bool(missing), f"{where} lacks {', '.join(missing)}.")
    return given


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of TOML is of a type: a class, a union, a Literal, or a list of texts."""
    if kind is Any:
        return True
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, each) for each in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    return type(value) in ((int, float) if kind is float else (kind,))


_Texts = list[str]
_KEYS = {
    "base": str,
    "name": str,
    "architectures": _Texts,
    "prefix": str,
    "without": _Texts,
    "linears": list[dict],
    "norms": list[dict],
    "tensors": list[dict],
    "groups": list[dict],
    "config": dict,
    "options": dict,
    "defaults": dict,
    "multiples": list[dict],
    "full_every": int,
    "accepts": dict,
    "ignores": _Texts,
    "no_clip": _Texts,
}
_EMPTY = Family(name="", architectures=(), groups=(), keys=())


def _family(given: Mapping[str, Any]) -> Family:
    _row(given, "the file", _KEYS, ())
    based = given.get("base")
    _refuse(based is not None and based not in FAMILIES, f"base is {based!r}; it may be {', '.join(FAMILIES)}.")
    base = FAMILIES[based] if based else _EMPTY
    _refuse(not based and "name" not in given, "it has neither a base nor a name.")
    made = dataclasses.replace(
        base,
        name=given.get("name", base.name),
        architectures=tuple(given.get("architectures", ())),
        prefix=given.get("prefix", base.prefix),
        when=(),
        keys=_keys(base, given),
        groups=tuple(map(_group, given["groups"])) if "groups" in given else base.groups,
        config=_config(base, given.get("config", {})),
        options=_options(base, given.get("options", {})),
        defaults=tuple({**dict(base.defaults), **given.get("defaults", {})}.items()),
        multiples=(*base.multiples, *map(_multiple, given.get("multiples", ()))),
        full_every=given.get("full_every", base.full_every),
        accepts=tuple({**dict(base.accepts), **_accepts(given.get("accepts", {}))}.items()),
        ignores=(*base.ignores, *given.get("ignores", ())),
        no_clip=tuple(given["no_clip"]) if "no_clip" in given else base.no_clip,
    )
    for path in made.no_clip:
        _linear_path(path, "no_clip")
    _refuse(not made.groups or not made.keys, "it has no groups, or names no tensors.")
    return made


def _linear_path(path: str, where: str) -> str:
    known = path.startswith("layers/*/") and path.removeprefix("layers/*/") in KNOWN_LINEARS
    _refuse(not known, f"{where} names {path!r}; linears are layers/*/ and one of {', '.join(sorted(KNOWN_LINEARS))}.")
    return path


def _keys(base: Family, given: Mapping[str, Any]) -> tuple[Key, ...]:
    """The base's rows, but for modules and names that the file has rows for or says are not there, and the file's."""
    made: list[Key] = []
    for kind, of in _ROWS.items():
        for index, row in enumerate(given.get(kind, ())):
            made += of(f"{kind}[{index}]", row)
    names = {key.theirs for key in made}
    modules = {path.rpartition("/")[0] for key in made for path in key.paths} | set(given.get("without", ()))
    known = {path.rpartition("/")[0] for key in base.keys for path in key.paths}
    odd = sorted(set(given.get("without", ())) - known)
    _refuse(bool(odd), f"without names {', '.join(odd)}, for which its base has no rows.")
    stays = lambda key: (
        key.theirs not in names and not modules & {path.rpartition("/")[0] for path in key.paths if path}
    )
    return (*filter(stays, base.keys), *made)


def _places(where: str, row: Mapping[str, Any], known: Callable[[str], bool], words: str) -> tuple[str, ...]:
    """A row's paths of ours, held against the decoder's and against the stars of their name."""
    ours = (row["ours"],) if isinstance(row["ours"], str) else tuple(row["ours"])
    for path in ours:
        _refuse(not known(path.removeprefix("layers/*/")), f"{where}: {path!r} is no {words} of the decoder.")
    stars = row["theirs"].count("*")
    wanted = {(2 if "/experts/" in path else 1) if path.startswith("layers/*/") else 0 for path in ours}
    _refuse(
        wanted != {stars},
        f"{where}: {row['theirs']!r} has {stars} stars; {', '.join(ours)} needs one for the layer, and another for the "
        "expert where there are experts.",
    )
    return ours


def _linears(where: str, row: Any) -> tuple[Key, ...]:
    kinds = {
        "theirs": str,
        "ours": str | _Texts,
        "bias": bool,
        "transpose": bool,
        "layout": typing.Literal["concat", "grouped"],
    }
    found = _row(row, where, kinds, ("theirs", "ours"))
    ours = _places(where, found, (KNOWN_LINEARS | {"lm_head"}).__contains__, "linear")
    return linear(**{**found, "ours": ours[0] if len(ours) == 1 else ours})


def _norms(where: str, row: Any) -> tuple[Key, ...]:
    found = _row(row, where, {"theirs": str, "ours": str, "bias": bool}, ("theirs", "ours"))
    _places(where, found, KNOWN_NORMS.__contains__, "norm")
    return norm(**found)


def _tensors(where: str, row: Any) -> tuple[Key, ...]:
    kinds = {"theirs": str, "ours": str, "transpose": bool, "optional": bool}
    found = _row(row, where, kinds, ("theirs", "ours"))
    if found["ours"]:
        _places(where, found, _is_tensor, "tensor")
    return (Key(**found),)


def _is_tensor(path: str) -> bool:
    module, _, leaf = path.rpartition("/")
    linears, norms = module in KNOWN_LINEARS | {"lm_head"}, module in KNOWN_NORMS
    return path in KNOWN_TENSORS or (linears and leaf in ("kernel", "bias")) or (norms and leaf in ("scale", "bias"))


_ROWS: dict[str, Callable[[str, Any], tuple[Key, ...]]] = {"linears": _linears, "norms": _norms, "tensors": _tensors}


def _group(row: Any) -> Group:
    kinds = {
        "norm": str,
        "offset": float,
        "linear": str,
        "tie": typing.Literal["gqa"],
        "reason": str,
        "sinks": _Texts,
        "float_sinks": _Texts,
        "per_expert": bool,
        "output": typing.Literal["layers/*/attn", "layers/*/mlp"],
    }
    found = _row(row, "a group", kinds, ("sinks",))
    named = [kind for kind in ("norm", "linear", "reason") if kind in found]
    _refuse(len(named) != 1, f"the group of {found['sinks']} has one of norm, linear and reason, not {named}.")
    _refuse(not found["sinks"], "a group has no sinks.")
    producer: Norm | Linear | None = None
    if "norm" in found:
        path = found["norm"]
        _refuse(
            path.removeprefix("layers/*/") not in KNOWN_NORMS or "*" not in path, f"{path!r} is no norm of a layer."
        )
        producer = Norm(path, float(found.get("offset", 0.0)))
    elif "linear" in found:
        producer = Linear(_linear_path(found["linear"], "a group"), found.get("tie"))
    return Group(
        producer,
        tuple(_linear_path(path, "a group") for path in found["sinks"]),
        float_sinks=tuple(_linear_path(path, "a group") for path in found.get("float_sinks", ())),
        per_expert=found.get("per_expert", False),
        output=found.get("output"),
        reason=found.get("reason", ""),
    )


def _config(base: Family, given: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(attribute, field) rows: the file's attributes replace the base's; one with an empty list is not read."""
    made = [row for row in base.config if row[0] not in given]
    for attribute, fields in given.items():
        _refuse(
            not _fits(fields, str | _Texts), f"config.{attribute} is {str(fields)[:80]!r}; it is a field or several."
        )
        for field in [fields] if isinstance(fields, str) else fields:
            _refuse(
                field not in _FIELDS, f"config.{attribute}: {field!r} is no field; these are: {', '.join(_FIELDS)}."
            )
            made.append((attribute, field))
    return tuple(made)


def _options(base: Family, given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    _row(given, "options", _FIELDS, ())
    return tuple({**dict(base.options), **given}.items())


def _multiple(row: Any) -> tuple[str, int, str]:
    found = _row(row, "multiples", {"field": str, "factor": int, "of": str}, ("field", "factor", "of"))
    for field in (found["field"], found["of"]):
        _refuse(field not in _FIELDS, f"multiples: {field!r} is no field; these are: {', '.join(_FIELDS)}.")
    return (found["field"], found["factor"], found["of"])


def _accepts(given: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Attributes and their values; TOML has no null, the text "null" stands for it."""
    for attribute, values in given.items():
        _refuse(not isinstance(values, list), f"accepts.{attribute} is {str(values)[:80]!r}; it is a list of values.")
    return {name: tuple(None if value == "null" else value for value in values) for name, values in given.items()}
