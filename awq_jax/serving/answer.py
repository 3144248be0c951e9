# SPDX-License-Identifier: Apache-2.0
"""The response to a completion: sent whole or piece by piece, and given up where the client leaves."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from awq_jax.serving.protocol import Asked, Refusal, chunk, finished, sse, usage
from awq_jax.serving.text import TextStream
from awq_jax.serving.worker import Answer

if TYPE_CHECKING:
    from awq_jax.serving.server import Served

__all__ = ["Reply"]


class Reply(Response):
    """One response to one or several prompts.

    Args:
      asked: what the client wants.
      base: fields that every piece shares.
      answers: one for each prompt, under way.
      prompt_tokens: of all prompts.
      served: decodes tokens, and wakes the engine.
    """

    def __init__(
        self, asked: Asked, base: dict[str, Any], answers: list[Answer], prompt_tokens: int, served: "Served"
    ) -> None:
        super().__init__()
        self._asked, self._base, self._answers, self._served = asked, base, answers, served
        self._prompt_tokens, self._tokens = prompt_tokens, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer until done, or until the client is gone; the slots are free in either case."""
        work = asyncio.create_task(self._stream(send) if self._asked.stream else self._whole(scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except OSError:  # what writing to a closed connection raises
            pass
        finally:
            for task in (work, gone):
                task.cancel()
            for answer in self._answers:
                answer.cancel()
            self._served.worker.wake()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        texts, reasons = [""] * len(self._answers), ["stop"] * len(self._answers)
        async for index, text, finish in self._pieces():
            texts[index] += text
            reasons[index] = finish or reasons[index]
        if "failed" in reasons:
            refusal = Refusal(500, "the device failed; the server's log says why.")
            response = JSONResponse(refusal.body(), status_code=refusal.status)
        else:
            pairs = list(zip(texts, reasons, strict=True))
            response = JSONResponse(finished(self._base, pairs, usage(self._prompt_tokens, self._tokens)))
        await response(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        put = lambda data: send({"type": "http.response.body", "body": sse(data), "more_body": True})
        async for index, text, finish in self._pieces():
            if finish == "failed":
                await put(Refusal(500, "the device failed; the server's log says why.").body())
                break
            if text:
                await put(chunk(self._base, index, text, None))
            if finish:
                await put(chunk(self._base, index, None, finish))
        if self._asked.with_usage:
            last = chunk(self._base, 0, None, None)
            await put({**last, "choices": [], "usage": usage(self._prompt_tokens, self._tokens)})
        await put("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """(which prompt, new text, why it ended) of all prompts as they come."""
        queue: asyncio.Queue[tuple[int, str, str | None]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._one(index, queue)) for index in range(len(self._answers))]
        try:
            ended = 0
            while ended < len(tasks):
                piece = await queue.get()
                ended += piece[2] is not None
                yield piece
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, index: int, queue: "asyncio.Queue[tuple[int, str, str | None]]") -> None:
        text = TextStream(self._served.tokenizer.decode, self._asked.stops)
        async for tokens, finish in self._answers[index]:
            self._tokens += len(tokens)
            piece = text.push(tokens)
            if finish is not None and not text.stopped:
                piece += text.finish()
            if text.stopped:
                self._answers[index].cancel()
                finish = "stop"
            await queue.put((index, piece, finish))
            if finish is not None:
                return


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
