# SPDX-License-Identifier: Apache-2.0
"""Llama 1 to 3: what the other tables are relatives of."""

from awq_jax.families._rows import linear, norm
from awq_jax.families._table import Family, Group, Key, Linear, Norm

__all__ = ["LLAMA"]

L = "layers/*"
HF = "model.layers.*"

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    groups=(
        Group(Norm(f"{L}/input_norm"), (f"{L}/attn/q", f"{L}/attn/k", f"{L}/attn/v"), output=f"{L}/attn"),
        Group(Linear(f"{L}/attn/v", tie="gqa"), (f"{L}/attn/o",)),
        Group(Norm(f"{L}/post_norm"), (f"{L}/mlp/gate", f"{L}/mlp/up"), output=f"{L}/mlp"),
        Group(Linear(f"{L}/mlp/up"), (f"{L}/mlp/down",)),
    ),
    keys=(
        Key("model.embed_tokens.weight", "embed/embedding"),
        *linear(f"{HF}.self_attn.q_proj", f"{L}/attn/q", bias=True),
        *linear(f"{HF}.self_attn.k_proj", f"{L}/attn/k", bias=True),
        *linear(f"{HF}.self_attn.v_proj", f"{L}/attn/v", bias=True),
        *linear(f"{HF}.self_attn.o_proj", f"{L}/attn/o", bias=True),
        *linear(f"{HF}.mlp.gate_proj", f"{L}/mlp/gate", bias=True),
        *linear(f"{HF}.mlp.up_proj", f"{L}/mlp/up", bias=True),
        *linear(f"{HF}.mlp.down_proj", f"{L}/mlp/down", bias=True),
        *norm(f"{HF}.input_layernorm", f"{L}/input_norm"),
        *norm(f"{HF}.post_attention_layernorm", f"{L}/post_norm"),
        *norm("model.norm", "norm"),
        Key("lm_head.weight", "lm_head/kernel", transpose=True, optional=True),  # absent where tied
        Key(f"{HF}.self_attn.rotary_emb.inv_freq", "", optional=True),  # a buffer that old checkpoints carry
    ),
    config=(
        ("vocab_size", "vocab_size"),
        ("hidden_size", "hidden_size"),
        ("intermediate_size", "intermediate_size"),
        ("num_hidden_layers", "num_layers"),
        ("num_attention_heads", "num_heads"),
        ("num_key_value_heads", "num_kv_heads"),
        ("head_dim", "head_dim"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("rms_norm_eps", "norm_eps"),
        ("tie_word_embeddings", "tie_embeddings"),
        ("attention_bias", "qkv_bias"),
        ("attention_bias", "o_bias"),
        ("mlp_bias", "mlp_bias"),
    ),
    accepts=(("hidden_act", ("silu",)),),
    # AutoAWQ and llm-awq leave q and k unclipped: their output meets a softmax, where errors do not average out.
    no_clip=(f"{L}/attn/q", f"{L}/attn/k"),
)
