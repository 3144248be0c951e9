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
    """A row: the family's name, what is special, and the config's arguments.

    ``model_type`` is transformers' name where it is not ours; ``sizes`` are the arguments that families name alike.
    """

    family: str
    variant: str
    hf: Mapping[str, Any]
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=lambda: SIZES)
    model_type: str = ""

    @property
    def id(self) -> str:
        return f"{self.family}-{self.variant}"

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.sizes, **self.hf}


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

TIED = {"tie_word_embeddings": True}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
PLAIN = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
SHARED = {**PLAIN, "num_key_value_heads": 2}
OPT = {key: value for key, value in PLAIN.items() if key != "intermediate_size"} | {
    "ffn_dim": 56,
    "word_embed_proj_dim": 32,
    "pad_token_id": None,
}
FALCON = {key: value for key, value in PLAIN.items() if key != "intermediate_size"} | {"ffn_hidden_size": 56}
BLOOM = {
    "vocab_size": 97,
    "hidden_size": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
GEMMA2 = {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5, **TIED}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
TWO_ROTATIONS = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
}
MIXED = ["sliding_attention", "full_attention"]
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
QWEN_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
PHI3 = {"pad_token_id": None, "sliding_window": None}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 1.6, 2.5, 4.0],
}


def quarter(fraction: float) -> dict[str, Any]:
    """A rotation of some of a head's channels."""
    return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": fraction}


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
    Tiny("gemma", "shared-heads", {"head_dim": 10, **TIED}),
    Tiny("gemma2", "caps-window", {**GEMMA2, **CAPS}),
    Tiny("gemma3_text", "two-rotations", {**GEMMA2, "layer_types": MIXED, "rope_parameters": TWO_ROTATIONS}),
    Tiny("phi3", "half-rotation-window", {**PHI3, "sliding_window": 5, "rope_parameters": quarter(0.5)}),
    Tiny("phi3", "long-text", {**PHI3, "original_max_position_embeddings": 8, "rope_parameters": LONGROPE}),
    Tiny("phi3", "short-text", {**PHI3, "original_max_position_embeddings": 32, "rope_parameters": LONGROPE}),
    Tiny("mixtral", "four-experts", MIXTRAL),
    Tiny("qwen2_moe", "shared-expert", {**QWEN_MOE, "num_experts": 5, "shared_expert_intermediate_size": 40}),
    Tiny("qwen3_moe", "six-experts", {**QWEN_MOE, "num_experts": 6, "norm_topk_prob": True}),
    Tiny("olmo2", "shared-heads", {}),
    Tiny("stablelm", "quarter-rotation", {"use_qkv_bias": True}, SHARED),
    Tiny("gpt_neox", "side-by-side", {"rope_parameters": quarter(0.25)}, PLAIN),
    Tiny("gpt_neox", "one-after-the-other", {"use_parallel_residual": False, "attention_bias": False}, PLAIN),
    Tiny("gpt2", "four-times", {}, GPT2),
    Tiny("gpt2", "untied", {"n_inner": 56, "tie_word_embeddings": False, "activation_function": "gelu"}, GPT2),
    Tiny("opt", "tied", TIED, OPT),
    Tiny("opt", "without-biases", {"enable_bias": False}, OPT),
    Tiny("falcon", "one-norm", {}, FALCON),
    Tiny("falcon-new", "two-norms", {"new_decoder_architecture": True, "num_kv_heads": 2}, FALCON, "falcon"),
    Tiny("bloom", "four-heads", {}, BLOOM),
    Tiny("bloom", "six-heads", {"n_head": 6, "hidden_size": 36, "tie_word_embeddings": False}, BLOOM),
)
