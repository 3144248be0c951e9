# SPDX-License-Identifier: Apache-2.0
"""The shape that a config implies for every parameter, to hold against a file's before anything is allocated."""

import dataclasses

from awq_jax.models import DecoderConfig, param_shapes

__all__ = ["KNOWN_LINEARS", "KNOWN_NORMS", "KNOWN_TENSORS", "expected_shape", "implied_paths"]


def implied_paths(config: DecoderConfig) -> set[str]:
    """Paths of all parameters that a model of this config has; layers hold the same ones, so one tells of all."""
    one = param_shapes(dataclasses.replace(config.of_layer(0), num_layers=1))
    layers = [path.removeprefix("layers/0/") for path in one if path.startswith("layers/0/")]
    outside = {path for path in one if not path.startswith("layers/")}
    return outside | {f"layers/{index}/{path}" for index in range(config.num_layers) for path in layers}


def expected_shape(config: DecoderConfig, path: str) -> tuple[int, ...]:
    """Shape of a parameter of the decoder.

    Args:
      config: of the decoder.
      path: with its layer index, for example ``layers/3/attn/q/kernel``; a kernel is ``[in, out]``.

    Raises:
      KeyError: the decoder has no such parameter.
    """
    if path == "embed/embedding":
        return (config.vocab_size, config.hidden_size)
    if path == "embed/positions":
        return (config.max_position_embeddings + config.position_offset, config.hidden_size)
    module, _, leaf = path.rpartition("/")
    if module.startswith("layers/"):
        module = module.split("/", 2)[2]
    linears, norms = _linears(config), _norms(config)
    if module in linears and leaf in ("kernel", "bias"):
        *stacked, k, n = linears[module]
        return (*stacked, k, n) if leaf == "kernel" else (*stacked, n)
    if module in norms and leaf in ("scale", "bias"):
        return (norms[module],)
    raise KeyError(f"the decoder has no parameter {path!r}.")


def _linears(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    d, head = config.hidden_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    linears: dict[str, tuple[int, ...]] = {
        "attn/q": (d, queries),
        "attn/k": (d, keys),
        "attn/v": (d, keys),
        "attn/o": (queries, d),
        "lm_head": (d, config.vocab_size),
    }
    if not config.num_experts:
        return linears | _mlp("mlp", d, config.intermediate_size)
    linears |= _mlp("mlp/experts", d, config.expert_size, config.num_experts)
    linears["mlp/router"] = (d, config.num_experts)
    if config.shared_expert_size:
        linears |= _mlp("mlp/shared", d, config.shared_expert_size)
        linears["mlp/shared_gate"] = (d, 1)
    return linears


def _mlp(name: str, d: int, inner: int, *stacked: int) -> dict[str, tuple[int, ...]]:
    up = (*stacked, d, inner)
    return {f"{name}/gate": up, f"{name}/up": up, f"{name}/down": (*stacked, inner, d)}


def _norms(config: DecoderConfig) -> dict[str, int]:
    d, head = config.hidden_size, config.head_dim
    alone = config.qk_norm != "all"
    names = ("embed/norm", "input_norm", "attn_out_norm", "post_norm", "mlp_out_norm", "norm")
    return {
        **dict.fromkeys(names, d),
        "attn/q_norm": head if alone else config.num_heads * head,
        "attn/k_norm": head if alone else config.num_kv_heads * head,
    }


_SOME = DecoderConfig(
    vocab_size=2, hidden_size=2, intermediate_size=2, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2
)
_MIXED = dataclasses.replace(_SOME, num_experts=1, experts_per_token=1, expert_size=2, shared_expert_size=2)
KNOWN_LINEARS = frozenset({*_linears(_SOME), *_linears(_MIXED)} - {"lm_head"})
"""Every linear that a layer may have, relative to it."""
KNOWN_NORMS = frozenset(_norms(_SOME))
"""Every norm that there may be, those of a layer relative to it."""
KNOWN_TENSORS = frozenset({"embed/embedding", "embed/positions"})
"""What there may be beside them."""
