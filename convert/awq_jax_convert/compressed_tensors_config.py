# SPDX-License-Identifier: Apache-2.0
"""``quantization_config`` of compressed-tensors: which modules have which number format.

Its ``format`` is ``pack-quantized`` for weights alone, and ``int-quantized`` where activations are int8 too.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from awq_jax_convert.scheme import Scheme, form

__all__ = ["INTS", "PACKED", "ConfigGroup", "groups_of", "read_groups", "scheme_of", "to_config"]

PACKED, INTS = "pack-quantized", "int-quantized"
_KEYS = {"quant_method", "format", "config_groups", "ignore", "quantization_status", "kv_cache_scheme", "version"}
_HARMLESS = {"global_compression_ratio", "sparsity_config", "transform_config"}  # where they are empty
_WEIGHTS = {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder", "block_structure"}
# What input_activations may say; by token the step is found as a token comes, by tensor it is a tensor of the file.
_INPUTS: dict[tuple[Any, Any], str] = {("token", True): "token", ("tensor", False): "tensor"}
# How scales were found, and the dtypes of tensors that say their own.
_FOUND = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
_UNBOUNDED = re.compile(r"[*+{]")


def _expression(text: str) -> re.Pattern[str]:
    """A target's regular expression, refused where matching it could take for ever."""
    odd = re.search(r"\)[*+{]|\(\?[^:]|\\[0-9]", text) or len(text) > 200 or len(_UNBOUNDED.findall(text)) > 4
    try:
        if odd:
            raise ValueError("it repeats too much to be matched safely")
        return re.compile(text)
    except (re.error, ValueError) as error:
        raise ValueError(f"quantization_config has the target 're:{text[:80]}', which is not read: {error}.") from None


@dataclasses.dataclass(frozen=True)
class ConfigGroup:
    """Modules that share a number format.

    Attributes:
      targets: module names, ``re:`` expressions over them, or the class "Linear".
      scheme: their format.
    """

    targets: tuple[str, ...]
    scheme: Scheme

    def rank(self, name: str) -> int | None:
        """How exactly a target names a module: 0 by name, 1 by expression, 2 by class; None not at all."""
        found = [
            1 if target.startswith("re:") else 0
            for target in self.targets
            if (_expression(target[3:]).match(name) if target.startswith("re:") else target == name)
        ]
        return min(found, default=2 if "Linear" in self.targets else None)


def _inputs(given: Any, where: str) -> str:
    """`Scheme.activations` of ``input_activations``."""
    if not given:
        return "float"
    if not isinstance(given, dict):
        raise ValueError(f"{where}.input_activations is no object.")
    unknown = sorted(set(given) - _WEIGHTS - _FOUND)
    if unknown:
        raise ValueError(f"{where}.input_activations has attributes that are not understood: {', '.join(unknown)}.")
    kind = (given.get("num_bits"), given.get("type", "int"), given.get("symmetric", True))
    how = (given.get("strategy"), given.get("dynamic", False))
    others = [key for key in ("group_size", "block_structure", "actorder") if given.get(key)]
    if kind != (8, "int", True) or how not in _INPUTS or others:
        raise ValueError(
            f"{where} has input_activations of {kind[0]!r} bits, type {kind[1]!r}, strategy {how[0]!r}, dynamic "
            f"{how[1]!r}; symmetric int8 is read, by token and dynamic or by tensor and static."
        )
    return _INPUTS[how]


def _scheme(weights: Any, where: str) -> Scheme:
    if not isinstance(weights, dict):
        raise ValueError(f"{where} does not say how weights are quantized.")
    unknown = sorted(set(weights) - _WEIGHTS - _FOUND)
    if unknown:
        raise ValueError(f"{where}.weights has attributes that are not understood: {', '.join(unknown)}.")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    if type(bits) is not int or kind != "int" or bits not in (2, 3, 4, 8):
        raise ValueError(f"{where}: {bits!r} bits of type {kind!r} are not read; integers of 2, 3, 4 and 8 bits are.")
    size: Any = weights.get("group_size")
    if strategy == "channel" and size is None:
        size = -1
    if type(size) is not int or ((strategy, size) != ("channel", -1) and (strategy not in ("group", None) or size < 1)):
        raise ValueError(
            f"{where}: strategy {strategy!r} with group_size={size!r} is not read; 'group' with a size and 'channel' "
            "are."
        )
    if weights.get("actorder") in ("group", True) or weights.get("dynamic") or weights.get("block_structure"):
        raise ValueError(f"{where}: activation order, dynamic and block-wise weights are not read.")
    symmetric = weights.get("symmetric", True)
    if type(symmetric) is not bool:
        raise ValueError(f"{where}: symmetric is {symmetric!r}, neither true nor false.")
    return Scheme(bits, size, symmetric)


