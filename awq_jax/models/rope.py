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


def rope_from_hf(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``.

    Raises:
      ValueError: a kind of scaling that is not implemented.
    """
    given = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = float(given.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"config: rope scaling {kind!r} is not implemented; 'default', 'linear' and 'llama3' are.")
    names = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original",
    }
    unknown = sorted(given.keys() - names.keys())
    if unknown or "factor" not in given:
        raise ValueError(f"config: rope scaling {kind!r} with {unknown or 'no factor'} is not understood.")
    return theta, RopeScaling(kind=kind, **{names[k]: v for k, v in given.items()})


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
