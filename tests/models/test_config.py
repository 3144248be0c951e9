# SPDX-License-Identifier: Apache-2.0
"""Every attribute of a config.json is read, accepted with known values, or ignored by name."""

import json
import sys

import pytest
import transformers

from awq_jax.families import FAMILIES, by_architecture
from awq_jax.models import config_from_hf
from awq_jax.models.rope_scaling import RopeScaling
from awq_jax_convert.hf_config import read_config
from tests.models.families import LLAMA3, PLAIN, SHARED, SIZES, TINY

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**more):
    return config_from_hf(FAMILIES["llama"], {**SMALL, **more})


def test_what_is_read_arrives():
    flags = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    config = llama(head_dim=10, rms_norm_eps=1e-3, **flags)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (97, 32, 56)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 10)
    assert (config.norm_eps, config.tie_embeddings) == (1e-3, True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, True)
    assert hash(config) == hash(llama(head_dim=10, rms_norm_eps=1e-3, **flags))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_has_transformers_default(family):
    """The hub's files leave out what equals the default of the class that reads them."""
    row = next(row for row in TINY if row.family == family)
    sizes = {**SMALL, "head_dim": 8} if row.sizes is SIZES else row.sizes
    spare = {**sizes, **{name: value for name, value in row.hf.items() if name in dict(FAMILIES[family].when)}}
    spare.pop("tie_word_embeddings", None)
    whole = transformers.AutoConfig.for_model(row.model_type or family, **spare).to_dict()
    short, full = (config_from_hf(FAMILIES[family], hf) for hf in (spare, whole))
    same = lambda config: {**vars(config), "max_position_embeddings": None}  # has no effect on the forward pass
    assert same(short) == same(full)


@pytest.mark.parametrize("row", [row for row in TINY if row.sizes in (SIZES, PLAIN, SHARED)], ids=lambda row: row.id)
def test_old_files_say_the_same_in_other_words(row):
    """Before transformers 5: ``rope_theta`` and ``rope_scaling`` beside each other, ``torch_dtype``."""
    new = transformers.AutoConfig.for_model(row.family, **row.arguments).to_dict()
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    rope = dict(new["rope_parameters"])
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    old |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": "bfloat16"}
    if "partial_rotary_factor" in rope:
        name = "rotary_pct" if row.family == "gpt_neox" else "partial_rotary_factor"
        old[name] = rope.pop("partial_rotary_factor")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else {**rope, "type": rope["rope_type"]}
    assert config_from_hf(FAMILIES[row.family], old) == config_from_hf(FAMILIES[row.family], new)


