# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: requests wait for one of a fixed number of slots, and leave it when they end."""

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from awq_jax.serving.sampling import Sampling
from awq_jax.serving.steps import NOTHING, Start, decode, empty_slots, prefill

__all__ = ["MAX_STOPS", "Engine", "Request", "Ticket", "buckets_for", "start_of"]

MAX_STOPS = 8
Finish = Literal["stop", "length", "cancelled", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What one sequence asks for.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: at most.
      temperature, top_k, top_p, seed: see `awq_jax.models.sampling.sample`.
      stop_tokens: ids that end the sequence; the stop token itself is not delivered.

    Raises:
      ValueError: a field is outside its range.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 16
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt is empty; give at least one token.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature is {self.temperature}; it must lie between 0 (greedy) and 100.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1].")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to {2**32 - 1}.")
        if len(self.stop_tokens) > MAX_STOPS:
            raise ValueError(f"{len(self.stop_tokens)} stop tokens; at most {MAX_STOPS} are possible.")


class Ticket:
    """A request under way.

    ``deliver(tokens, finish)`` is called from the engine's thread with new tokens, and last with why it ended.
    """

    def __init__(self, request: Request, deliver: Callable[[list[int], Finish | None], None]) -> None:
        self.request, self.deliver = request, deliver
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """Give the slot back at the next step; from any thread, any number of times."""
        self.cancelled.set()


def buckets_for(max_len: int, smallest: int = 128) -> tuple[int, ...]:
    """Lengths that prompts and spans are rounded up to: powers of two, and max_len.

    >>> buckets_for(600)
    (128, 256, 512, 600)
    """
    sizes = []
    size = smallest
    while size < max_len:
        sizes.append(size)
        size *= 2
    return (*sizes, max_len)


