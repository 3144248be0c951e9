# SPDX-License-Identifier: Apache-2.0
"""Qwen 2 and 3 with mixtures of experts; Qwen 2's have one more expert that every token goes through."""

import dataclasses

from awq_jax.families._rows import linear
from awq_jax.families._table import Group, Linear, Norm
from awq_jax.families.qwen2 import QWEN2
from awq_jax.families.qwen3 import QWEN3

__all__ = ["QWEN2_MOE", "QWEN3_MOE"]

L, HF = "layers/*", "model.layers.*.mlp"
EXPERTS = (f"{L}/mlp/experts/gate", f"{L}/mlp/experts/up")

_KEYS = (
    *linear(f"{HF}.gate", f"{L}/mlp/router"),
    *linear(f"{HF}.experts.*.gate_proj", f"{L}/mlp/experts/gate"),
    *linear(f"{HF}.experts.*.up_proj", f"{L}/mlp/experts/up"),
    *linear(f"{HF}.experts.*.down_proj", f"{L}/mlp/experts/down"),
)
_CONFIG = (
    ("moe_intermediate_size", "expert_size"),
    ("num_local_experts", "num_experts"),
    ("num_experts", "num_experts"),
    ("num_experts_per_tok", "experts_per_token"),
    ("norm_topk_prob", "normalize_experts"),
)
_ACCEPTS = (("decoder_sparse_step", (1,)), ("mlp_only_layers", ([], None)))  # every layer has its mixture
_TRAINING = ("output_router_logits", "router_aux_loss_coef")
_PER_EXPERT = Group(Linear(f"{L}/mlp/experts/up"), (f"{L}/mlp/experts/down",), per_expert=True)
_ROUTER = f"{L}/mlp/router"

QWEN3_MOE = dataclasses.replace(
    QWEN3,
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    groups=(
        *QWEN3.groups[:2],
        Group(Norm(f"{L}/post_norm"), EXPERTS, float_sinks=(_ROUTER,), output=f"{L}/mlp"),
        _PER_EXPERT,
    ),
    keys=(*(key for key in QWEN3.keys if ".mlp." not in key.theirs), *_KEYS),
    config=(*QWEN3.config, *_CONFIG),
    defaults=(
        ("intermediate_size", 6144),
        ("moe_intermediate_size", 768),
        ("num_local_experts", 128),
        ("num_experts_per_tok", 8),
        ("norm_topk_prob", False),
    ),
    accepts=(*QWEN3.accepts, *_ACCEPTS),
    ignores=(*QWEN3.ignores, *_TRAINING),
)

QWEN2_MOE = dataclasses.replace(
    QWEN2,
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    groups=(
        *QWEN2.groups[:2],
        Group(
            Norm(f"{L}/post_norm"),
            (*EXPERTS, f"{L}/mlp/shared/gate", f"{L}/mlp/shared/up"),
            float_sinks=(_ROUTER, f"{L}/mlp/shared_gate"),
            output=f"{L}/mlp",
        ),
        _PER_EXPERT,
        Group(Linear(f"{L}/mlp/shared/up"), (f"{L}/mlp/shared/down",)),
    ),
    keys=(
        *(key for key in QWEN2.keys if ".mlp." not in key.theirs),
        *_KEYS,
        *linear(f"{HF}.shared_expert.gate_proj", f"{L}/mlp/shared/gate"),
        *linear(f"{HF}.shared_expert.up_proj", f"{L}/mlp/shared/up"),
        *linear(f"{HF}.shared_expert.down_proj", f"{L}/mlp/shared/down"),
        *linear(f"{HF}.shared_expert_gate", f"{L}/mlp/shared_gate"),
    ),
    options=(),
    config=(
        *QWEN2.config,
        *_CONFIG,
        ("shared_expert_intermediate_size", "shared_expert_size"),
        ("qkv_bias", "qkv_bias"),
    ),
    defaults=(
        ("intermediate_size", 5632),
        ("moe_intermediate_size", 1408),
        ("shared_expert_intermediate_size", 5632),
        ("num_local_experts", 60),
        ("num_experts_per_tok", 4),
        ("norm_topk_prob", False),
        ("qkv_bias", True),
    ),
    accepts=(*QWEN2.accepts, *_ACCEPTS),
    ignores=(*QWEN2.ignores, *_TRAINING),
)
