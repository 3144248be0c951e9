# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Quantize with llm-compressor's AWQ and measure the result; `peers.py` runs this in llm-compressor's own environment.

    python peer_llmcompressor.py SRC tokens.json        # {"calibration": [[id, …], …], "windows": [[id, …], …]}

Prints one line of JSON: seconds of the oneshot call, perplexity and KL to the dense model.
"""

import copy
import json
import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

if not torch.cuda.is_available():  # it pins its caches, which needs a driver
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # pyright: ignore[reportAttributeAccessIssue]


def main(src: str, tokens: str) -> None:
    """Quantize, then compare with the dense model."""
    with open(tokens, encoding="utf-8") as file:
        given = json.load(file)
    dense = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32).eval()
    model = copy.deepcopy(dense)
    samples = given["calibration"]
    data = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(ids) for ids in samples]})
    begun = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=f"{src}/tokenizer.json"),
        dataset=data,
        recipe=[AWQModifier(ignore=["lm_head"], scheme="W4A16_ASYM", targets=["Linear"])],
        max_seq_length=max(map(len, samples)),
        num_calibration_samples=len(samples),
    )
    seconds = time.perf_counter() - begun
    nll = kl = 0.0
    windows = torch.tensor(given["windows"])
    with torch.no_grad():
        for rows in windows.split(8):
            ours, base = (m(rows).logits[:, :-1].double().log_softmax(-1) for m in (model, dense))
            nll -= ours.gather(-1, rows[:, 1:, None]).sum().item()
            kl += (base.exp() * (base - ours)).sum().item()
    scored = windows.shape[0] * (windows.shape[1] - 1)
    found = {"seconds": seconds, "kl": kl / scored, "perplexity": float(torch.tensor(nll / scored).exp())}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
