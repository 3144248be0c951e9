# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as other programs write them, packed here by the definitions of their formats."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

__all__ = [
    "MODELOPT",
    "modelopt_bytes",
    "quantized_linears",
    "save_foreign",
    "save_gptq",
    "save_modelopt",
    "sequential",
]

MODELOPT = {
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quantization": {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": None,
        "group_size": 8,
        "has_zero_point": False,
        "pre_quant_scale": True,
        "exclude_modules": ["lm_head"],
    },
}


def sequential(codes: np.ndarray, bits: int = 4) -> np.ndarray:
    """Words along the last axis, as the formats define them: code i in the bits from ``i * bits`` on."""
    each = 32 // bits
    parts = codes.astype(np.uint32).reshape(len(codes), -1, each) << (bits * np.arange(each, dtype=np.uint32))
    return np.bitwise_or.reduce(parts, axis=-1).view(np.int32)


def modelopt_bytes(values: np.ndarray) -> np.ndarray:
    """Signed codes ``[n, k]`` to bytes ``[n/2, k]``: the even output in the low half, in two's complement."""
    halves = values.astype(np.int64) % 16
    return (halves[0::2] + 16 * halves[1::2]).astype(np.uint8)


def quantized_linears(
    tensors: Mapping[str, np.ndarray], group: int = 8
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(module, codes -8 … 7 ``[n, k]``, scales ``[n, k/g]``) of every linear of a layer of a Llama."""
    for name in sorted(tensors):
        if name.endswith("_proj.weight"):
            weight = tensors[name].astype(np.float32)
            n, k = weight.shape
            grouped = weight.reshape(n, k // group, group)
            scale = np.abs(grouped).max(-1) / 7
            yield name.removesuffix(".weight"), np.clip(np.rint(grouped / scale[..., None]), -8, 7).reshape(n, k), scale


def save_foreign(
    dense: Path, out: Path, config: Mapping[str, Any], linear: Callable[..., Mapping[str, np.ndarray]]
) -> None:
    """A dense directory with each linear replaced by the tensors that ``linear(module, codes, scales)`` gives."""
    tensors = load_file(dense / "model.safetensors")
    for module, codes, scale in list(quantized_linears(tensors)):
        del tensors[f"{module}.weight"]
        tensors |= {f"{module}.{part}": np.ascontiguousarray(a) for part, a in linear(module, codes, scale).items()}
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    said = json.loads((dense / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**said, "quantization_config": config}))


def save_modelopt(dense: Path, out: Path, factors: Callable[[str, int], np.ndarray | None] = lambda *_: None) -> None:
    """As ModelOpt's ``W4A16_AWQ``; ``factors(module, k)`` gives pre_quant_scale."""

    def linear(module: str, codes: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
        made = factors(module, codes.shape[1])
        parts = {"weight": modelopt_bytes(codes), "weight_scale": scale}
        return parts if made is None else {**parts, "pre_quant_scale": made}

    save_foreign(dense, out, {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "ignore": ["lm_head"]}, linear)
    (out / "hf_quant_config.json").write_text(json.dumps(MODELOPT))


def save_gptq(dense: Path, out: Path) -> None:
    """As GPTQ, file version 1: zeros of 8, kept less one."""

    def linear(module: str, codes: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
        n, k = codes.shape
        return {
            "qweight": sequential(codes + 8).T,
            "qzeros": sequential(np.full((k // 8, n), 7)),
            "scales": scale.T.astype(np.float16),
            "g_idx": (np.arange(k) // 8).astype(np.int32),
        }

    config = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": True}
    save_foreign(dense, out, config, linear)
