# SPDX-License-Identifier: Apache-2.0
"""GPT-2: learned positions, weights kept as ``[in, out]``, q, k and v in one tensor, a plain MLP."""

from awq_jax.families._rows import BEHIND_GELU, PLAIN_MLP, linear, norm
from awq_jax.families._table import Family, Key

__all__ = ["GPT2"]

L, HF = "layers/*", "transformer.h.*"

GPT2 = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    groups=(*PLAIN_MLP, BEHIND_GELU),
    prefix="transformer.",
    keys=(
        Key("transformer.wte.weight", "embed/embedding"),
        Key("transformer.wpe.weight", "embed/positions"),
        *norm(f"{HF}.ln_1", f"{L}/input_norm", bias=True),
        *norm(f"{HF}.ln_2", f"{L}/post_norm", bias=True),
        *linear(f"{HF}.attn.c_attn", (f"{L}/attn/q", f"{L}/attn/k", f"{L}/attn/v"), bias=True, transpose=False),
        *linear(f"{HF}.attn.c_proj", f"{L}/attn/o", bias=True, transpose=False),
        *linear(f"{HF}.mlp.c_fc", f"{L}/mlp/up", bias=True, transpose=False),
        *linear(f"{HF}.mlp.c_proj", f"{L}/mlp/down", bias=True, transpose=False),
        *norm("transformer.ln_f", "norm", bias=True),
        Key("lm_head.weight", "lm_head/kernel", transpose=True, optional=True),
        Key(f"{HF}.attn.bias", "", optional=True),  # the causal mask, which old checkpoints carry
        Key(f"{HF}.attn.masked_bias", "", optional=True),
    ),
    options=(
        ("norm", "layer"),
        ("gated", False),
        ("positions", "learned"),
        ("qkv_bias", True),
        ("o_bias", True),
        ("mlp_bias", True),
    ),
    config=(
        ("vocab_size", "vocab_size"),
        ("n_embd", "hidden_size"),
        ("n_inner", "intermediate_size"),
        ("n_layer", "num_layers"),
        ("n_head", "num_heads"),
        ("n_positions", "max_position_embeddings"),
        ("layer_norm_epsilon", "norm_eps"),
        ("tie_word_embeddings", "tie_embeddings"),
        ("activation_function", "activation"),
    ),
    defaults=(
        ("n_positions", 1024),
        ("layer_norm_epsilon", 1e-5),
        ("tie_word_embeddings", True),
        ("activation_function", "gelu_new"),
    ),
    multiples=(("intermediate_size", 4, "hidden_size"),),
    accepts=(("scale_attn_weights", (True,)), ("scale_attn_by_inverse_layer_idx", (False,))),
    ignores=(
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "gradient_checkpointing",
        "n_ctx",  # as n_positions
        "reorder_and_upcast_attn",  # a dtype
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    ),
    no_clip=(f"{L}/attn/q", f"{L}/attn/k"),
)
