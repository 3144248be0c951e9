# SPDX-License-Identifier: Apache-2.0
"""Phi-3, Phi-3.5 and Phi-4: Llama's layers, with q, k and v in one tensor and gate and up in another."""

import dataclasses

from awq_jax.families._rows import linear, without
from awq_jax.families.llama import LLAMA

__all__ = ["PHI3"]

L, HF = "layers/*", "model.layers.*"

PHI3 = dataclasses.replace(
    LLAMA,
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    keys=(
        *(key for key in LLAMA.keys if "_proj." not in key.theirs),
        *linear(f"{HF}.self_attn.qkv_proj", (f"{L}/attn/q", f"{L}/attn/k", f"{L}/attn/v")),
        *linear(f"{HF}.self_attn.o_proj", f"{L}/attn/o"),
        *linear(f"{HF}.mlp.gate_up_proj", (f"{L}/mlp/gate", f"{L}/mlp/up")),
        *linear(f"{HF}.mlp.down_proj", f"{L}/mlp/down"),
    ),
    config=(
        *without(LLAMA.config, "attention_bias", "mlp_bias"),
        ("partial_rotary_factor", "rotary_fraction"),
        ("sliding_window", "sliding_window"),
    ),
    defaults=(("rms_norm_eps", 1e-5), ("max_position_embeddings", 4096)),
    accepts=(*LLAMA.accepts, ("attention_bias", (False,)), ("mlp_bias", (False,))),
    # The original positions are read with the scaling of the rotation.
    ignores=("original_max_position_embeddings", "resid_pdrop", "embd_pdrop"),
)
