# SPDX-License-Identifier: Apache-2.0
"""How google-tunix writes the model families: the classes, their configs, and the name and axes of every parameter.

Read in tunix 0.1.7. A row that a version does not have any more shows when a checkpoint is loaded, and what a version
computes otherwise shows in `awq_jax.serving.tunix_proof`.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from awq_jax.adapt import Layout
from awq_jax.models import DecoderConfig

__all__ = ["FAMILIES", "Row", "TunixFamily"]


class Row(NamedTuple):
    """One parameter of tunix's model.

    Attributes:
      theirs: its path, a layer's number as ``*``.
      ours: the paths of the parameters that it holds side by side.
      axes: of a kernel, one letter each, capital where the product sums over it: "nDh" is the einsum
        ``...D,nDh->...nh``. Empty for what is copied as it is.
    """

    theirs: str
    ours: tuple[str, ...]
    axes: str = ""

    def match(self, path: str) -> str | None:
        """The layer's number where the path is this row's, "" where there is none, None where it is another's."""
        found = re.fullmatch(re.escape(self.theirs).replace(r"\*", "([0-9]+)"), path)
        return None if found is None else "".join(found.groups())

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Of a kernel of this row.

        >>> Row("attn/kv_einsum/w", ("attn/k/kernel", "attn/v/kernel"), "cnDh").layout((2, 1, 8, 4)).describe()
        '8 x 8'
        """
        summed = tuple(i for i, letter in enumerate(self.axes) if letter.isupper())
        rest = tuple(i for i in range(len(self.axes)) if i not in summed)
        return Layout(shape=shape, factors=shape, contract=summed, out=rest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunixFamily:
    """A family in tunix.

    Attributes:
      module: that has ``ModelConfig`` and the model.
      model: the class.
      config: fields of ``ModelConfig`` from (our config, the module, dtype of parameters).
      rows: of all parameters.
    """

    module: str
    model: str
    config: Callable[[DecoderConfig, Any, Any], dict[str, Any]]
    rows: tuple[Row, ...]


def _sizes(c: DecoderConfig) -> dict[str, Any]:
    return {
        "num_layers": c.num_layers,
        "embed_dim": c.hidden_size,
        "hidden_dim": c.intermediate_size,
        "num_heads": c.num_heads,
        "head_dim": c.head_dim,
        "num_kv_heads": c.num_kv_heads,
    }


def _llama(c: DecoderConfig, module: Any, dtype: Any) -> dict[str, Any]:
    rest = {"rope_theta": c.rope_theta, "norm_eps": c.norm_eps, "weight_tying": c.tie_embeddings}
    return {**_sizes(c), "vocab_size": c.vocab_size, **rest}


def _qwen(c: DecoderConfig, module: Any, dtype: Any) -> dict[str, Any]:
    rest = {"rope_theta": c.rope_theta, "norm_eps": c.norm_eps, "use_tied_embedding": c.tie_embeddings}
    return {**_sizes(c), "vocab_size": c.vocab_size, **rest, "dtype": dtype, "param_dtype": dtype}


def _gemma(c: DecoderConfig, module: Any, dtype: Any) -> dict[str, Any]:
    kinds = module.AttentionType
    both = c.norm_placement == "both"
    local = [c.of_layer(i).sliding_window is not None for i in range(c.num_layers)]
    return {
        **_sizes(c),
        "num_embed": c.vocab_size,
        "final_logit_softcap": c.logit_softcap,
        "attn_logits_soft_cap": c.attn_softcap,
        "use_post_attn_norm": both,
        "use_post_ffw_norm": both,
        "attention_types": tuple(kinds.LOCAL_SLIDING if windowed else kinds.GLOBAL for windowed in local),
        "sliding_window_size": c.sliding_window,
    }


def _gemma3(c: DecoderConfig, module: Any, dtype: Any) -> dict[str, Any]:
    scalings = module.QueryPreAttentionNormalisation
    by_head = c.query_scalar in (None, c.head_dim)
    return {
        **_sizes(c),
        "num_embed": c.vocab_size,
        "sliding_window_size": c.sliding_window,
        "local_base_frequency": c.local_rope_theta or c.rope_theta,
        "global_base_frequency": c.rope_theta,
        "global_scale_factor": 1.0 if c.rope_scaling is None else c.rope_scaling.factor,
        "query_pre_attn_norm": scalings.BY_ONE_OVER_SQRT_HEAD_DIM
        if by_head
        else scalings.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS,
        "param_dtype": dtype,
    }


L = "layers/*"


def _kernel(theirs: str, axes: str, *ours: str) -> Row:
    return Row(f"{L}/{theirs}", tuple(f"{L}/{path}/kernel" for path in ours), axes)


def _norm(theirs: str, ours: str) -> Row:
    return Row(f"{L}/{theirs}", (f"{L}/{ours}/scale",))


_EMBEDDING = Row("embedder/input_embedding", ("embed/embedding",))
_MLP = tuple(_kernel(f"mlp/{part}_proj/kernel", "Dn", f"mlp/{part}") for part in ("gate", "up", "down"))
_LLAMA = (
    _EMBEDDING,
    *(_kernel(f"attn/{part}_proj/w", "Dnh", f"attn/{part}") for part in "qkv"),
    _kernel("attn/o_proj/w", "NHd", "attn/o"),
    *_MLP,
    _norm("input_layernorm/w", "input_norm"),
    _norm("post_attention_layernorm/w", "post_norm"),
    Row("final_norm/w", ("norm/scale",)),
    Row("lm_head/w", ("lm_head/kernel",), "Dv"),
)
_GEMMA = (
    _EMBEDDING,
    _kernel("attn/q_einsum/w", "nDh", "attn/q"),
    _kernel("attn/kv_einsum/w", "cnDh", "attn/k", "attn/v"),
    _kernel("attn/qkv_einsum/w", "cnDh", "attn/q", "attn/k", "attn/v"),  # where every head has keys of its own
    _kernel("attn/attn_vec_einsum/w", "NHd", "attn/o"),
    *_MLP,
    _norm("pre_attention_norm/scale", "input_norm"),
    _norm("pre_ffw_norm/scale", "post_norm"),
    _norm("post_ffw_norm/scale", "mlp_out_norm"),
    Row("final_norm/scale", ("norm/scale",)),
)
_BIASES = tuple(Row(f"{L}/attn/{part}_bias", (f"{L}/attn/{part}/bias",)) for part in "qkv")

FAMILIES = {
    "llama": TunixFamily(module="tunix.models.llama3.model", model="Llama3", config=_llama, rows=_LLAMA),
    "qwen2": TunixFamily(module="tunix.models.qwen2.model", model="Qwen2", config=_qwen, rows=(*_LLAMA, *_BIASES)),
    "qwen3": TunixFamily(
        module="tunix.models.qwen3.model",
        model="Qwen3",
        config=_qwen,
        rows=(*_LLAMA, _norm("attn/q_norm/w", "attn/q_norm"), _norm("attn/k_norm/w", "attn/k_norm")),
    ),
    "gemma": TunixFamily(module="tunix.models.gemma.model", model="Gemma", config=_gemma, rows=_GEMMA),
    "gemma2": TunixFamily(
        module="tunix.models.gemma.model",
        model="Gemma",
        config=_gemma,
        rows=(*_GEMMA, _norm("post_attn_norm/scale", "attn_out_norm")),
    ),
    "gemma3_text": TunixFamily(
        module="tunix.models.gemma3.model",
        model="Gemma3",
        config=_gemma3,
        rows=(
            *_GEMMA,
            _norm("post_attention_norm/scale", "attn_out_norm"),
            _norm("attn/_query_norm/scale", "attn/q_norm"),
            _norm("attn/_key_norm/scale", "attn/k_norm"),
        ),
    ),
}
"""By the name of our family."""
