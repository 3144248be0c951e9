# SPDX-License-Identifier: Apache-2.0
"""How good a model is, and how far quantization moved it: perplexity, KL divergence and top-1 agreement.

The recipe is fixed, so that numbers compare: the first ``tokens`` ids of a text are cut into windows of ``ctx`` ids
that do not overlap, each window is seen on its own from position 0, and every position but the first is predicted. Sums
over positions are divided by their number, ``windows * (ctx - 1)``.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["Evaluation", "TextTooShort", "TokenOutOfRange", "cut_windows", "evaluate", "kl", "perplexity", "with_error"]

Apply = Callable[[Any, Int[Array, "b t"]], Float[Array, "b t v"]]
"""``(params, tokens) -> logits``: pure. Params are an argument, so that no weight becomes a constant of the program."""


class TextTooShort(ValueError):
    """The text holds fewer tokens than one window."""


class TokenOutOfRange(ValueError):
    """An id that the model has no embedding for: most likely the tokenizer of another model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one pass over the windows measured.

    Attributes:
      perplexity: exp of the mean negative log likelihood.
      perplexity_stderr: its standard error, from the spread between windows; None for a single window.
      kl: mean ``KL(base || model)`` in nats a token; None without a base.
      top1: share of positions where model and base agree on the likeliest token; None without a base.
      tokens: predicted positions.
    """

    perplexity: float
    perplexity_stderr: float | None
    kl: float | None
    top1: float | None
    tokens: int


def with_error(value: float, stderr: float | None, *, places: int = 2) -> str:
    """A value for people, with its standard error where it has one.

    >>> with_error(18.1, 0.85), with_error(18.1, None)
    ('18.10 ± 0.85', '18.10')
    """
    return f"{value:.{places}f}" + ("" if stderr is None else f" ± {stderr:.{places}f}")


def cut_windows(
    ids: Sequence[int] | np.ndarray, *, ctx: int = 192, tokens: int = 20_000, vocab_size: int
) -> np.ndarray:
    """The windows of a text, int32 ``[windows, ctx]``; ids beyond ``tokens`` and the remainder are dropped.

    Raises:
      TextTooShort: fewer ids than one window.
      TokenOutOfRange: an id is negative or not below ``vocab_size``.

    >>> cut_windows(range(7), ctx=3, vocab_size=8).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    if ctx < 2:
        raise ValueError(f"a window needs 2 tokens to predict one, not ctx={ctx}.")
    count = min(len(ids), tokens) // ctx
    if not count:  # of a longer text no more ids may be here than were asked for: no word of how many it has
        few = f"{tokens} tokens were asked for" if len(ids) >= tokens else f"the text has {len(ids)} tokens"
        more = "Ask for more (--tokens)" if len(ids) >= tokens else "Give more text"
        raise TextTooShort(f"{few}, fewer than one window of ctx={ctx}. {more}, or choose a smaller window (--ctx).")
    cut = np.asarray(ids[: count * ctx], np.int64)
    bad = cut[(cut < 0) | (cut >= vocab_size)]
    if bad.size:
        raise TokenOutOfRange(
            f"token id {bad[0]} is outside the model's vocabulary of {vocab_size}. Is this the model's own tokenizer?"
        )
    return cut.astype(np.int32).reshape(count, ctx)


def evaluate(
    apply: Apply,
    params: Any,
    windows: np.ndarray,
    *,
    base: tuple[Apply, Any] | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Perplexity of a model and, against a base, KL and top-1 agreement: one pass over both, in float32.

    Args:
      apply: ``(params, tokens int32 [b, t]) -> logits [b, t, v]``, pure. The same function compiles once.
      params: its first argument, any pytree.
      windows: int32 ``[windows, ctx]``, from `cut_windows`.
      base: ``(apply, params)`` of the model to compare with; logits of the same shape.
      batch: windows at a time; the last batch is filled up, so that one shape is compiled.
      progress: called with (windows done, windows).
    """
    count, ctx = windows.shape
    base_apply, base_params = base or (None, None)
    sums = []
    for start in range(0, count, batch):
        rows = windows[start : start + batch]
        filled = np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)])
        sums.append(np.asarray(_sums(apply, base_apply, params, base_params, jnp.asarray(filled)))[:, : len(rows)])
        progress(start + len(rows), count)
    nll, divergence, agreed = np.concatenate(sums, axis=1).astype(np.float64)
    scored = count * (ctx - 1)
    spread = nll.std(ddof=1) / (ctx - 1) / math.sqrt(count) if count > 1 else None
    value = math.exp(nll.sum() / scored)
    return Evaluation(
        perplexity=value,
        perplexity_stderr=None if spread is None else value * spread,  # d exp(x) = exp(x) dx
        kl=float(divergence.sum()) / scored if base else None,
        top1=float(agreed.sum()) / scored if base else None,
        tokens=scored,
    )


def perplexity(apply: Apply, params: Any, windows: np.ndarray, *, batch: int = 8) -> float:
    """exp of the mean negative log likelihood; `evaluate` says how sure it is.

    >>> uniform = lambda params, tokens: jnp.zeros((*tokens.shape, 16))
    >>> round(perplexity(uniform, None, np.zeros((3, 5), np.int32)), 4)
    16.0
    """
    return evaluate(apply, params, windows, batch=batch).perplexity


def kl(base: tuple[Apply, Any], model: tuple[Apply, Any], windows: np.ndarray, *, batch: int = 8) -> float:
    """Mean ``KL(base || model)`` in nats a token: what quantization cost, whatever the text is like."""
    value = evaluate(*model, windows, base=base, batch=batch).kl
    assert value is not None
    return value


@partial(jax.jit, static_argnums=(0, 1))
def _sums(
    apply: Apply, base_apply: Apply | None, params: Any, base_params: Any, tokens: Int[Array, "b t"]
) -> Float[Array, "3 b"]:
    """By window: negative log likelihood, KL from the base, positions where both agree."""
    logits = apply(params, tokens)[:, :-1].astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0].sum(-1)
    if base_apply is None:
        return jnp.stack([nll, jnp.zeros_like(nll), jnp.zeros_like(nll)])
    base_logits = base_apply(base_params, tokens)[:, :-1].astype(jnp.float32)
    log_b = jax.nn.log_softmax(base_logits)
    divergence = jnp.sum(jnp.exp(log_b) * (log_b - log_p), axis=(-2, -1))
    agreed = jnp.sum(logits.argmax(-1) == base_logits.argmax(-1), axis=-1, dtype=jnp.float32)
    return jnp.stack([nll, divergence, agreed])
