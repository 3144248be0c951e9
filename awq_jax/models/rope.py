# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings, and how their frequencies are stretched for long contexts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["RopeScaling", "frequencies", "rope_from_hf", "rotate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Stretching of the rotary frequencies.

    Attributes:
      kind: "linear" divides all of them by factor; "llama3" only the long wavelengths, with a smooth passage.
      factor: how far.
      low_freq_factor: wavelengths above original/low are divided ("llama3").
      high_freq_factor: wavelengths below original/high stay ("llama3").
      original: positions of the first training ("llama3").
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original: int = 8192


_NAMES = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original",
}
_NEEDS = {"default": (), "linear": ("factor",), "llama3": tuple(_NAMES)}


def _positive(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"config: {name} is {value!r}; it must be a positive number.")
    return float(value)


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
    if kinds[0] not in tuple(_NEEDS):
        raise ValueError(f"config: rope scaling {kinds[0]!r} is not implemented; {', '.join(_NEEDS)} are.")
    kind = kinds[0]
    if unknown := sorted(given.keys() - _NAMES.keys()):
        raise ValueError(f"config: rope scaling {kind!r} has {', '.join(unknown)}, which is not understood.")
    if missing := [name for name in _NEEDS[kind] if name not in given]:
        raise ValueError(f"config: rope scaling {kind!r} lacks {', '.join(missing)}.")
    if kind == "default":
        return theta, None
    fields: dict[str, Any] = {_NAMES[name]: _positive(name, given[name]) for name in _NEEDS[kind]}
    if kind == "llama3":
        fields["original"] = int(fields["original"])
        if fields["high_freq_factor"] <= fields["low_freq_factor"]:
            raise ValueError("config: rope scaling 'llama3' needs a high_freq_factor above its low_freq_factor.")
    return theta, RopeScaling(kind=kind, **fields)


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angular frequency of each pair of channels, float32 ``[head_dim / 2]``."""
    base = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return base.astype(np.float32)
    if scaling.kind == "linear":
        return (base / scaling.factor).astype(np.float32)
    wavelength = 2 * math.pi / base
    turns = scaling.original / wavelength
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * base / scaling.factor + smooth * base).astype(np.float32)


def rotate(x: Float[Array, "b t h d"], positions: Int[Array, "b t"], freqs: np.ndarray) -> Float[Array, "b t h d"]:
    """Rotate channel pairs (i, i + d/2) by position times frequency, in float32."""
    angle = positions[..., None, None].astype(jnp.float32) * jnp.asarray(freqs)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
