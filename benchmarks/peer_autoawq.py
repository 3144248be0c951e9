# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Quantize with AutoAWQ; `peers.py` runs this in AutoAWQ's own environment.

    python peer_autoawq.py awq 4 SRC tokens.json OUT

Writes the weights that it computes with, and prints the seconds of its search and packing as JSON. On a CPU AutoAWQ
keeps no copy of the weights that it scales while it searches, and every candidate builds on the one before: here it
gets one.
"""

import json
import sys
from typing import Any

import torch
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer
from awq.utils.packing_utils import dequantize_gemm
from peer_score import clocks, spent_since, tokens_of, write_effective
from transformers import PreTrainedTokenizerFast


def with_copies(search: Any) -> Any:
    """AutoAWQ's search of a scale; its ``state_dict().cpu()`` is a copy on a GPU and the weights themselves here."""

    def searched(self: Any, x: Any, w_mean: Any, x_mean: Any, module: Any, *rest: Any, **named: Any) -> Any:
        state_dict = module.state_dict
        module.state_dict = lambda *a, **k: {name: t.clone() for name, t in state_dict(*a, **k).items()}
        try:
            return search(self, x, w_mean, x_mean, module, *rest, **named)
        finally:
            del module.state_dict

    return searched


def effective(model: Any) -> dict[str, torch.Tensor]:
    """The state dict with quantized weights made dense by AutoAWQ itself."""
    found = {n: p for n, p in model.state_dict().items() if n.rpartition(".")[2] not in ("qweight", "qzeros", "scales")}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            parts = (module.qweight, module.qzeros, module.scales.float())
            found[f"{name}.weight"] = dequantize_gemm(*parts, module.w_bit, module.group_size).T.contiguous()
    return found


def main(method: str, bits: str, src: str, tokens: str, out: str) -> None:
    """Quantize once."""
    if (method, bits) != ("awq", "4"):
        raise SystemExit(f"AutoAWQ has AWQ with 4 bits, not {method} with {bits}")
    AwqQuantizer._compute_best_scale = with_copies(AwqQuantizer._compute_best_scale)
    samples = tokens_of(tokens)["calibration"]
    model = AutoAWQForCausalLM.from_pretrained(src, device_map="cpu", safetensors=True, torch_dtype=torch.float32)
    begun = clocks()
    model.quantize(
        PreTrainedTokenizerFast(tokenizer_file=f"{src}/tokenizer.json"),
        quant_config={"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
        calib_data=samples,
        max_calib_samples=len(samples),
        max_calib_seq_len=max(map(len, samples)),
    )
    spent = spent_since(begun)
    write_effective(src, out, effective(model.model))
    print(json.dumps(spent))


if __name__ == "__main__":
    main(*sys.argv[1:])