def _group(name: str, group: Any, format: str) -> ConfigGroup:
    where = f"quantization_config.config_groups.{name}"
    if not isinstance(group, dict) or group.get("output_activations"):
        raise ValueError(f"{where} quantizes output activations, or is no object; this is not read.")
    if group.get("format") not in (None, format):
        raise ValueError(f"{where} has the format {group['format']!r} and the whole {format!r}, which is not read.")
    targets = group.get("targets")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{where} has no list of targets.")
    inputs, scheme = _inputs(group.get("input_activations"), where), _scheme(group.get("weights"), where)
    if format == PACKED and inputs != "float":
        raise ValueError(f"{where} quantizes activations, and the format is {PACKED!r}; {INTS!r} has int8 activations.")
    if format == INTS and (scheme.bits != 8 or not scheme.symmetric):
        found = form(scheme.bits, scheme.group_size, symmetric=scheme.symmetric)
        raise ValueError(f"{where}: {INTS!r} is read with symmetric weights of 8 bits, not {found}.")
    if inputs != "float" and scheme.group_size != -1:
        raise ValueError(f"{where}: int8 activations are read with one scale a column of weights (strategy 'channel').")
    return ConfigGroup(tuple(targets), dataclasses.replace(scheme, activations=inputs))


def read_groups(config: Mapping[str, Any]) -> tuple[tuple[ConfigGroup, ...], tuple[str, ...]]:
    """The groups and the modules that stay dense.

    Raises:
      ValueError: anything that is not understood, with its place.
    """
    unknown = sorted(set(config) - _KEYS - {key for key in _HARMLESS if not config.get(key)})
    if unknown:
        raise ValueError(f"quantization_config has attributes that are not understood: {', '.join(unknown)}.")
    format = config.get("format")
    if format not in (PACKED, INTS) or config.get("quantization_status", "compressed") != "compressed":
        raise ValueError(
            f"compressed-tensors with format {format!r} and status {config.get('quantization_status')!r} is not read; "
            f"a compressed {PACKED!r} or {INTS!r} is."
        )
    if config.get("kv_cache_scheme"):
        raise ValueError("the checkpoint asks for a quantized key and value cache, which is not supported.")
    groups, ignore = config.get("config_groups"), config.get("ignore") or []
    if not isinstance(groups, dict) or not groups or not isinstance(ignore, list):
        raise ValueError("quantization_config has no config_groups, or its ignore is no list.")
    if not all(isinstance(name, str) for name in ignore):
        raise ValueError(f"quantization_config.ignore is {str(ignore)[:80]}; it is a list of module names.")
    return tuple(_group(name, group, format) for name, group in groups.items()), tuple(ignore)


def scheme_of(groups: tuple[ConfigGroup, ...], name: str) -> Scheme:
    """The number format that a config gives a module.

    Raises:
      ValueError: no target matches it.
    """
    if len(groups) == 1:
        return groups[0].scheme
    ranked = [(rank, group.scheme) for group in groups if (rank := group.rank(name)) is not None]
    if not ranked:
        raise ValueError(f"{name!r} is quantized, but no target of quantization_config matches it.")
    return min(ranked)[1]


def groups_of(schemes: Mapping[str, Scheme]) -> tuple[ConfigGroup, ...]:
    """One group for every format in use: by class where there is one, by module names where there are more."""
    found: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        found.setdefault(scheme, []).append(name)
    if len(found) == 1:
        return (ConfigGroup(("Linear",), next(iter(found))),)
    return tuple(ConfigGroup(tuple(sorted(names)), scheme) for scheme, names in sorted(found.items()))


def _weights(scheme: Scheme) -> dict[str, Any]:
    whole = scheme.group_size == -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _input_activations(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.activations == "float":
        return None
    strategy, dynamic = next(how for how, kind in _INPUTS.items() if kind == scheme.activations)
    inputs = {**_weights(scheme), "strategy": strategy, "dynamic": dynamic}
    return {**inputs, "observer": None} if dynamic else inputs


def to_config(groups: tuple[ConfigGroup, ...], ignore: tuple[str, ...], format: str = PACKED) -> dict[str, Any]:
    """The ``quantization_config`` that vLLM, transformers and `read_groups` read."""
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": list(group.targets),
                "weights": _weights(group.scheme),
                "input_activations": _input_activations(group.scheme),
                "output_activations": None,
            }
            for index, group in enumerate(groups)
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }
