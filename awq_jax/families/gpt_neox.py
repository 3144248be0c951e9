# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX and Pythia: attention and MLP side by side, q, k and v interleaved by head, a plain MLP."""

from awq_jax.families._rows import BEHIND_GELU, PLAIN_MLP, linear, norm
from awq_jax.families._table import Family, Key

__all__ = ["GPT_NEOX"]

L, HF = "layers/*", "gpt_neox.layers.*"

GPT_NEOX = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    groups=(*PLAIN_MLP, BEHIND_GELU),
    prefix="gpt_neox.",
    keys=(
        Key("gpt_neox.embed_in.weight", "embed/embedding"),
        *norm(f"{HF}.input_layernorm", f"{L}/input_norm", bias=True),
        *norm(f"{HF}.post_attention_layernorm", f"{L}/post_norm", bias=True),
        *linear(
            f"{HF}.attention.query_key_value",
            (f"{L}/attn/q", f"{L}/attn/k", f"{L}/attn/v"),
            bias=True,
            layout="grouped",
        ),
        *linear(f"{HF}.attention.dense", f"{L}/attn/o", bias=True),
        *linear(f"{HF}.mlp.dense_h_to_4h", f"{L}/mlp/up", bias=True),
        *linear(f"{HF}.mlp.dense_4h_to_h", f"{L}/mlp/down", bias=True),
        *norm("gpt_neox.final_layer_norm", "norm", bias=True),
        Key("embed_out.weight", "lm_head/kernel", transpose=True),
        # Buffers that old checkpoints carry.
        Key(f"{HF}.attention.bias", "", optional=True),
        Key(f"{HF}.attention.masked_bias", "", optional=True),
        Key(f"{HF}.attention.rotary_emb.inv_freq", "", optional=True),
    ),
    options=(("norm", "layer"), ("gated", False), ("mlp_bias", True)),
    config=(
        ("vocab_size", "vocab_size"),
        ("hidden_size", "hidden_size"),
        ("intermediate_size", "intermediate_size"),
        ("num_hidden_layers", "num_layers"),
        ("num_attention_heads", "num_heads"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("layer_norm_eps", "norm_eps"),
        ("tie_word_embeddings", "tie_embeddings"),
        ("hidden_act", "activation"),
        ("use_parallel_residual", "parallel"),
        ("attention_bias", "qkv_bias"),
        ("attention_bias", "o_bias"),
        ("rotary_pct", "rotary_fraction"),
        ("rotary_emb_base", "rope_theta"),
    ),
    defaults=(
        ("layer_norm_eps", 1e-5),
        ("hidden_act", "gelu"),
        ("use_parallel_residual", True),
        ("attention_bias", True),
        ("rotary_pct", 0.25),
    ),
    ignores=("hidden_dropout", "classifier_dropout", "gradient_checkpointing"),
    no_clip=(f"{L}/attn/q", f"{L}/attn/k"),
)
