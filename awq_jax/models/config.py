# SPDX-License-Identifier: Apache-2.0
"""What a decoder looks like: read strictly from a Hugging Face config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from awq_jax.families import Family
from awq_jax.models.rope import RopeScaling, rope_from_hf

__all__ = ["DecoderConfig", "config_from_hf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape and mechanisms of a decoder; hashable, so that jit takes it as a static argument.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width d of the residual stream.
      intermediate_size: width of the gated MLP.
      num_layers: how many.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides num_heads.
      head_dim: width of a head; ``num_heads * head_dim`` need not be hidden_size.
      max_position_embeddings: positions the model was trained for.
      norm_eps: of every RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: how they are stretched, or None.
      tie_embeddings: the head is the transposed embedding.
      qkv_bias: q, k and v have biases.
      o_bias: o has one.
      mlp_bias: gate, up and down have biases.
      qk_norm: RMSNorm over head_dim of q and k before the rotation.
      sliding_window: positions a query sees, itself included; None is all.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if name == "sliding_window" and value is None:
                continue
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"config: {name} is {value!r}; it must be a whole number from 1 to {limit}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config: {self.num_heads} query heads can't share {self.num_kv_heads} kv heads evenly; "
                "num_attention_heads must be a multiple of num_key_value_heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim is {self.head_dim}; rotary embeddings need an even one.")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"config: norm_eps is {self.norm_eps}; it must lie between 0 and 1, usually 1e-6 or 1e-5.")


# Far above any model there is; a config beyond them is damaged or hostile, and must not size an allocation.
_LIMITS = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_layers": 1 << 12,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 26,
    "sliding_window": 1 << 26,
}

_ELSEWHERE = {"rope_theta", "rope_scaling", "rope_parameters", "layer_types"}  # read by functions of their own

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
    fields: dict[str, Any] = {ours: hf[theirs] for theirs, ours in family.config if hf.get(theirs) is not None}
    missing = [theirs for theirs, ours in family.config if ours in _REQUIRED and ours not in fields]
    if missing:
        raise ValueError(f"config: {missing[0]!r} is missing, and family {family.name!r} needs it.")
    for theirs, ours in family.config:
        _refuse_type(theirs, fields.get(ours), ours)
    fields.setdefault("num_kv_heads", fields["num_heads"])
    fields.setdefault("head_dim", _head_dim(fields))
    _refuse_mixed_layers(hf.get("layer_types"), "sliding_window" in fields)
    theta, scaling = rope_from_hf(hf)
    return DecoderConfig(**{**fields, "rope_theta": theta, "rope_scaling": scaling, **dict(family.options)})


_REQUIRED = {"vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"}
_TYPES = {field.name: field.type for field in dataclasses.fields(DecoderConfig)}
_WORDS = {bool: ("true or false", (bool,)), float: ("a number", (float, int))}


def _refuse_type(name: str, value: Any, field: str) -> None:
    """JSON's types as they are: the text "false" would count as true."""
    words, types = _WORDS.get(_TYPES[field], ("a whole number", (int,)))
    if value is not None and type(value) not in types:
        raise ValueError(f"config: {name} is {value!r}; it must be {words}.")


def _head_dim(fields: Mapping[str, Any]) -> int:
    width, heads = fields["hidden_size"], fields["num_heads"]
    if type(width) is not int or type(heads) is not int or heads < 1 or width % heads:
        raise ValueError(
            f"config: hidden_size {width!r} is not a multiple of num_attention_heads {heads!r}; give head_dim."
        )
    return width // heads


def _refuse_mixed_layers(kinds: Any, sliding: bool) -> None:
    """Every layer attends alike: over everything, or over the window."""
    wanted = "sliding_attention" if sliding else "full_attention"
    if kinds is not None and (not isinstance(kinds, list) or any(kind != wanted for kind in kinds)):
        raise ValueError(f"config: layer_types has other entries than {wanted!r}; mixed layers are not implemented.")
