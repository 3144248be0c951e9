# SPDX-License-Identifier: Apache-2.0
"""Gemma 2: norms on both sides of attention and MLP, capped scores and logits, a window in every other layer."""

import dataclasses

from awq_jax.families._rows import norm
from awq_jax.families.gemma import GEMMA

__all__ = ["GEMMA2", "NORMS"]

L, HF = "layers/*", "model.layers.*"

NORMS = (
    *norm(f"{HF}.input_layernorm", f"{L}/input_norm"),
    *norm(f"{HF}.post_attention_layernorm", f"{L}/attn_out_norm"),  # of attention's output, not before the MLP
    *norm(f"{HF}.pre_feedforward_layernorm", f"{L}/post_norm"),
    *norm(f"{HF}.post_feedforward_layernorm", f"{L}/mlp_out_norm"),
)

GEMMA2 = dataclasses.replace(
    GEMMA,
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    keys=(*(key for key in GEMMA.keys if "_layernorm" not in key.theirs), *NORMS),
    options=(("norm_offset", 1.0), ("scale_embedding", True), ("norm_placement", "both")),
    config=(
        *GEMMA.config,
        ("hidden_activation", "activation"),
        ("query_pre_attn_scalar", "query_scalar"),
        ("attn_logit_softcapping", "attn_softcap"),
        ("final_logit_softcapping", "logit_softcap"),
        ("sliding_window", "sliding_window"),
    ),
    defaults=(
        *GEMMA.defaults,
        ("hidden_activation", "gelu_pytorch_tanh"),
        ("query_pre_attn_scalar", 256),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("sliding_window", 4096),
    ),
    full_every=2,
    accepts=(("use_bidirectional_attention", (None, False)),),
    ignores=("hidden_act", "cache_implementation"),  # hidden_activation is what counts
)
