# SPDX-License-Identifier: Apache-2.0
"""OLMo 2: norms after attention and MLP alone, and one over all of q and k."""

import dataclasses

from awq_jax.families._rows import norm, without
from awq_jax.families._table import Group
from awq_jax.families.llama import LLAMA

__all__ = ["OLMO2"]

L, HF = "layers/*", "model.layers.*"
STREAM = "it reads the residual stream itself, which no norm precedes and every layer shares"

OLMO2 = dataclasses.replace(
    LLAMA,
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    groups=(
        Group(None, (f"{L}/attn/q", f"{L}/attn/k", f"{L}/attn/v"), output=f"{L}/attn", reason=STREAM),
        LLAMA.groups[1],
        Group(None, (f"{L}/mlp/gate", f"{L}/mlp/up"), output=f"{L}/mlp", reason=STREAM),
        LLAMA.groups[3],
    ),
    keys=(
        *(key for key in LLAMA.keys if "_layernorm" not in key.theirs),
        *norm(f"{HF}.post_attention_layernorm", f"{L}/attn_out_norm"),
        *norm(f"{HF}.post_feedforward_layernorm", f"{L}/mlp_out_norm"),
        *norm(f"{HF}.self_attn.q_norm", f"{L}/attn/q_norm"),
        *norm(f"{HF}.self_attn.k_norm", f"{L}/attn/k_norm"),
    ),
    options=(("norm_placement", "after"), ("qk_norm", "all")),
    config=without(LLAMA.config, "mlp_bias"),
    defaults=(("rms_norm_eps", 1e-5),),
)
