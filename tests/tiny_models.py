# SPDX-License-Identifier: Apache-2.0
"""Tiny models made by transformers' PyTorch classes: the oracle that the decoder and the readers are held against."""

import dataclasses
import functools
import math
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from awq_jax.models import DecoderConfig
from awq_jax.models.functional import forward
from tests.models.families import TOKENS, Tiny

__all__ = ["Oracle", "logits_of", "make_oracle", "rounding", "save_oracle", "some_tokens"]


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A PyTorch model and its checkpoint directory."""

    row: Tiny
    model: Any
    path: Path

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """float32 ``[b, t, vocab]``."""
        with torch.no_grad():
            return self.model(torch.from_numpy(tokens).long(), use_cache=False).logits.float().numpy()

    def generate(self, tokens: np.ndarray, new: int) -> np.ndarray:
        """Greedy continuation ``[b, new]``."""
        prompt = torch.from_numpy(tokens).long()
        every = torch.ones_like(prompt)
        out = self.model.generate(prompt, attention_mask=every, max_new_tokens=new, do_sample=False, pad_token_id=0)
        return out[:, prompt.shape[1] :].numpy()


def make_oracle(row: Tiny) -> Any:
    """The PyTorch model with every parameter random: a gain of ones or a bias of zeros would hide a mistake."""
    config = transformers.AutoConfig.for_model(row.model_type or row.family, **row.arguments)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    numbers = torch.Generator().manual_seed(zlib.crc32(row.id.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=numbers)
            if parameter.ndim >= 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                gain = name.endswith("weight") and not row.family.startswith("gemma")  # theirs is kept less one
                parameter.copy_(0.3 * noise + (1.0 if gain else 0.0))
    return model


def save_oracle(row: Tiny, path: Path, *, dtype: Any = torch.float32, max_shard_size: str = "1GB") -> Oracle:
    """Make a model, round it to dtype and write it as transformers does."""
    model = make_oracle(row).to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return Oracle(row, model, path)


def some_tokens(vocab: int, batch: int = 2, length: int = TOKENS) -> np.ndarray:
    """The same token ids in every run."""
    return np.random.default_rng(0).integers(0, vocab, (batch, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: DecoderConfig, params: Any, tokens: jax.Array) -> jax.Array:
    return forward(config, params, tokens)


def logits_of(config: DecoderConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Our logits, compiled once for each config and structure of the parameters."""
    return np.asarray(_forward(config, params, jnp.asarray(tokens)))


def rounding(config: DecoderConfig) -> float:
    """What float32 rounding may change of a model's logits, relative to the largest.

    The longest path of a layer has eight reductions (two norms, q, attention's two, o, gate, down), that of the head
    two. A reduction of length k errs by sqrt(k) rounding errors of half an eps each, at the size of its terms; the
    errors of two implementations add.
    """
    longest = max(config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    return 2 * (8 * config.num_layers + 2) * math.sqrt(longest) * float(np.finfo(np.float32).eps / 2)
