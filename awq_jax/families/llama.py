# SPDX-License-Identifier: Apache-2.0
"""Llama 1 to 3: what the other tables are relatives of."""

from awq_jax.families._table import Family, Group, Key, Linear, Norm

__all__ = ["LLAMA"]

L = "layers/*"
HF = "model.layers.*"


def _linear(theirs: str, ours: str, *, bias: bool = False) -> tuple[Key, ...]:
    weight = Key(f"{HF}.{theirs}.weight", f"{L}/{ours}/kernel", transpose=True)
    return (weight, Key(f"{HF}.{theirs}.bias", f"{L}/{ours}/bias", optional=True)) if bias else (weight,)


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
        *_linear("self_attn.q_proj", "attn/q", bias=True),
        *_linear("self_attn.k_proj", "attn/k", bias=True),
        *_linear("self_attn.v_proj", "attn/v", bias=True),
        *_linear("self_attn.o_proj", "attn/o", bias=True),
        *_linear("mlp.gate_proj", "mlp/gate", bias=True),
        *_linear("mlp.up_proj", "mlp/up", bias=True),
        *_linear("mlp.down_proj", "mlp/down", bias=True),
        Key(f"{HF}.input_layernorm.weight", f"{L}/input_norm/scale"),
        Key(f"{HF}.post_attention_layernorm.weight", f"{L}/post_norm/scale"),
        Key("model.norm.weight", "norm/scale"),
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
