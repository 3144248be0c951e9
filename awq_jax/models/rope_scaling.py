# SPDX-License-Identifier: Apache-2.0
"""How rotary frequencies are stretched for long contexts, read from a config and worked out."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

__all__ = ["RopeScaling", "frequencies", "rope_from_hf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Stretching of the rotary frequencies.

    Attributes:
      kind: "linear" divides all of them by factor; "llama3" only the long wavelengths, with a smooth passage; "yarn"
        the same with a passage linear in the channel; "longrope" each by a factor of its own.
      factor: how far.
      low_freq_factor: wavelengths above original/low are divided ("llama3").
      high_freq_factor: wavelengths below original/high stay ("llama3").
      original: positions of the first training.
      beta_fast: channels that turn more often than this in the original positions stay ("yarn").
      beta_slow: those that turn less often are divided ("yarn").
      truncate: the passage begins and ends at whole channels ("yarn").
      attention_factor: q and k are multiplied by it ("yarn", "longrope").
      short: divisors for texts of up to original positions, one for each pair of channels ("longrope").
      long: divisors for longer ones.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()


_NAMES = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
    "short_factor": "short",
    "long_factor": "long",
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": _LLAMA3,
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
# Of "yarn" and "longrope"; the others tolerate what they do not use, as files carry it.
_MAY = {
    "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor"),
    "longrope": ("original_max_position_embeddings", "factor", "attention_factor"),
}


def _positive(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"config: {name} is {value!r}; it must be a positive number.")
    return float(value)


def _value(name: str, value: Any) -> Any:
    """One attribute of the scaling in our form."""
    if name == "truncate":
        if type(value) is not bool:
            raise ValueError(f"config: truncate is {value!r}; it must be true or false.")
        return value
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, list):
            raise ValueError(f"config: {name} must be a list of positive numbers.")
        return tuple(_positive(name, each) for each in value)
    number = _positive(name, value)
    return int(number) if name == "original_max_position_embeddings" else number


def rope_from_hf(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``.

    Raises:
      ValueError: a kind of scaling that is not implemented, or one that is not described as it should be.
    """
    found = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"config: rope_scaling is {found!r}; it must be an object.")
    given = {key: value for key, value in found.items() if value is not None}
    theta = given.pop("rope_theta", hf.get("rope_theta"))
    theta = _positive("rope_theta", 10000.0 if theta is None else theta)
    kinds = [given.pop(key) for key in ("rope_type", "type") if key in given] or ["default"]
    kind = "longrope" if kinds[0] == "su" else kinds[0]  # what Phi-3's first files call it
    if kind not in tuple(_NEEDS):
        raise ValueError(f"config: rope scaling {kind!r} is not implemented; {', '.join(_NEEDS)} are.")
    understood = {*_LLAMA3, *_NEEDS[kind], *_MAY.get(kind, ())}
    if unknown := sorted(given.keys() - understood):
        raise ValueError(f"config: rope scaling {kind!r} has {', '.join(unknown)}, which is not understood.")
    if missing := [name for name in _NEEDS[kind] if name not in given]:
        raise ValueError(f"config: rope scaling {kind!r} lacks {', '.join(missing)}.")
    if kind == "default":
        return theta, None
    used = (name for name in (*_NEEDS[kind], *_MAY.get(kind, ())) if name in given)
    fields: dict[str, Any] = {_NAMES[name]: _value(name, given[name]) for name in used}
    if kind == "llama3" and fields["high_freq_factor"] <= fields["low_freq_factor"]:
        raise ValueError("config: rope scaling 'llama3' needs a high_freq_factor above its low_freq_factor.")
    if kind in ("yarn", "longrope"):
        fields = _stretched(kind, fields, hf)
    return theta, RopeScaling(kind=kind, **fields)


def _stretched(kind: str, fields: dict[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    """What "yarn" and "longrope" take from the rest of the config, and the factor for q and k."""
    positions = _positive("max_position_embeddings", hf.get("max_position_embeddings", 2048))
    beside = hf.get("original_max_position_embeddings")  # Phi-3 keeps it outside the scaling
    original = int(_positive("original_max_position_embeddings", beside or fields.get("original", positions)))
    factor = fields.get("factor", positions / original)
    if kind == "yarn":
        attention = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    else:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {"attention_factor": attention, **fields, "original": original, "factor": factor}


def frequencies(dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angular frequency of each pair of channels, float32 ``[dim / 2]``; "longrope" has two rows, short and long.

    Raises:
      ValueError: "longrope" with other than ``dim / 2`` divisors.
    """
    base = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling is None:
        return base.astype(np.float32)
    if scaling.kind == "linear":
        return (base / scaling.factor).astype(np.float32)
    if scaling.kind == "longrope":
        if {len(scaling.short), len(scaling.long)} != {dim // 2}:
            raise ValueError(
                f"config: short_factor and long_factor have {len(scaling.short)} and {len(scaling.long)} entries; "
                f"{dim} channels turn in pairs, which takes {dim // 2}."
            )
        return (base / np.array([scaling.short, scaling.long])).astype(np.float32)
    kept = _kept_llama3(base, scaling) if scaling.kind == "llama3" else _kept_yarn(dim, theta, scaling)
    return ((1 - kept) * base / scaling.factor + kept * base).astype(np.float32)


def _kept_llama3(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """1 where a frequency stays, 0 where it is divided."""
    turns = scaling.original * base / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return np.clip(smooth, 0.0, 1.0)


def _kept_yarn(dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """1 where a frequency stays, 0 where it is divided."""
    channel = lambda turns: dim * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(theta))
    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    return 1 - np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0)
