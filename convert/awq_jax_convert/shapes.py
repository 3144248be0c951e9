# SPDX-License-Identifier: Apache-2.0
"""The shape that a config implies for every parameter, to hold against a file's before anything is allocated."""

from awq_jax.models import DecoderConfig

__all__ = ["expected_shape"]


def expected_shape(config: DecoderConfig, path: str) -> tuple[int, ...]:
    """Shape of a parameter of the decoder.

    Args:
      config: of the decoder.
      path: with its layer index, for example ``layers/3/attn/q/kernel``; a kernel is ``[in, out]``.

    Raises:
      KeyError: the decoder has no such parameter.
    """
    d, f, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    linears = {
        "attn/q": (d, queries),
        "attn/k": (d, keys),
        "attn/v": (d, keys),
        "attn/o": (queries, d),
        "mlp/gate": (d, f),
        "mlp/up": (d, f),
        "mlp/down": (f, d),
        "lm_head": (d, config.vocab_size),
    }
    norms = {"input_norm": d, "post_norm": d, "norm": d, "attn/q_norm": head, "attn/k_norm": head}
    if path == "embed/embedding":
        return (config.vocab_size, d)
    module, _, leaf = path.rpartition("/")
    if module.startswith("layers/"):
        module = module.split("/", 2)[2]
    if module in linears and leaf in ("kernel", "bias"):
        return linears[module] if leaf == "kernel" else linears[module][1:]
    if module in norms and leaf in ("scale", "bias"):
        return (norms[module],)
    raise KeyError(f"the decoder has no parameter {path!r}.")
