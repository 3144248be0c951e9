# SPDX-License-Identifier: Apache-2.0
"""Falcon: attention and MLP side by side; the 7B with one norm for both and one kv head, the 40B and 180B with two."""

import dataclasses

from awq_jax.families._rows import BEHIND_GELU, linear, norm
from awq_jax.families._table import Family, Group, Key, Linear, Norm

__all__ = ["FALCON", "FALCON_NEW"]

L, HF = "layers/*", "transformer.h.*"
QKV = (f"{L}/attn/q", f"{L}/attn/k", f"{L}/attn/v")

_LAYER = (
    *linear(f"{HF}.self_attention.query_key_value", QKV, bias=True, layout="grouped"),
    *linear(f"{HF}.self_attention.dense", f"{L}/attn/o", bias=True),
    *linear(f"{HF}.mlp.dense_h_to_4h", f"{L}/mlp/up", bias=True),
    *linear(f"{HF}.mlp.dense_4h_to_h", f"{L}/mlp/down", bias=True),
)
_REST = (
    Key("transformer.word_embeddings.weight", "embed/embedding"),
    *norm("transformer.ln_f", "norm", bias=True),
    Key("lm_head.weight", "lm_head/kernel", transpose=True, optional=True),
    Key(f"{HF}.self_attention.rotary_emb.inv_freq", "", optional=True),
)
_OPTIONS = (("norm", "layer"), ("gated", False), ("parallel", True))

FALCON = Family(
    name="falcon",
    architectures=("FalconForCausalLM", "RWForCausalLM"),
    when=(("new_decoder_architecture", False), ("parallel_attn", True), ("multi_query", True), ("alibi", False)),
    groups=(
        # One norm feeds attention and the MLP: they share one scale.
        Group(Norm(f"{L}/input_norm"), (*QKV, f"{L}/mlp/up")),
        Group(Linear(f"{L}/attn/v", tie="gqa"), (f"{L}/attn/o",)),
        BEHIND_GELU,
    ),
    prefix="transformer.",
    keys=(*_REST, *_LAYER, *norm(f"{HF}.input_layernorm", f"{L}/input_norm", bias=True)),
    options=(*_OPTIONS, ("one_norm", True), ("num_kv_heads", 1)),
    config=(
        ("vocab_size", "vocab_size"),
        ("hidden_size", "hidden_size"),
        ("ffn_hidden_size", "intermediate_size"),
        ("n_layer", "num_layers"),  # what the first files call it
        ("num_hidden_layers", "num_layers"),
        ("n_head", "num_heads"),
        ("num_attention_heads", "num_heads"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("layer_norm_epsilon", "norm_eps"),
        ("tie_word_embeddings", "tie_embeddings"),
        ("activation", "activation"),
        ("bias", "qkv_bias"),
        ("bias", "o_bias"),
        ("bias", "mlp_bias"),
    ),
    defaults=(
        ("layer_norm_epsilon", 1e-5),
        ("tie_word_embeddings", True),
        ("activation", "gelu"),
        ("new_decoder_architecture", False),
        ("parallel_attn", True),
        ("multi_query", True),
        ("alibi", False),
    ),
    multiples=(("intermediate_size", 4, "hidden_size"),),
    accepts=(
        ("new_decoder_architecture", (False,)),
        ("parallel_attn", (True,)),
        ("multi_query", (True,)),
        ("alibi", (False,)),
        ("num_ln_in_parallel_attn", (None,)),
        ("apply_residual_connection_post_layernorm", (False,)),
    ),
    ignores=("hidden_dropout", "num_kv_heads", "n_head_kv"),  # multi_query is one kv head whatever they say
    no_clip=(f"{L}/attn/q", f"{L}/attn/k"),
)

FALCON_NEW = dataclasses.replace(
    FALCON,
    name="falcon-new",
    when=(("new_decoder_architecture", True), ("alibi", False)),
    groups=(
        Group(Norm(f"{L}/input_norm"), QKV, output=f"{L}/attn"),
        Group(Linear(f"{L}/attn/v", tie="gqa"), (f"{L}/attn/o",)),
        Group(Norm(f"{L}/post_norm"), (f"{L}/mlp/up",), output=f"{L}/mlp"),
        BEHIND_GELU,
    ),
    keys=(
        *_REST,
        *_LAYER,
        *norm(f"{HF}.ln_attn", f"{L}/input_norm", bias=True),
        *norm(f"{HF}.ln_mlp", f"{L}/post_norm", bias=True),
    ),
    options=_OPTIONS,
    config=(*FALCON.config, ("n_head_kv", "num_kv_heads"), ("num_kv_heads", "num_kv_heads")),
    accepts=(
        ("new_decoder_architecture", (True,)),
        ("alibi", (False,)),
        ("num_ln_in_parallel_attn", (None, 2)),  # the 11B has one
        ("apply_residual_connection_post_layernorm", (False,)),
    ),
    ignores=("hidden_dropout", "parallel_attn", "multi_query"),  # without effect in the new architecture
)
