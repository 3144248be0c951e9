# SPDX-License-Identifier: Apache-2.0
"""Mixtral: Mistral's layers, with a mixture of experts for an MLP."""

import dataclasses

from awq_jax.families._rows import linear
from awq_jax.families._table import Group, Linear, Norm
from awq_jax.families.mistral import MISTRAL

__all__ = ["MIXTRAL"]

L, HF = "layers/*", "model.layers.*.block_sparse_moe"

MIXTRAL = dataclasses.replace(
    MISTRAL,
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    groups=(
        *MISTRAL.groups[:2],
        # The router reads the same norm: it stays in floating point and is scaled with the experts.
        Group(
            Norm(f"{L}/post_norm"),
            (f"{L}/mlp/experts/gate", f"{L}/mlp/experts/up"),
            float_sinks=(f"{L}/mlp/router",),
            output=f"{L}/mlp",
        ),
        Group(Linear(f"{L}/mlp/experts/up"), (f"{L}/mlp/experts/down",), per_expert=True),
    ),
    keys=(
        *(key for key in MISTRAL.keys if ".mlp." not in key.theirs),
        *linear(f"{HF}.gate", f"{L}/mlp/router"),
        *linear(f"{HF}.experts.*.w1", f"{L}/mlp/experts/gate"),
        *linear(f"{HF}.experts.*.w3", f"{L}/mlp/experts/up"),
        *linear(f"{HF}.experts.*.w2", f"{L}/mlp/experts/down"),
    ),
    config=(
        *MISTRAL.config,
        ("intermediate_size", "expert_size"),
        ("num_local_experts", "num_experts"),
        ("num_experts_per_tok", "experts_per_token"),
    ),
    defaults=(
        ("rms_norm_eps", 1e-5),
        ("rope_theta", 1e6),
        ("num_local_experts", 8),
        ("num_experts_per_tok", 2),
        ("num_key_value_heads", 8),
    ),
    ignores=("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),  # of training
)
