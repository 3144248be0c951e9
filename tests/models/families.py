# SPDX-License-Identifier: Apache-2.0
"""The list of tiny models that every test of a family runs on: one row is one Hugging Face config.

Adding a family adds at least one row here. A row per mechanism that config.json can switch: shared heads, tied
embeddings, biases, heads wider than the stream, stretched rotations, a window shorter than the sequence.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["TINY", "Tiny"]

TOKENS = 24  # of a test sequence: longer than the window below and than llama3's original length


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A row: the family's name (transformers' ``model_type`` too), what is special, and the config's arguments."""

    family: str
    variant: str
    hf: Mapping[str, Any]

    @property
    def id(self) -> str:
        return f"{self.family}-{self.variant}"

    @property
    def arguments(self) -> dict[str, Any]:
        return {**SIZES, **self.hf}


# Odd sizes where the model allows them, so that a swapped axis can't pass unseen.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.2,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

TINY = (
    Tiny("llama", "shared-heads-llama3-rope", {"rope_parameters": LLAMA3}),
    Tiny("llama", "tied-linear-rope", {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    Tiny("llama", "biases-wide-heads", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    Tiny("mistral", "window", {"sliding_window": 5}),
    Tiny("mistral", "no-window-tied", {"sliding_window": None, "tie_word_embeddings": True}),
    Tiny("qwen2", "untied", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    Tiny("qwen2", "tied-one-kv-head", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    Tiny("qwen3", "wide-heads", {"head_dim": 12}),
    Tiny("qwen3", "yarn", {"head_dim": 16, "rope_parameters": YARN}),
    Tiny("qwen3", "tied-biases", {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
)
