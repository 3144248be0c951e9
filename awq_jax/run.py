# SPDX-License-Identifier: Apache-2.0
"""Run a checkpoint directory, dense or quantized: load, measure, generate."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from awq_jax.evaluate import Evaluation, cut_windows, evaluate
from awq_jax.models import Decoder, DecoderConfig, generate
from awq_jax.models.functional import forward
from awq_jax.models.sampling import refuse_sampling
from awq_jax.texts import document_ids, encode_start, is_json_lines, read_text, refuse_file
from awq_jax_convert.formats import open_checkpoint
from awq_jax_convert.hf_config import FamilyChoice
from awq_jax_convert.source import Checkpoint
from awq_jax_convert.tokenizer import Tokenizer

__all__ = ["LoadedModel", "evaluate_checkpoint", "generate_text", "load_model", "logits"]

PathLike = str | os.PathLike[str]

TEXT = "text file"  # what errors call what is measured on


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A checkpoint in memory.

    Attributes:
      checkpoint: where it came from.
      params: nested dict on the device; kernels are arrays or `QTensor`.
    """

    checkpoint: Checkpoint
    params: Any

    @property
    def config(self) -> DecoderConfig:
        """Of the decoder."""
        return self.checkpoint.config

    @property
    def tokenizer(self) -> Tokenizer:
        """From the checkpoint's ``tokenizer.json``.

        Raises:
          FileNotFoundError: it has none.
        """
        return Tokenizer.from_file(self.checkpoint.path / "tokenizer.json")

    @property
    def decoder(self) -> Decoder:
        """The Flax NNX model that holds the parameters."""
        return Decoder.from_params(self.config, self.params)


def load_model(path: PathLike, dtype: Any = jnp.float32, family: FamilyChoice = None) -> LoadedModel:
    """Load a checkpoint directory, Hugging Face's or native, dense or quantized.

    Args:
      path: of the directory.
      dtype: of dense parameters, and therefore of activations; quantized weights stay packed.
      family: a table, the name of one or its TOML file, instead of the one that serves config.json's architecture.

    Raises:
      FileNotFoundError, ValueError: the checkpoint is missing, damaged or not understood; each message names it.
    """
    checkpoint = open_checkpoint(path, family)
    return LoadedModel(checkpoint=checkpoint, params=jax.tree.map(jnp.asarray, checkpoint.params(dtype)))


def logits(model: LoadedModel, ids: Any) -> Array:
    """Logits of every position; one compilation for each shape of ``ids``.

    Args:
      model: from `load_model`.
      ids: whole numbers below the vocabulary's size, ``[t]`` or ``[b, t]``, for example of
        ``model.tokenizer.encode(text)``.

    Returns:
      ``[t, vocab]`` or ``[b, t, vocab]``, in the dtype the model was loaded with; row i is about the token after i.

    Raises:
      ValueError: ids of another shape or dtype, outside the vocabulary, or more than the model has positions.

    >>> from awq_jax.demo import MODEL
    >>> model = load_model(MODEL)
    >>> logits(model, model.tokenizer.encode("Return a list of")).shape[-1] == model.config.vocab_size
    True
    """
    tokens, config = np.asarray(ids), model.config
    if tokens.ndim not in (1, 2) or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"ids are {tokens.dtype}{list(tokens.shape)}; they must be whole numbers, [t] or [b, t].")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(
            f"ids reach from {tokens.min()} to {tokens.max()}, the model knows 0 to {config.vocab_size - 1}. Are they "
            "of its own tokenizer?"
        )
    if tokens.shape[-1] > config.max_position_embeddings:
        raise ValueError(f"{tokens.shape[-1]} ids do not fit {config.max_position_embeddings} positions; give fewer.")
    made = _jitted(config)(model.params, jnp.asarray(np.atleast_2d(tokens), jnp.int32))
    return made if tokens.ndim == 2 else made[0]


@functools.cache  # one object for each config: models of equal shape share a compilation
def _apply(config: DecoderConfig) -> Callable[[Any, Any], Any]:
    return functools.partial(forward, config)


@functools.cache
def _jitted(config: DecoderConfig) -> Callable[[Any, Any], Any]:
    return jax.jit(_apply(config))


