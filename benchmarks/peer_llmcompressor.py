# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Quantize with llm-compressor; `peers.py` runs this in llm-compressor's own environment.

    python peer_llmcompressor.py awq|gptq|nearest BITS SRC tokens.json OUT

Writes the weights that it computes with, and prints the seconds of its oneshot call as JSON. GPTQ gets what it takes by
default: blocks of 128, damping 0.01, rows ordered by activation with the groups as they lie.
"""

import json
import sys
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from peer_score import clocks, load, spent_since, tokens_of, write_effective
from transformers import PreTrainedTokenizerFast

if not torch.cuda.is_available():  # it pins its caches, which needs a driver
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # pyright: ignore[reportAttributeAccessIssue]

MODIFIERS = {"awq": AWQModifier, "gptq": GPTQModifier, "nearest": QuantizationModifier}


def format_of(bits: int) -> dict[str, Any]:
    """Asymmetric weights in groups of 128."""
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def effective(model: Any) -> dict[str, torch.Tensor]:
    """The state dict with every linear's weight as what it multiplies by."""
    found = {name: p for name, p in model.state_dict().items() if not name.rpartition(".")[2].startswith("weight_")}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                found[f"{name}.weight"] = module(torch.eye(module.in_features)).T.contiguous()
    return found


def main(method: str, bits: str, src: str, tokens: str, out: str) -> None:
    """Quantize once."""
    model, samples = load(src), tokens_of(tokens)["calibration"]
    data = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(ids) for ids in samples]})
    recipe = [MODIFIERS[method](ignore=["lm_head"], **format_of(int(bits)))]
    calibrated: dict[str, Any] = {
        "tokenizer": PreTrainedTokenizerFast(tokenizer_file=f"{src}/tokenizer.json"),
        "dataset": data,
        "max_seq_length": max(map(len, samples)),
        "num_calibration_samples": len(samples),
    }
    begun = clocks()
    oneshot(model=model, recipe=recipe, **({} if method == "nearest" else calibrated))
    spent = spent_since(begun)
    write_effective(src, out, effective(model))
    print(json.dumps(spent))


if __name__ == "__main__":
    main(*sys.argv[1:])
