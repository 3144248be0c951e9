# SPDX-License-Identifier: Apache-2.0
"""StableLM 1.6B and 3B: Llama's layers, with norms that have a bias and a rotation of a quarter of each head."""

import dataclasses

from awq_jax.families._rows import norm, without
from awq_jax.families.llama import LLAMA

__all__ = ["STABLELM"]

L, HF = "layers/*", "model.layers.*"

STABLELM = dataclasses.replace(
    LLAMA,
    name="stablelm",
    architectures=("StableLmForCausalLM",),
    keys=(
        *(key for key in LLAMA.keys if "norm." not in key.theirs),
        *norm(f"{HF}.input_layernorm", f"{L}/input_norm", bias=True),
        *norm(f"{HF}.post_attention_layernorm", f"{L}/post_norm", bias=True),
        *norm("model.norm", "norm", bias=True),
    ),
    options=(("norm", "layer"),),
    config=(
        *without(LLAMA.config, "attention_bias", "mlp_bias", "rms_norm_eps"),
        ("layer_norm_eps", "norm_eps"),
        ("use_qkv_bias", "qkv_bias"),
        ("partial_rotary_factor", "rotary_fraction"),
    ),
    defaults=(("layer_norm_eps", 1e-5), ("partial_rotary_factor", 0.25)),
    accepts=(
        *LLAMA.accepts,
        ("qk_layernorm", (False,)),
        ("use_parallel_residual", (False,)),  # the 12B has one norm for both branches: another table
        ("rope_pct", (0.25,)),
    ),
    ignores=("hidden_dropout", "norm_eps"),
)