def evaluate_checkpoint(
    path: PathLike,
    text: PathLike,
    *,
    base: PathLike | None = None,
    tokens: int = 20_000,
    ctx: int = 192,
    batch: int = 8,
    family: FamilyChoice = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Perplexity of a checkpoint on a text and, with a base, KL divergence from it; float32 activations.

    Args:
      path: checkpoint directory.
      text: a file of UTF-8 text, or of JSON lines, whose documents follow one another.
      base: checkpoint to compare with, usually the unquantized one.
      tokens: of the text to use, at most.
      ctx: tokens of a window; windows do not overlap and are seen on their own.
      batch: windows at a time.
      family: of both checkpoints; see `load_model`.
      progress: called with (windows done, windows).

    Raises:
      FileNotFoundError: no such checkpoint or text.
      ValueError: the text is not UTF-8 or too short, the two checkpoints do not share a vocabulary, a window is longer
        than the model's positions, or its logits are not finite.
    """
    for name, value in (("tokens", tokens), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1 (--{name}).")
    held = Path(text)
    refuse_file(held, TEXT, "--text")
    words = None if is_json_lines(held) else read_text(held, TEXT)  # before minutes of loading
    model = load_model(path, family=family)
    if ctx > model.config.max_position_embeddings:
        raise ValueError(
            f"windows of {ctx} tokens were asked for, but {path} has {model.config.max_position_embeddings} positions. "
            f"Ask for at most that many (--ctx)."
        )
    reference = None if base is None else load_model(base, family=family)
    encode = model.tokenizer.encode
    if words is None:
        ids = document_ids(held, encode, TEXT, tokens)
    else:
        ids = encode_start(words, encode, str(held), tokens)
    if reference is not None:
        _refuse_other_vocabulary(model, reference, ids)
    windows = cut_windows(np.asarray(ids), ctx=ctx, tokens=tokens, vocab_size=model.config.vocab_size)
    with jax.default_matmul_precision("highest"):
        try:
            measured = evaluate(
                _apply(model.config),
                model.params,
                windows,
                base=None if reference is None else (_apply(reference.config), reference.params),
                batch=min(batch, len(windows)),
                progress=progress,
            )
        except OverflowError:  # exp of a mean over 709
            measured = None
    if measured is None or not all(map(math.isfinite, (measured.perplexity, measured.kl or 0.0))):
        raise ValueError(
            f"perplexity or KL divergence of {path} on {text} is not finite: the logits overflow float32, or the "
            "checkpoint is damaged. Compare with the unquantized one."
        )
    return measured


def _refuse_other_vocabulary(model: LoadedModel, base: LoadedModel, ids: list[int]) -> None:
    """KL compares distributions over the same tokens."""
    same_size = model.config.vocab_size == base.config.vocab_size
    if not same_size or base.tokenizer.decode(ids[:4096]) != model.tokenizer.decode(ids[:4096]):
        raise ValueError(
            f"{model.checkpoint.path} and {base.checkpoint.path} do not share a vocabulary ({model.config.vocab_size} "
            f"and {base.config.vocab_size} tokens); KL compares a model with the one it was made from."
        )


def generate_text(
    path: PathLike,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    family: FamilyChoice = None,
) -> dict[str, Any]:
    """Continue a prompt.

    Args:
      path: checkpoint directory.
      prompt: text that makes at least one token.
      max_new_tokens: at most; fewer if the model ends the text.
      temperature: 0 is greedy.
      top_k: sample from the k likeliest tokens.
      top_p: sample from the smallest set of probability p.
      seed: of sampling.
      family: see `load_model`.

    Returns:
      ``prompt``, ``text`` (what was added) and ``tokens`` (its ids).

    Raises:
      ValueError: an empty prompt, more tokens than the model has positions for, or a seed that is not 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it must be from 0 to {2**32 - 1} (--seed).")
    refuse_sampling(temperature, top_k, top_p)  # before the weights are read
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1 (--max-new-tokens).")
    model = load_model(path, jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16, family)
    return continue_prompt(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        key=jax.random.key(seed),
    )


def continue_prompt(model: LoadedModel, prompt: str, *, max_new_tokens: int, **sampling: Any) -> dict[str, Any]:
    """`generate_text` with a model that is already loaded; ``sampling`` as `awq_jax.models.generate` takes it."""
    ids = model.tokenizer.encode(prompt, special=True)
    room = model.config.max_position_embeddings - len(ids)
    if not ids:
        raise ValueError("the prompt is empty; give at least one word.")
    if room < max_new_tokens:
        less = f"Ask for at most {room} (--max-new-tokens)" if room > 0 else "Give a shorter one (--prompt)"
        raise ValueError(
            f"the prompt has {len(ids)} tokens and {max_new_tokens} more were asked for, but the model has "
            f"{model.config.max_position_embeddings} positions. {less}."
        )
    stops = model.checkpoint.hf.stop_tokens
    made = generate(model.decoder, jnp.array([ids]), max_new_tokens=max_new_tokens, stop_tokens=stops, **sampling)
    new = np.asarray(made[0]).tolist()
    end = next((i for i, token in enumerate(new) if token in stops), len(new))
    return {"prompt": prompt, "text": model.tokenizer.decode(new[:end]), "tokens": new[:end]}
