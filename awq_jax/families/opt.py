# SPDX-License-Identifier: Apache-2.0
"""OPT: learned positions and a plain MLP with a ReLU, which a positive scale passes."""

from awq_jax.families._rows import PLAIN_MLP, linear, norm
from awq_jax.families._table import Family, Group, Key, Linear

__all__ = ["OPT"]

L, HF = "layers/*", "model.decoder.layers.*"

OPT = Family(
    name="opt",
    architectures=("OPTForCausalLM",),
    groups=(
        *PLAIN_MLP,
        Group(Linear(f"{L}/mlp/up"), (f"{L}/mlp/down",)),  # relu(x / t) = relu(x) / t for t > 0
    ),
    prefix="model.",
    keys=(
        Key("model.decoder.embed_tokens.weight", "embed/embedding"),
        Key("model.decoder.embed_positions.weight", "embed/positions"),
        *norm(f"{HF}.self_attn_layer_norm", f"{L}/input_norm", bias=True),
        *norm(f"{HF}.final_layer_norm", f"{L}/post_norm", bias=True),
        *linear(f"{HF}.self_attn.q_proj", f"{L}/attn/q", bias=True),
        *linear(f"{HF}.self_attn.k_proj", f"{L}/attn/k", bias=True),
        *linear(f"{HF}.self_attn.v_proj", f"{L}/attn/v", bias=True),
        *linear(f"{HF}.self_attn.out_proj", f"{L}/attn/o", bias=True),
        *linear(f"{HF}.fc1", f"{L}/mlp/up", bias=True),
        *linear(f"{HF}.fc2", f"{L}/mlp/down", bias=True),
        *norm("model.decoder.final_layer_norm", "norm", bias=True),
        Key("lm_head.weight", "lm_head/kernel", transpose=True, optional=True),
    ),
    options=(
        ("norm", "layer"),
        ("norm_eps", 1e-5),
        ("gated", False),
        ("activation", "relu"),
        ("positions", "learned"),
        ("position_offset", 2),
    ),
    config=(
        ("vocab_size", "vocab_size"),
        ("hidden_size", "hidden_size"),
        ("ffn_dim", "intermediate_size"),
        ("num_hidden_layers", "num_layers"),
        ("num_attention_heads", "num_heads"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("tie_word_embeddings", "tie_embeddings"),
        ("enable_bias", "qkv_bias"),
        ("enable_bias", "o_bias"),
        ("enable_bias", "mlp_bias"),
    ),
    defaults=(("tie_word_embeddings", True), ("enable_bias", True)),
    accepts=(
        ("activation_function", ("relu",)),  # Galactica has a GELU, which no scale passes: another table
        ("do_layer_norm_before", (True,)),  # the 350M has norms after attention and MLP
        ("layer_norm_elementwise_affine", (True,)),
    ),
    # Where word_embed_proj_dim is not hidden_size, there are project_in and project_out, which no row knows.
    ignores=("word_embed_proj_dim", "dropout", "activation_dropout", "layerdrop", "init_std"),
    no_clip=(f"{L}/attn/q", f"{L}/attn/k"),
)
