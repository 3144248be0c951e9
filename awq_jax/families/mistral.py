# SPDX-License-Identifier: Apache-2.0
"""Mistral 7B: Llama's layers with a sliding window."""

import dataclasses

from awq_jax.families.llama import LLAMA

__all__ = ["MISTRAL"]

MISTRAL = dataclasses.replace(
    LLAMA,
    name="mistral",
    architectures=("MistralForCausalLM",),
    config=(*(row for row in LLAMA.config if not row[0].endswith("_bias")), ("sliding_window", "sliding_window")),
    defaults=(("sliding_window", 4096),),  # null is no window; left out is the first model's
)
