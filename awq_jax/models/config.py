# SPDX-License-Identifier: Apache-2.0
"""What a decoder looks like: the shapes and mechanisms that families choose from."""

import dataclasses
from typing import Literal

from awq_jax.models.rope_scaling import RopeScaling

__all__ = ["DecoderConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape and mechanisms of a decoder; hashable, so that jit takes it as a static argument.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width d of the residual stream.
      intermediate_size: width of the MLP.
      num_layers: how many.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides num_heads.
      head_dim: width of a head; ``num_heads * head_dim`` need not be hidden_size.
      max_position_embeddings: positions the model was trained for.
      norm: "rms", or "layer" with the mean taken out and a bias.
      norm_eps: of every norm.
      norm_offset: added to a norm's gain; 1 where the file holds ``gain - 1``.
      norm_placement: norms "before" attention and MLP, "after" them (before they are added), or "both".
      parallel: attention and MLP read the same stream and are added together.
      one_norm: where parallel, they read the same norm too.
      embed_norm: a norm follows the embedding.
      scale_embedding: the embedding is multiplied by ``sqrt(hidden_size)``.
      positions: "rotary" turns q and k, "learned" adds to the embedding, "alibi" adds to the scores.
      position_offset: rows of the learned positions before that of position 0.
      rope_theta: base of the rotary frequencies.
      rope_scaling: how they are stretched, or None.
      rotary_fraction: share of a head's channels that turn.
      local_rope_theta: base in the layers that attend over a window, unstretched; None is as in the others.
      sliding_window: positions a query sees, itself included; None is all.
      sliding_layers: which layers have the window; empty is every one.
      activation: of the MLP; "gelu_tanh" is the approximation by tanh.
      gated: ``down(activation(gate(x)) * up(x))``, or without a gate ``down(activation(up(x)))``.
      tie_embeddings: the head is the transposed embedding.
      qkv_bias: q, k and v have biases.
      o_bias: o has one.
      mlp_bias: the linears of the MLP have biases.
      qk_norm: a norm of q and k before they turn: over each "head", over "all" heads together, or none.
      query_scalar: scores are divided by its square root; None is head_dim.
      attn_softcap: scores are ``cap * tanh(scores / cap)``.
      logit_softcap: and so are the logits.
      num_experts: MLPs of which a router chooses for each token; 0 is one MLP without a router.
      experts_per_token: how many it chooses.
      expert_size: width of each.
      normalize_experts: the weights of those that were chosen sum to one.
      shared_expert_size: width of one more MLP that every token goes through, behind a gate of its own; 0 is none.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    norm_placement: Literal["before", "after", "both"] = "before"
    parallel: bool = False
    one_norm: bool = False
    embed_norm: bool = False
    scale_embedding: bool = False
    positions: Literal["rotary", "learned", "alibi"] = "rotary"
    position_offset: int = 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = 1.0
    local_rope_theta: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None
    query_scalar: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    normalize_experts: bool = True
    shared_expert_size: int = 0

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if name == "sliding_window" and value is None:
                continue
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"config: {name} is {value!r}; it must be a whole number from {least} to {most}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config: {self.num_heads} query heads can't share {self.num_kv_heads} kv heads evenly; "
                "num_attention_heads must be a multiple of num_key_value_heads."
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"config: head_dim is {self.head_dim}; rotary embeddings need an even one.")
        if self.positions == "rotary" and (not 0 < self.rotary_fraction <= 1 or self.rotary_dim % 2):
            raise ValueError(
                f"config: {self.rotary_fraction} of head_dim={self.head_dim} channels are to turn; it must be an even "
                "number of them."
            )
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"config: norm_eps is {self.norm_eps}; it must lie between 0 and 1, usually 1e-6 or 1e-5.")
        for name in ("query_scalar", "attn_softcap", "logit_softcap", "local_rope_theta"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"config: {name} is {value!r}; it must be a positive number or null.")
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise ValueError(f"config: {len(self.sliding_layers)} layer_types for {self.num_layers} layers.")
        if self.num_experts and not (1 <= self.experts_per_token <= self.num_experts and self.expert_size):
            raise ValueError(
                f"config: {self.experts_per_token} of {self.num_experts} experts of width {self.expert_size} for each "
                "token; give a number from 1 to all of them, and a width."
            )

    @property
    def rotary_dim(self) -> int:
        """How many of a head's channels turn."""
        return int(self.head_dim * self.rotary_fraction)

    def of_layer(self, index: int) -> "DecoderConfig":
        """The config of one layer: its own window and rotation. Layers that are alike get equal ones."""
        if not self.sliding_layers:
            return self
        if not self.sliding_layers[index]:
            return dataclasses.replace(self, sliding_layers=(), sliding_window=None, local_rope_theta=None)
        local = {} if self.local_rope_theta is None else {"rope_theta": self.local_rope_theta, "rope_scaling": None}
        return dataclasses.replace(self, sliding_layers=(), local_rope_theta=None, **local)


# Far above any model there is; a config beyond them is damaged or hostile, and must not size an allocation.
_LIMITS = {
    "vocab_size": (1, 1 << 22),
    "hidden_size": (1, 1 << 17),
    "intermediate_size": (1, 1 << 20),
    "num_layers": (1, 1 << 12),
    "num_heads": (1, 1 << 12),
    "num_kv_heads": (1, 1 << 12),
    "head_dim": (1, 1 << 12),
    "max_position_embeddings": (1, 1 << 26),
    "sliding_window": (1, 1 << 26),
    "position_offset": (0, 1 << 12),
    "num_experts": (0, 1 << 12),
    "experts_per_token": (0, 1 << 12),
    "expert_size": (0, 1 << 20),
    "shared_expert_size": (0, 1 << 20),
}
