# SPDX-License-Identifier: Apache-2.0
"""Qwen 3: Llama's layers, with a norm over each head of q and k."""

import dataclasses

from awq_jax.families._rows import without
from awq_jax.families._table import Key
from awq_jax.families.llama import LLAMA

__all__ = ["QWEN3"]

L, HF = "layers/*", "model.layers.*"

QWEN3 = dataclasses.replace(
    LLAMA,
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    # The norm after q and k could not absorb a scale of their outputs, but none is folded there: input_norm -> q, k, v
    # scales their inputs, which stays exact.
    options=(("qk_norm", "head"),),
    keys=(
        *LLAMA.keys,
        Key(f"{HF}.self_attn.q_norm.weight", f"{L}/attn/q_norm/scale"),
        Key(f"{HF}.self_attn.k_norm.weight", f"{L}/attn/k_norm/scale"),
    ),
    config=without(LLAMA.config, "mlp_bias"),
    accepts=(*LLAMA.accepts, ("use_sliding_window", (False,))),
    ignores=("sliding_window", "max_window_layers"),
)
