# SPDX-License-Identifier: Apache-2.0
"""Gemma 1: Llama's layers, with gains kept as ``gain - 1``, a scaled embedding and a GELU gate."""

import dataclasses

from awq_jax.families._rows import without
from awq_jax.families._table import Group, Linear, Norm
from awq_jax.families.llama import LLAMA

__all__ = ["GEMMA"]

L = "layers/*"

GEMMA = dataclasses.replace(
    LLAMA,
    name="gemma",
    architectures=("GemmaForCausalLM",),
    groups=(
        Group(Norm(f"{L}/input_norm", 1.0), (f"{L}/attn/q", f"{L}/attn/k", f"{L}/attn/v"), output=f"{L}/attn"),
        Group(Linear(f"{L}/attn/v", tie="gqa"), (f"{L}/attn/o",)),
        Group(Norm(f"{L}/post_norm", 1.0), (f"{L}/mlp/gate", f"{L}/mlp/up"), output=f"{L}/mlp"),
        Group(Linear(f"{L}/mlp/up"), (f"{L}/mlp/down",)),  # the activation is the gate's: up stays linear
    ),
    options=(("norm_offset", 1.0), ("scale_embedding", True), ("activation", "gelu_tanh")),
    config=without(LLAMA.config, "mlp_bias"),
    defaults=(("head_dim", 256), ("tie_word_embeddings", True)),
    accepts=(
        # The first files say "gelu" and mean the approximation, which the model was trained with.
        ("hidden_act", ("gelu_pytorch_tanh", "gelu")),
        ("hidden_activation", ("gelu_pytorch_tanh", None)),
        ("use_bidirectional_attention", (None, False)),
    ),
)