def test_llama3_rope_arrives_whole():
    wanted = RopeScaling(kind="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original=16)
    config = llama(rope_parameters=LLAMA3)
    assert (config.rope_theta, config.rope_scaling) == (500.0, wanted)


def test_unknown_attributes_are_named_with_their_values():
    with pytest.raises(ValueError, match=r"family 'llama' does not know attn_logit_softcapping=30.0, n_experts=8\. If"):
        llama(attn_logit_softcapping=30.0, n_experts=8)


def test_private_attributes_are_nobodys_business():
    assert llama(_attn_implementation_internal="someone/code") == llama()


@pytest.mark.parametrize(
    ("family", "changed", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; family 'llama' implements 'silu' only"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True; family 'qwen2' implements False only"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "mixed layers are not implemented"),
        (
            "mistral",
            {"layer_types": ["full_attention"] * 2, "sliding_window": 5},
            "other entries than 'sliding_attention'",
        ),
        ("llama", {"layer_types": "full_attention"}, "layer_types has other entries"),
        ("llama", {"num_key_value_heads": 3}, "4 query heads can't share 3 kv heads evenly"),
        (
            "llama",
            {"num_attention_heads": 5},
            "hidden_size 32 is not a multiple of num_attention_heads 5; give head_dim",
        ),
        ("llama", {"num_attention_heads": 0}, "not a multiple of num_attention_heads 0"),
        ("llama", {"head_dim": 7}, "head_dim is 7; rotary embeddings need an even one"),
        ("llama", {"num_hidden_layers": 10**9}, "num_layers is 1000000000; it must be a whole number from 1 to 4096"),
        ("llama", {"vocab_size": 0}, "vocab_size is 0"),
        ("llama", {"hidden_size": -32}, "hidden_size is -32"),
        ("llama", {"hidden_size": 32.0}, "hidden_size is 32.0; it must be a whole number"),
        ("llama", {"intermediate_size": "56"}, "intermediate_size is '56'"),
        ("llama", {"num_key_value_heads": True}, "num_key_value_heads is True; it must be a whole number"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("llama", {"rms_norm_eps": -1.0}, "norm_eps is -1.0"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a number"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ("llama", {"rope_theta": "many"}, "rope_theta is 'many'; it must be a positive number"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}}, "has mscale, which is not"),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "long_factor": [2.0] * 4}}, "lacks short_factor"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope scaling 'dynamic' is not implemented"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope scaling 'linear' lacks factor"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1}},
            "'linear' has mscale, which is not understood",
        ),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "'llama3' lacks low_freq_factor, high_freq"),
        ("llama", {"rope_parameters": {**LLAMA3, "factor": 0}}, "factor is 0; it must be a positive number"),
        (
            "llama",
            {"rope_parameters": {**LLAMA3, "high_freq_factor": 1}},
            "a high_freq_factor above its low_freq_factor",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "has partial_rotary_factor",
        ),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        ("gemma2", {"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "layer_types has other entries"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "logit_softcap is -1.0; it must be a positive number"),
        ("gemma2", {"hidden_activation": "xielu"}, "hidden_activation is 'xielu'; family 'gemma2' implements 'silu', "),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; .* implements None only"),
        ("phi3", {"partial_rotary_factor": 0.375}, "an even number of them"),
        ("phi3", {"partial_rotary_factor": "half"}, "partial_rotary_factor is 'half'; it must be a number"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual is True"),
        ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 3}, "3 of 2 experts"),
        ("mixtral", {"num_local_experts": 1 << 20}, "num_experts is 1048576; it must be a whole number"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else None,
)
def test_what_is_not_implemented_is_refused(family, changed, said):
    with pytest.raises(ValueError, match=said):
        config_from_hf(FAMILIES[family], {**SMALL, **changed})


@pytest.mark.parametrize("name", [n for n in SMALL if n != "num_key_value_heads"])
@pytest.mark.parametrize("null", [False, True])
def test_missing_sizes_are_named(name, null):
    hf = {**SMALL, name: None} if null else {k: v for k, v in SMALL.items() if k != name}
    with pytest.raises(ValueError, match=f"'{name}' is missing, and family 'llama' needs it"):
        config_from_hf(FAMILIES["llama"], hf)


@pytest.mark.parametrize("said", [{"alibi": True}, {"parallel_attn": False}, {"multi_query": False}])
def test_a_kind_of_falcon_that_no_table_serves_is_refused(said):
    assert by_architecture("FalconForCausalLM", {}).name == "falcon"
    assert by_architecture("FalconForCausalLM", {"new_decoder_architecture": True}).name == "falcon-new"
    with pytest.raises(ValueError, match=r"'FalconForCausalLM' is supported where config\.json has one of: new_"):
        by_architecture("FalconForCausalLM", said)


def test_layers_get_their_own_window_and_rotation():
    row = next(row for row in TINY if row.id == "gemma3_text-two-rotations")
    whole = config_from_hf(
        FAMILIES[row.family], transformers.AutoConfig.for_model(row.family, **row.arguments).to_dict()
    )
    inside, outside = whole.of_layer(0), whole.of_layer(1)
    assert (inside.sliding_window, inside.rope_theta, inside.rope_scaling) == (5, 100.0, None)
    assert (outside.sliding_window, outside.rope_theta) == (None, 5000.0)
    assert outside.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    assert llama().of_layer(1) == llama()


def test_code_that_a_config_names_is_never_run_nor_passed_on(tmp_path):
    marker = tmp_path / "was_run"
    (tmp_path / "evil_model.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    config = {
        **SMALL,
        "architectures": ["LlamaForCausalLM"],
        "auto_map": {"AutoConfig": "evil_model.Config", "AutoModelForCausalLM": "evil_model.Model"},
        "_attn_implementation_internal": "someone/code",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_config(tmp_path)
    assert read.decoder == llama()
    assert not marker.exists() and "evil_model" not in sys.modules
    assert read.raw == {**SMALL, "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize("named", [None, [], ["LlamaForCausalLM", "MistralForCausalLM"], "LlamaForCausalLM", [1]])
def test_one_architecture_is_needed(named, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "architectures": named}))
    with pytest.raises(ValueError, match="must name one architecture"):
        read_config(tmp_path)
    assert read_config(tmp_path, FAMILIES["llama"]).decoder == llama()
