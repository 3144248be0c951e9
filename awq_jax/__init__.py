# SPDX-License-Identifier: Apache-2.0
"""awq-jax: activation-aware weight quantization for JAX.

Three verbs: `calibrate` (what do the activations look like), `search_scale` and `fold_scale` (protect the weights that
matter, exactly), `quantize` (round and pack). `quantize_checkpoint` runs them over a Hugging Face directory.

Names are imported when first used, so that ``import awq_jax`` and the command line start at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from awq_jax._version import __version__ as __version__

if TYPE_CHECKING:
    from awq_jax import adapt as adapt
    from awq_jax import linen as linen
    from awq_jax import models as models
    from awq_jax import nnx as nnx
    from awq_jax import run as run
    from awq_jax import serving as serving
    from awq_jax import train as train
    from awq_jax._clip import search_clip as search_clip
    from awq_jax._clip import settle_clip as settle_clip
    from awq_jax._fold import fold_scale as fold_scale
    from awq_jax._outliers import plant_outliers as plant_outliers
    from awq_jax._plan import plan_layers as plan_layers
    from awq_jax._qtensor import QTensor as QTensor
    from awq_jax._qtensor import dequantize as dequantize
    from awq_jax._qtensor import matmul as matmul
    from awq_jax._quantize import quantize_layer as quantize_layer
    from awq_jax._round import quantize as quantize
    from awq_jax._search import ScaleResult as ScaleResult
    from awq_jax._search import search_scale as search_scale
    from awq_jax._spec import GPTQSpec as GPTQSpec
    from awq_jax._spec import QuantSpec as QuantSpec
    from awq_jax._spec import Recipe as Recipe
    from awq_jax._spec import RefineSpec as RefineSpec
    from awq_jax._spec import ScaleRule as ScaleRule
    from awq_jax._spec import SearchSpec as SearchSpec
    from awq_jax._spec import SmoothSpec as SmoothSpec
    from awq_jax._spec import rule as rule
    from awq_jax._stats import ActStats as ActStats
    from awq_jax._stats import all_reduce as all_reduce
    from awq_jax._stats import calibrate as calibrate
    from awq_jax._stats import merge as merge
    from awq_jax._stats import observe as observe
    from awq_jax._tie import Tie as Tie
    from awq_jax.pipeline import quantize_checkpoint as quantize_checkpoint

_HOME = {
    "_clip": ("search_clip", "settle_clip"),
    "_fold": ("fold_scale",),
    "_outliers": ("plant_outliers",),
    "_plan": ("plan_layers",),
    "_qtensor": ("QTensor", "dequantize", "matmul"),
    "_quantize": ("quantize_layer",),
    "_round": ("quantize",),
    "_search": ("ScaleResult", "search_scale"),
    "_spec": ("GPTQSpec", "QuantSpec", "Recipe", "RefineSpec", "ScaleRule", "SearchSpec", "SmoothSpec", "rule"),
    "_stats": ("ActStats", "all_reduce", "calibrate", "merge", "observe"),
    "_tie": ("Tie",),
    "pipeline": ("quantize_checkpoint",),
}
_ROOMS = ("adapt", "linen", "lm_eval", "models", "nnx", "run", "serving", "train")  # awq_jax.run.load_model just works
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"awq_jax.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'awq_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"awq_jax.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    # Who lists names asks for each: `help(awq_jax)` would end at a package that need not be installed.
    return [*__all__, *(room for room in _ROOMS if room != "lm_eval")]
