# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Quantize with GPTQModel; `peers.py` runs this in GPTQModel's own environment.

    python peer_gptqmodel.py gptq 4 SRC tokens.json OUT

Writes the weights that it computes with, and prints the seconds of its `quantize` call as JSON. Asymmetric, in groups
of 128, the rest as it comes.
"""

import json
import os
import sys
from typing import Any

import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its pools want two, whatever the machine has

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from peer_score import clocks, spent_since, tokens_of, write_effective


def effective(model: Any) -> dict[str, torch.Tensor]:
    """The state dict with quantized weights made dense by GPTQModel itself."""
    packed = ("qweight", "qzeros", "scales", "g_idx")
    found = {n: p for n, p in model.state_dict().items() if n.rpartition(".")[2] not in packed}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            module.scales = module.scales.float()  # with float16 ones the product would be rounded
            found[f"{name}.weight"] = module.dequantize_weight().T.contiguous()
    return found


def main(method: str, bits: str, src: str, tokens: str, out: str) -> None:
    """Quantize once."""
    if method != "gptq":
        raise SystemExit(f"GPTQModel is run for GPTQ here, not {method}")
    config = QuantizeConfig(bits=int(bits), group_size=128, sym=False, format="gptq_v2", device="cpu")
    model = GPTQModel.load(src, config, backend=BACKEND.TORCH)
    samples = tokens_of(tokens)["calibration"]
    begun = clocks()
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples], batch_size=1)
    spent = spent_since(begun)
    model.save(f"{out}-packed")
    read = GPTQModel.load(f"{out}-packed", backend=BACKEND.GPTQ_TORCH, device="cpu")
    write_effective(src, out, effective(read.model))
    print(json.dumps(spent))


if __name__ == "__main__":
    main(*sys.argv[1:])
