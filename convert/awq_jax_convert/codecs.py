# SPDX-License-Identifier: Apache-2.0
"""Which quantized format a checkpoint is in: one row per format."""

from collections.abc import Callable, Mapping
from typing import Any

from awq_jax_convert.autoawq import AutoAWQ
from awq_jax_convert.awq_gemv import AWQFast, AWQGemv
from awq_jax_convert.codec import Codec
from awq_jax_convert.compressed_tensors import CompressedTensors
from awq_jax_convert.compressed_tensors_config import INTS
from awq_jax_convert.gptq import GPTQ
from awq_jax_convert.int_quantized import IntQuantized
from awq_jax_convert.modelopt import ModelOpt

__all__ = ["codec_of"]


def _awq(config: Mapping[str, Any]) -> Codec:
    """AWQ's files by their version; llm-awq's own are what AutoAWQ calls gemv_fast."""
    found = AutoAWQ.from_config(config)
    version = str(config.get("version", "gemm")).lower()
    if version == "gemm":
        return found
    if found.group_size == -1:
        raise ValueError(f"AWQ version {version!r} with group_size=-1 is not read.")
    fast = version == "gemv_fast" or config.get("backend") == "llm-awq"
    return AWQFast(found.group_size) if fast else AWQGemv(found.group_size)


def _compressed_tensors(config: Mapping[str, Any]) -> Codec:
    """Its two forms: packed words, and bytes."""
    return (IntQuantized if config.get("format") == INTS else CompressedTensors).from_config(config)


_FORMATS: dict[str, Callable[[Mapping[str, Any]], Codec]] = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "gptq": GPTQ.from_config,
    "modelopt": ModelOpt.from_config,
}


def codec_of(config: Any) -> Codec | None:
    """The codec that a ``quantization_config`` asks for, None for a dense checkpoint.

    Raises:
      ValueError: the method, or something it says, is not read here.
    """
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(method, str) or method not in _FORMATS:
        raise ValueError(
            f"the checkpoint is quantized with {method!r}, which is not read; read are {', '.join(_FORMATS)}. "
            "Convert it to that, or start from the dense checkpoint."
        )
    return _FORMATS[method](config)
