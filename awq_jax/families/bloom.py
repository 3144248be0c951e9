# SPDX-License-Identifier: Apache-2.0
"""Bloom: ALiBi, a norm after the embedding, q, k and v interleaved by head, a plain MLP."""

from awq_jax.families._rows import BEHIND_GELU, PLAIN_MLP, linear, norm
from awq_jax.families._table import Family, Key

__all__ = ["BLOOM"]

L, HF = "layers/*", "transformer.h.*"

BLOOM = Family(
    name="bloom",
    architectures=("BloomForCausalLM",),
    groups=(*PLAIN_MLP, BEHIND_GELU),
    prefix="transformer.",
    keys=(
        Key("transformer.word_embeddings.weight", "embed/embedding"),
        *norm("transformer.word_embeddings_layernorm", "embed/norm", bias=True),
        *norm(f"{HF}.input_layernorm", f"{L}/input_norm", bias=True),
        *norm(f"{HF}.post_attention_layernorm", f"{L}/post_norm", bias=True),
        *linear(
            f"{HF}.self_attention.query_key_value",
            (f"{L}/attn/q", f"{L}/attn/k", f"{L}/attn/v"),
            bias=True,
            layout="grouped",
        ),
        *linear(f"{HF}.self_attention.dense", f"{L}/attn/o", bias=True),
        *linear(f"{HF}.mlp.dense_h_to_4h", f"{L}/mlp/up", bias=True),
        *linear(f"{HF}.mlp.dense_4h_to_h", f"{L}/mlp/down", bias=True),
        *norm("transformer.ln_f", "norm", bias=True),
        Key("lm_head.weight", "lm_head/kernel", transpose=True, optional=True),
    ),
    options=(
        ("norm", "layer"),
        ("embed_norm", True),
        ("gated", False),
        ("activation", "gelu_tanh"),
        ("positions", "alibi"),
        ("qkv_bias", True),
        ("o_bias", True),
        ("mlp_bias", True),
    ),
    config=(
        ("vocab_size", "vocab_size"),
        ("n_embed", "hidden_size"),  # what some files call it
        ("hidden_size", "hidden_size"),
        ("n_inner", "intermediate_size"),
        ("n_layer", "num_layers"),
        ("num_hidden_layers", "num_layers"),
        ("num_attention_heads", "num_heads"),
        ("n_head", "num_heads"),
        ("seq_length", "max_position_embeddings"),
        ("layer_norm_epsilon", "norm_eps"),
        ("tie_word_embeddings", "tie_embeddings"),
    ),
    defaults=(("layer_norm_epsilon", 1e-5), ("tie_word_embeddings", True), ("seq_length", 2048)),
    multiples=(("intermediate_size", 4, "hidden_size"),),
    accepts=(("apply_residual_connection_post_layernorm", (False,)),),
    ignores=(
        "attention_softmax_in_fp32",
        "bias_dropout_fusion",
        "gradient_checkpointing",
        "hidden_dropout",
        "masked_softmax_fusion",
        "offset_alibi",  # a constant for all keys of a query
        "skip_bias_add",
        "skip_bias_add_qkv",
        "slow_but_exact",
        "unk_token_id",
    ),
    no_clip=(f"{L}/attn/q", f"{L}/attn/k"),
)
