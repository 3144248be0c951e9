# SPDX-License-Identifier: Apache-2.0
"""Score a checkpoint with the tasks of EleutherAI's lm-evaluation-harness; needs ``pip install lm_eval``.

    import lm_eval
    from awq_jax.lm_eval import HarnessModel

    lm_eval.simple_evaluate(HarnessModel("Llama-3.2-1B-int4"), tasks=["arc_easy", "hellaswag"])

Log likelihoods are of float32 activations; sequences are filled up to a few lengths, so that few shapes compile.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import postprocess_generated_text  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from awq_jax.models.functional import forward
from awq_jax.run import PathLike, load_model
from awq_jax.serving import Engine, Request, load
from awq_jax.serving.engine import buckets_for

__all__ = ["HarnessModel"]

_ANSWER = 256  # tokens, where a task does not say how many


@functools.partial(jax.jit, static_argnums=0)
def _score(config: Any, params: Any, ids: Int[Array, "b t"], start: Int[Array, " b"], end: Int[Array, " b"]) -> Any:
    """By row, the log likelihood of ``ids[start:end]`` behind what precedes it, and whether it is the greedy choice."""
    log_p = jax.nn.log_softmax(forward(config, params, ids[:, :-1]).astype(jnp.float32))
    wanted, at = ids[:, 1:], jnp.arange(1, ids.shape[1])
    inside = (at >= start[:, None]) & (at < end[:, None])
    taken: Float[Array, "b t"] = jnp.take_along_axis(log_p, wanted[..., None], axis=-1)[..., 0]
    greedy = jnp.where(inside, log_p.argmax(-1) == wanted, True).all(-1)
    return jnp.where(inside, taken, 0.0).sum(-1), greedy


class HarnessModel(TemplateLM):
    """A checkpoint directory, dense or quantized, as the harness's model class.

    Args:
      path: of the directory; it needs a ``tokenizer.json``.
      batch_size: sequences at a time.
      max_length: tokens of a sequence at most; None takes the model's positions, but at most 2048. Longer ones lose
        their beginning.

    Raises:
      FileNotFoundError, ValueError: as `awq_jax.run.load_model`, or a length the model has no positions for.
    """

    def __init__(self, path: PathLike, *, batch_size: int = 8, max_length: int | None = None) -> None:
        super().__init__()
        self.path, self.batch_size = path, batch_size
        self.model = load_model(path)
        self.codec = self.model.tokenizer
        positions = self.model.config.max_position_embeddings
        self.max_length = min(positions, 2048) if max_length is None else max_length
        if not 2 <= self.max_length <= positions:
            raise ValueError(
                f"max_length is {max_length}; it must lie between 2 and the model's {positions} positions."
            )

    @property
    def eot_token_id(self) -> int:
        """The first id that ends a text; without one, what the tokenizer begins with, or 0."""
        return next(iter((*self.model.checkpoint.hf.stop_tokens, *self.codec.encode("", special=True))), 0)

    @property
    def prefix_token_id(self) -> int:
        """What a text begins with, for scoring its first token."""
        return next(iter(self.codec.encode("", special=True)), self.eot_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; by default with what the tokenizer adds around it."""
        return self.codec.encode(string, special=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Requests are ``(texts, context ids, continuation ids)``; long sequences first, so that memory shows early."""
        # The last id is predicted, not read: one more than the model has room for.
        pairs = [([*context, *more][-self.max_length - 1 :], len(more)) for _, context, more in requests]
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for begin in range(0, len(order), self.batch_size):
            rows = order[begin : begin + self.batch_size]
            for row, value in zip(rows, self._batch([pairs[row] for row in rows]), strict=True):
                found[row] = value
        return found

    def _batch(self, pairs: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of ids and how many of them, at the end, are scored."""
        length = next(size for size in buckets_for(self.max_length) if size >= max(len(ids) - 1 for ids, _ in pairs))
        ids = np.zeros((self.batch_size, length + 1), np.int32)
        start, end = np.zeros((2, self.batch_size), np.int32)
        for row, (tokens, scored) in enumerate(pairs):
            ids[row, : len(tokens)] = tokens
            start[row], end[row] = max(len(tokens) - scored, 1), len(tokens)
        with jax.default_matmul_precision("highest"):
            total, greedy = _score(self.model.config, self.model.params, ids, start, end)
        return list(zip(np.asarray(total).tolist(), np.asarray(greedy).tolist(), strict=True))[: len(pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log likelihood of whole texts, cut into windows that do not overlap."""
        totals = []
        for (text,) in (request.args for request in requests):
            ids = self.codec.encode(text)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            pairs = [((text, ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return totals

    @functools.cached_property
    def _engine(self) -> Engine:
        served = load(self.path)
        return Engine(served.config, served.params, slots=self.batch_size, max_len=self.max_length)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut at the first of the strings that end them."""
        asked = [(self.codec.encode(text, special=True), dict(options)) for text, options in (r.args for r in requests)]
        made = self._engine.generate(self._request(ids, options) for ids, options in asked)
        return [
            postprocess_generated_text(self.codec.decode(ids), options.get("until"), None)
            for ids, (_, options) in zip(made, asked, strict=True)
        ]

    def _request(self, ids: list[int], options: dict[str, Any]) -> Request:
        room = min(int(options.get("max_gen_toks", _ANSWER)), self.max_length - 1)
        sampled = options.get("do_sample", False)
        return Request(
            prompt=tuple(ids[-(self.max_length - room) :]),
            max_new_tokens=room,
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            top_p=options.get("top_p") if sampled else None,
            stop_tokens=tuple(self.model.checkpoint.hf.stop_tokens),
        )
