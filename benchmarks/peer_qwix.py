# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Quantize with qwix, matrix by matrix; `peers.py` runs this where qwix, torch and transformers are installed.

    python peer_qwix.py awq|gptq|nearest 4 SRC tokens.json OUT

qwix keeps an AWQ scale beside its weight, so no INT4 checkpoint holds its result: what is written are the weights that
it would use, ``dequantize(Q(w s)) / s``. The search, the rounding and the quantizer are its own. The statistics are the
mean magnitude and the Hessian of each linear's inputs in the float model, as its calibration takes them. AWQ and
nearest have zero points; GPTQ fails on them (0.1.8 asks a whole array whether it is true) and is symmetric.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peer_score import clocks, load, spent_since, tokens_of, write_effective
from qwix._src.core import qarray
from qwix.contrib import awq_core, gptq_core


def observe(model: Any, samples: list[list[int]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By linear: mean of |x| and ``X'X`` over all tokens."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    sums = {n: (torch.zeros(m.in_features), torch.zeros(m.in_features, m.in_features)) for n, m in linears.items()}

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            sums[name][0].add_(x.abs().sum(0))
            sums[name][1].add_(x.T @ x)

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    with torch.no_grad():
        for ids in samples:
            model(input_ids=torch.tensor([ids]))
    for handle in hooks:
        handle.remove()
    tokens = sum(map(len, samples))
    return {name: ((mean / tokens).numpy(), gram.numpy()) for name, (mean, gram) in sums.items()}


def rounded(method: str, w: jax.Array, mean: jax.Array, hessian: jax.Array) -> jax.Array:
    """The weight ``[out, in]`` that qwix would use."""
    calibration = "absmax" if method == "gptq" else "minmax"
    how = qarray.HowToQuantize(
        qtype=jnp.int4, channelwise_axes=[0], tiled_axes={1: 128}, calibration_method=calibration
    )
    if method == "gptq":
        return qarray.dequantize(gptq_core.quantize_weight(w, hessian, how)[0])
    if method == "nearest":
        return qarray.dequantize(qarray.quantize(w, how))
    quantized, scale = awq_core.quantize_weight(w, mean, how)
    return qarray.dequantize(quantized) / scale


def main(method: str, bits: str, src: str, tokens: str, out: str) -> None:
    """Quantize once."""
    if bits != "4":
        raise SystemExit(f"qwix has jax's integer types: 4 bits, not {bits}")
    model = load(src)
    begun, weights = clocks(), {}
    for name, (mean, gram) in observe(model, tokens_of(tokens)["calibration"]).items():
        w = jnp.asarray(model.get_submodule(name).weight.detach().numpy())
        new = rounded(method, w, jnp.asarray(mean), jnp.asarray(gram))
        weights[f"{name}.weight"] = torch.from_numpy(np.array(new, np.float32))
    spent = spent_since(begun)
    write_effective(src, out, weights)
    print(json.dumps(spent))


if __name__ == "__main__":
    main(*sys.argv[1:])
