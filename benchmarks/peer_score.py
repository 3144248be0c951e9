# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Perplexity and KL divergence of dense checkpoints by Hugging Face's PyTorch model; `peers.py` scores all with it.

    python peer_score.py DENSE tokens.json CHECKPOINT ...

The other `peer_*.py` write what their tool computes with as such a checkpoint, with `write_effective`. Prints one line
of JSON for each checkpoint.
"""

import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def clocks() -> tuple[float, float]:
    """The wall's and the processor's, all threads, in seconds."""
    return time.perf_counter(), time.process_time()


def spent_since(begun: tuple[float, float]) -> dict[str, float]:
    """What both say."""
    wall, processor = clocks()
    return {"seconds": wall - begun[0], "processor_seconds": processor - begun[1]}


def load(path: str | pathlib.Path) -> Any:
    """A dense model in float32."""
    return AutoModelForCausalLM.from_pretrained(str(path), torch_dtype=torch.float32).eval()


def tokens_of(path: str) -> dict[str, Any]:
    """``{"calibration": [[id, …], …], "windows": [[id, …], …]}``."""
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


def write_effective(src: str, out: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Write SRC with some of its weights replaced; names as in its state dict."""
    model = load(src)
    missing = model.load_state_dict({name: w.detach().float() for name, w in weights.items()}, strict=False)
    if missing.unexpected_keys:
        raise SystemExit(f"{src} has no {missing.unexpected_keys[:3]}")
    model.save_pretrained(out)


def score(model: Any, dense: Any, windows: list[list[int]]) -> dict[str, float]:
    """Over all positions but the first of each window."""
    nll = kl = 0.0
    rows = torch.tensor(windows)
    with torch.no_grad():
        for part in rows.split(8):
            ours, base = (m(input_ids=part).logits[:, :-1].double().log_softmax(-1) for m in (model, dense))
            nll -= ours.gather(-1, part[:, 1:, None]).sum().item()
            kl += (base.exp() * (base - ours)).sum().item()
    scored = rows.shape[0] * (rows.shape[1] - 1)
    return {"kl": kl / scored, "perplexity": float(torch.tensor(nll / scored).exp())}


def main(src: str, tokens: str, *checkpoints: str) -> None:
    """Score each."""
    dense, windows = load(src), tokens_of(tokens)["windows"]
    for path in checkpoints:
        print(json.dumps(score(load(path), dense, windows)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
