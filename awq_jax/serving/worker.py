# SPDX-License-Identifier: Apache-2.0
"""The engine in a thread of its own, and its tokens in an event loop."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from typing import Any

from awq_jax.serving.engine import Engine, Request, Ticket

__all__ = ["Answer", "Worker"]

_log = logging.getLogger("awq_jax.serving")


class Answer:
    """Iterates over (new tokens, why it ended or None); the last item has the reason."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        self._ticket: Ticket = engine.submit(request, self._deliver)

    def _deliver(self, tokens: list[int], finish: str | None) -> None:
        """Called by the engine's thread. The queue is bounded by the request's own limit."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (tokens, finish))
        except RuntimeError:  # the loop has closed: nobody listens
            self._ticket.cancel()

    def cancel(self) -> None:
        """Give the slot back; harmless after the end."""
        self._ticket.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[list[int], str | None]]:
        finish = None
        while finish is None:
            tokens, finish = await self._queue.get()
            yield tokens, finish


class Worker:
    """Runs an engine until it is closed.

    Args:
      engine: nobody else may step it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._work = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="awq-jax-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are served."""
        return self._thread.is_alive() and not self._closing

    def close(self, timeout: float = 60.0) -> None:
        """Finish what is under way and end the thread."""
        self._closing = True
        self._work.set()
        self._thread.join(timeout)

    def submit(self, request: Request) -> "Answer":
        """Queue a request; to be called in an event loop.

        Raises:
          ValueError, BlockingIOError: as `Engine.submit`.
          ConnectionRefusedError: the worker is closing.
        """
        if not self.alive:
            raise ConnectionRefusedError("the server is shutting down.")
        answer = Answer(self.engine, request)
        self._work.set()
        return answer

    def wake(self) -> None:
        """Look for work now, such as a cancelled request's slot to free."""
        self._work.set()

    def _run(self) -> None:
        while True:
            self._work.wait()
            self._work.clear()
            try:
                while self.engine.step():
                    pass
            except Exception:
                _log.exception("a step of the engine failed; its requests end")
                self.engine.fail()
            if self._closing and not self.engine.waiting and not self.engine.running:
                return