class Engine:
    """Runs requests in slots; not thread-safe but for `submit` and `Ticket.cancel`.

    Args:
      config: of the model.
      params: fused, on the device.
      slots: sequences at a time.
      max_len: positions of each, prompt and answer together.
      steps: tokens for each dispatch of decode. A finished row waits, and a new request too, until it ends.
      queue: requests that may wait.
      cache_dtype: of keys and values; None is that of the embedding, int8 halves bfloat16.
      programs: (prefill, decode) to run instead of the compiled ones, such as those of a mesh.
      make_slots: instead of `empty_slots`, likewise.

    Raises:
      ValueError: no slot, no room, or more positions than the model has.
    """

    def __init__(
        self,
        config: Any,
        params: Any,
        *,
        slots: int = 8,
        max_len: int | None = None,
        steps: int = 8,
        queue: int = 64,
        cache_dtype: Any = None,
        programs: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
        make_slots: Callable[..., Any] = empty_slots,
    ) -> None:
        positions = config.max_position_embeddings
        self.max_len = positions if max_len is None else max_len
        if not 2 <= self.max_len <= positions:
            raise ValueError(
                f"max_len is {self.max_len}; it must lie between 2 and the model's {positions} positions (--max-len)."
            )
        if slots < 1 or steps < 1 or queue < 1:
            raise ValueError(f"slots, steps and queue must be at least 1; got {slots}, {steps} and {queue}.")
        self.config, self.params, self.steps, self.queue = config, params, steps, queue
        self._prefill, self._decode = programs or _programs(config)
        dtype = params["embed"]["embedding"].dtype if cache_dtype is None else cache_dtype
        self._empty = lambda: make_slots(config, slots, self.max_len, dtype=dtype, stops=MAX_STOPS)
        self._state = self._empty()
        self._tickets: list[Ticket | None] = [None] * slots
        self._lengths = [0] * slots
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._lock = threading.Lock()
        self.buckets = buckets_for(self.max_len)
        counted = "requests prompt_tokens tokens cancelled failed steps"
        self.counts: dict[str, int] = {name: 0 for name in counted.split()}

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Slots in use."""
        return sum(ticket is not None for ticket in self._tickets)

    def check(self, request: Request) -> None:
        """Refuse what can't run.

        Raises:
          ValueError: too long for a slot, or a token outside the vocabulary.
        """
        if len(request.prompt) + request.max_new_tokens > self.max_len:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens and {request.max_new_tokens} more were asked for, but a "
                f"slot has {self.max_len} positions; ask for at most {max(self.max_len - len(request.prompt), 0)}."
            )
        bad = [token for token in request.prompt if not 0 <= token < self.config.vocab_size]
        if bad:
            raise ValueError(f"token {bad[0]} is outside the vocabulary of {self.config.vocab_size}.")

    def submit(self, request: Request, deliver: Callable[[list[int], Finish | None], None]) -> Ticket:
        """Queue a request; from any thread.

        Raises:
          ValueError: it can't run, see `check`.
          BlockingIOError: the queue is full.
        """
        self.check(request)
        ticket = Ticket(request, deliver)
        with self._lock:
            if len(self._waiting) >= self.queue:
                raise BlockingIOError(f"{len(self._waiting)} requests are waiting already; try again later.")
            self._waiting.append(ticket)
            self.counts["requests"] += 1
        return ticket

    def step(self) -> bool:
        """Admit what fits, decode once, deliver; False if there was nothing to do."""
        self._drop_cancelled()
        while self._waiting and None in self._tickets:
            with self._lock:
                ticket = self._waiting.popleft()
            self._admit(ticket, self._tickets.index(None))
        busy = [row for row, ticket in enumerate(self._tickets) if ticket is not None]
        if not busy:
            return False
        span = next(b for b in self.buckets if b >= min(self.max_len, max(self._lengths[r] for r in busy) + self.steps))
        self._state, drawn = self._decode(self.params, self._state, steps=self.steps, span=span)
        self.counts["steps"] += 1
        for row, tokens in zip(busy, np.asarray(drawn)[busy].tolist(), strict=True):
            self._take(row, [token for token in tokens if token != NOTHING])
        return True

    def compile(self) -> None:
        """Compile every bucket now, so that no request waits for it; to be called while no request is under way."""
        nothing = start_of(Request(prompt=(0,), max_new_tokens=1))  # one token, and the row is idle again
        one, row = np.ones((1,), np.int32), np.zeros((1,), np.int32)
        for bucket in self.buckets:
            tokens = np.zeros((1, bucket), np.int32)
            self._state, _ = self._prefill(self.params, self._state, tokens, one, row, nothing)
            self._state, _ = self._decode(self.params, self._state, steps=self.steps, span=bucket)

    def fail(self) -> None:
        """End every request after an error of the device; the slots start anew."""
        with self._lock:
            tickets = [*filter(None, self._tickets), *self._waiting]
            self._waiting.clear()
        self.counts["failed"] += len(tickets)
        self._tickets = [None] * len(self._tickets)
        for ticket in tickets:
            ticket.deliver([], "failed")
        self._state = self._empty()  # a donated buffer is gone if the step that took it failed

    def generate(self, requests: Iterable[Request]) -> list[list[int]]:
        """Run requests to their ends, without a thread: the offline way."""
        requests = list(requests)
        out: list[list[int]] = [[] for _ in requests]
        for index, request in enumerate(requests):
            while self.waiting >= self.queue:
                self.step()
            self.submit(request, lambda tokens, _, index=index: out[index].extend(tokens))
        while self.step():
            pass
        return out

    def _drop_cancelled(self) -> None:
        with self._lock:
            gone = [ticket for ticket in self._waiting if ticket.cancelled.is_set()]
            for ticket in gone:
                self._waiting.remove(ticket)
        rows = [row for row, ticket in enumerate(self._tickets) if ticket is not None and ticket.cancelled.is_set()]
        gone += [ticket for row in rows if (ticket := self._tickets[row]) is not None]
        if rows:
            budget = self._state.start.budget.at[np.array(rows)].set(0)
            start = dataclasses.replace(self._state.start, budget=budget)
            self._state = dataclasses.replace(self._state, start=start)
        for row in rows:
            self._tickets[row] = None
        self.counts["cancelled"] += len(gone)
        for ticket in gone:
            ticket.deliver([], "cancelled")

    def _admit(self, ticket: Ticket, row: int) -> None:
        request = ticket.request
        length = len(request.prompt)
        bucket = next(b for b in self.buckets if b >= length)
        tokens = np.zeros((1, bucket), np.int32)
        tokens[0, :length] = request.prompt
        self._tickets[row], self._lengths[row] = ticket, length
        self._state, first = self._prefill(
            self.params, self._state, tokens, np.array([length], np.int32), np.array([row], np.int32), start_of(request)
        )
        self.counts["prompt_tokens"] += length
        self._take(row, np.asarray(first).tolist())

    def _take(self, row: int, tokens: Sequence[int]) -> None:
        """Deliver a row's new tokens, and free it where it ended."""
        ticket = self._tickets[row]
        assert ticket is not None
        self._lengths[row] += len(tokens)
        made = self._lengths[row] - len(ticket.request.prompt)
        stopped = bool(tokens) and tokens[-1] in ticket.request.stop_tokens
        finish: Finish | None = "stop" if stopped else "length" if made >= ticket.request.max_new_tokens else None
        given = list(tokens[:-1] if stopped else tokens)
        self.counts["tokens"] += len(given)
        if finish is not None:
            self._tickets[row] = None
        ticket.deliver(given, finish)


def start_of(request: Request) -> Start:
    """What a request asks for, as one row of a prefill."""
    stops = [*request.stop_tokens, *[NOTHING] * MAX_STOPS][:MAX_STOPS]
    one = lambda value, dtype: np.array([value], dtype)
    sampling = Sampling(
        temperature=one(request.temperature, np.float32),
        top_k=one(min(request.top_k or 0, 2**31 - 1), np.int32),
        top_p=one(1.0 if request.top_p is None else request.top_p, np.float32),
        seed=one(request.seed, np.uint32),
    )
    return Start(budget=one(request.max_new_tokens, np.int32), stops=np.array([stops], np.int32), sampling=sampling)


@functools.cache  # one pair for each config: engines of equal shape share a compilation
def _programs(config: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return (
        jax.jit(functools.partial(prefill, config), donate_argnums=1),
        jax.jit(functools.partial(decode, config), donate_argnums=1, static_argnames=("steps", "span")),
    )
