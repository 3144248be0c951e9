# SPDX-License-Identifier: Apache-2.0
"""An HTTP server for one machine, in OpenAI's dialect: for trying out and for tests."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from awq_jax.serving.answer import Reply
from awq_jax.serving.metrics import exposition
from awq_jax.serving.protocol import Asked, Refusal, identity, parse
from awq_jax.serving.template import ChatTemplate
from awq_jax.serving.worker import Answer, Worker
from awq_jax_convert.tokenizer import Tokenizer

__all__ = ["Limits", "Served", "application"]

HOSTS = ("localhost", "127.0.0.1", "[::1]", "testserver")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask of the server.

    Attributes:
      body_bytes: of a request.
      body_seconds: to send it.
      prompts: in one request.
    """

    body_bytes: int = 1 << 20
    body_seconds: float = 10.0
    prompts: int = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """What is served.

    Attributes:
      name: of the model, for ``/v1/models``.
      worker: runs the engine.
      tokenizer: of the checkpoint.
      template: of its chat, or None.
      stop_tokens: ids that end a text.
      limits: of requests.
    """

    name: str
    worker: Worker
    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    stop_tokens: tuple[int, ...] = ()
    limits: Limits = dataclasses.field(default_factory=Limits)

    def prompts(self, asked: Asked) -> list[tuple[int, ...]]:
        """Token ids of every prompt.

        Raises:
          Refusal: the content has another form, or there is no chat template.
        """
        try:
            if asked.kind == "chat":
                if self.template is None:
                    raise Refusal(400, "this model has no chat template; use /v1/completions, or --chat-template.")
                return [tuple(self.tokenizer.encode(self.template.render(asked.content)))]
            content = asked.content
            several = isinstance(content, list) and not all(type(item) is int for item in content)
            texts = content if several else [content]
            if not 1 <= len(texts) <= self.limits.prompts:
                raise Refusal(400, f"{len(texts)} prompts; one to {self.limits.prompts} go into a request.", "prompt")
            return [self._ids(text) for text in texts]
        except ValueError as error:
            raise Refusal(400, str(error)) from None

    def _ids(self, prompt: Any) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt, special=True))
        if isinstance(prompt, list) and all(type(item) is int for item in prompt):
            return tuple(prompt)
        raise Refusal(400, "a prompt must be text or a list of token ids.", "prompt")

    def start(self, asked: Asked) -> tuple[list[Answer], int]:
        """Queue what was asked for, all of it or nothing; with the number of prompt tokens.

        Raises:
          Refusal: it can't run, or not now.
        """
        engine, prompts, answers = self.worker.engine, self.prompts(asked), []
        requests = [asked.request(p, engine.max_len - len(p), self.stop_tokens) for p in prompts]
        try:
            for request in requests:
                engine.check(request)
            for request in requests:
                answers.append(self.worker.submit(request))
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        except (BlockingIOError, ConnectionRefusedError) as error:
            for answer in answers:
                answer.cancel()
            status = 429 if isinstance(error, BlockingIOError) else 503
            raise Refusal(status, str(error)) from None
        return answers, sum(map(len, prompts))


def application(served: Served) -> Starlette:
    """The ASGI application; its end closes the worker."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.worker.close)

    def models(_: Request) -> Response:
        card = {"id": served.name, "object": "model", "created": 0, "owned_by": "awq-jax"}
        return JSONResponse({"object": "list", "data": [card]})

    def health(_: Request) -> Response:
        alive = served.worker.alive
        return JSONResponse({"status": "ok" if alive else "closing"}, status_code=200 if alive else 503)

    def metrics(_: Request) -> Response:
        return PlainTextResponse(exposition(served.worker.engine), media_type="text/plain; version=0.0.4")

    routes = [
        Route("/v1/completions", _endpoint(served, "completion"), methods=["POST"]),
        Route("/v1/chat/completions", _endpoint(served, "chat"), methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    # A page in a browser can reach loopback under a name of its own: only ours are answered.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts], lifespan=lifespan)


def _endpoint(served: Served, kind: str) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        try:
            asked = parse(kind, await _body(request, served.limits))
            answers, prompt_tokens = served.start(asked)
        except Refusal as refusal:
            headers = {"retry-after": "1"} if refusal.status in (429, 503) else {}
            if refusal.status in (408, 413):
                headers["connection"] = "close"  # the rest of the body is not read
            return JSONResponse(refusal.body(), status_code=refusal.status, headers=headers)
        except ClientDisconnect:
            return Response(status_code=400)
        return Reply(asked, identity(kind, served.name), answers, prompt_tokens, served)

    return answer


async def _body(request: Request, limits: Limits) -> bytes:
    """The body, read no further than its limits allow."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the body must be application/json.")
    too_large = Refusal(413, f"the body is larger than {limits.body_bytes} bytes.")
    if int(request.headers.get("content-length", "0") or 0) > limits.body_bytes:
        raise too_large
    parts: list[bytes] = []
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                parts.append(part)
                if sum(map(len, parts)) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {limits.body_seconds:g} seconds.") from None
    return b"".join(parts)
