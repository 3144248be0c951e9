# SPDX-License-Identifier: Apache-2.0
"""A decoder's config, read strictly from a Hugging Face one."""

import types
import typing
from collections.abc import Mapping
from typing import Any

from awq_jax.families import Family
from awq_jax.models.config import DecoderConfig
from awq_jax.models.rope_scaling import rope_from_hf

__all__ = ["config_from_hf"]

# Read by functions of their own.
_ELSEWHERE = {"rope_theta", "rope_scaling", "rope_parameters", "layer_types"}

_WITHOUT_EFFECT = frozenset(
    """_name_or_path add_cross_attention architectures attention_dropout auto_map bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
    dtype early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder label2id
    length_penalty max_length max_new_tokens min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type quantization_config remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class
    top_k top_p torch_dtype torchscript transformers_version typical_p unsloth_version unsloth_fixed use_bfloat16
    use_cache""".split()
)

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def config_from_hf(family: Family, hf: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Every attribute is read, accepted with a known value, or ignored by name; nothing is skipped silently.

    Args:
      family: whose table says what each attribute means.
      hf: config.json as a dict.

    Raises:
      ValueError: an attribute is unknown, missing, or has a value this family does not implement.
    """
    hf = {**dict(family.defaults), **hf}
    _refuse_unknown(family, hf)
    fields: dict[str, Any] = {ours: hf[theirs] for theirs, ours in family.config if hf.get(theirs) is not None}
    for ours, factor, of in family.multiples:
        if type(fields.get(of)) is int:
            fields.setdefault(ours, factor * fields[of])
    missing = [theirs for theirs, ours in family.config if ours in _REQUIRED and ours not in fields]
    if missing:
        raise ValueError(f"config: {missing[0]!r} is missing, and family {family.name!r} needs it.")
    for theirs, ours in family.config:
        if ours == "activation":
            fields[ours] = _activation(family, theirs, fields[ours])
        else:
            _refuse_type(theirs, fields.get(ours), ours)
            if ours in fields and float in (_TYPES[ours], *typing.get_args(_TYPES[ours])):
                fields[ours] = float(fields[ours])  # JSON has no difference between 20 and 20.0
    fields.setdefault("num_kv_heads", fields["num_heads"])
    fields.setdefault("head_dim", _head_dim(fields))
    layers = _sliding_layers(family, hf, fields)
    return DecoderConfig(**{**fields, **_rope(family, hf), "sliding_layers": layers, **dict(family.options)})


def _refuse_unknown(family: Family, hf: Mapping[str, Any]) -> None:
    accepts = dict(family.accepts)
    reads = {theirs for theirs, _ in family.config}
    known = reads | accepts.keys() | set(family.ignores) | _ELSEWHERE | _WITHOUT_EFFECT
    unknown = [name for name in hf if name not in known and not name.startswith("_")]
    if unknown:
        listed = ", ".join(f"{k}={hf[k]!r}" for k in unknown[:5])
        raise ValueError(
            f"config: family {family.name!r} does not know {listed}. If it does not change the model, add it to the "
            "family's ignores; if it does, the decoder must implement it first."
        )
    for name, values in accepts.items():
        if name in hf and hf[name] not in values:
            raise ValueError(
                f"config: {name} is {hf[name]!r}; family {family.name!r} implements "
                f"{' or '.join(map(repr, values))} only."
            )


_REQUIRED = {"vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "activation"}
_TYPES = typing.get_type_hints(DecoderConfig)
_WORDS = {bool: ("true or false", (bool,)), float: ("a number", (float, int)), int: ("a whole number", (int,))}


def _refuse_type(name: str, value: Any, field: str) -> None:
    """JSON's types as they are: the text "false" would count as true."""
    kind = _TYPES[field]
    if isinstance(kind, types.UnionType):
        kind = next(each for each in typing.get_args(kind) if each is not types.NoneType)
    words, types_ = _WORDS.get(kind, (f"one of {', '.join(map(repr, typing.get_args(kind)))}", (str,)))
    if value is not None and type(value) not in types_:
        raise ValueError(f"config: {name} is {value!r}; it must be {words}.")


def _activation(family: Family, name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise ValueError(
            f"config: {name} is {value!r}; family {family.name!r} implements {', '.join(map(repr, _ACTIVATIONS))} only."
        )
    return _ACTIVATIONS[value]


def _head_dim(fields: Mapping[str, Any]) -> int:
    width, heads = fields["hidden_size"], fields["num_heads"]
    if type(width) is not int or type(heads) is not int or heads < 1 or width % heads:
        raise ValueError(
            f"config: hidden_size {width!r} is not a multiple of num_attention_heads {heads!r}; give head_dim."
        )
    return width // heads


def _rope(family: Family, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the rotation. A share of the channels or a second base are read where the family has them."""
    fields, ours = {}, {ours for _, ours in family.config}
    given = hf.get("rope_parameters")
    if "local_rope_theta" in ours and isinstance(given, Mapping) and "full_attention" in given:
        local = {"rope_parameters": given.get("sliding_attention")}
        fields["local_rope_theta"], stretched = rope_from_hf(local)
        if stretched is not None:
            raise ValueError("config: rope scaling of the layers with a window is not implemented.")
        given = given["full_attention"]
        hf = {**hf, "rope_parameters": given}
    if "rotary_fraction" in ours and isinstance(given, Mapping) and given.get("partial_rotary_factor") is not None:
        fields["rotary_fraction"] = given["partial_rotary_factor"]
        _refuse_type("partial_rotary_factor", fields["rotary_fraction"], "rotary_fraction")
        fields["rotary_fraction"] = float(fields["rotary_fraction"])
        hf = {**hf, "rope_parameters": {k: v for k, v in given.items() if k != "partial_rotary_factor"}}
    base = next((hf.get(theirs) for theirs, ours in family.config if ours == "rope_theta"), None)
    theta, scaling = rope_from_hf({"rope_theta": base, **hf} if base is not None else hf)
    return {**fields, "rope_theta": theta, "rope_scaling": scaling}


def _sliding_layers(family: Family, hf: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which layers have the window; empty where all are alike."""
    kinds, sliding = hf.get("layer_types"), "sliding_window" in fields
    if family.full_every and sliding:
        if kinds is None:
            every = hf.get("sliding_window_pattern", family.full_every)
            _refuse_type("sliding_window_pattern", every, "num_layers")
            layers = fields["num_layers"]
            _refuse_type("num_hidden_layers", layers, "num_layers")
            return tuple((i + 1) % max(every, 1) != 0 for i in range(min(layers, 1 << 12)))
        if isinstance(kinds, list) and all(kind in ("sliding_attention", "full_attention") for kind in kinds):
            return tuple(kind == "sliding_attention" for kind in kinds)
    wanted = "sliding_attention" if sliding else "full_attention"
    if kinds is not None and (not isinstance(kinds, list) or any(kind != wanted for kind in kinds)):
        raise ValueError(f"config: layer_types has other entries than {wanted!r}; mixed layers are not implemented.")
    return ()
