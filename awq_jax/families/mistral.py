# SPDX-License-Identifier: Apache-2.0
"""Mistral 7B: Llama's layers with a sliding window."""

import dataclasses

from awq_jax.families._rows import without
from awq_jax.families.llama import LLAMA

__all__ = ["MISTRAL"]

MISTRAL = dataclasses.replace(
    LLAMA,
    name="mistral",
    architectures=("MistralForCausalLM",),
    config=(*without(LLAMA.config, "attention_bias", "mlp_bias"), ("sliding_window", "sliding_window")),
    defaults=(("sliding_window", 4096),),  # null is no window; left out is the first model's
)
