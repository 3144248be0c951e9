# SPDX-License-Identifier: Apache-2.0
"""Qwen 2 and 2.5: Llama's layers, with biases on q, k and v."""

import dataclasses

from awq_jax.families._rows import without
from awq_jax.families.llama import LLAMA

__all__ = ["QWEN2"]

QWEN2 = dataclasses.replace(
    LLAMA,
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    options=(("qkv_bias", True),),  # config.json does not say so
    config=without(LLAMA.config, "attention_bias", "mlp_bias"),
    accepts=(*LLAMA.accepts, ("use_sliding_window", (False,))),
    ignores=("sliding_window", "max_window_layers"),  # without effect unless use_sliding_window
)
