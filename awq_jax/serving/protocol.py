# SPDX-License-Identifier: Apache-2.0
"""What OpenAI's completions and chat completions look like, as far as they are served here."""

import dataclasses
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from awq_jax.serving.engine import Request

__all__ = ["Asked", "Refusal", "chunk", "finished", "parse", "sse", "usage"]

_COMMON = set("model max_tokens temperature top_p top_k seed stop stream stream_options user n".split())
_KNOWN = {
    "completion": _COMMON | {"prompt"},
    "chat": _COMMON | {"messages", "max_completion_tokens"},
}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")  # a template writes others as they come
# Accepted where they ask for nothing.
_IDLE: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "best_of": (1, None),
    "echo": (False, None),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none"),
}


class Refusal(Exception):
    """A request that gets an error for an answer.

    Args:
      status: of HTTP.
      message: for people.
      param: what is wrong in the request.
    """

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        message, param = _sendable(str(self)), None if self.param is None else _sendable(self.param)
        return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _sendable(text: str) -> str:
    """Text of a client's in UTF-8: JSON's escapes can hold half of a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A parsed body.

    Attributes:
      kind: "completion" or "chat".
      content: the prompt, or the messages.
      options: fields of `Request` that it gave.
      max_tokens: or None.
      stops: strings that end the text.
      stream: send pieces.
      with_usage: the last piece counts tokens.
    """

    kind: str
    content: Any
    options: dict[str, Any]
    max_tokens: int | None
    stops: tuple[str, ...]
    stream: bool
    with_usage: bool

    def request(self, prompt: tuple[int, ...], room: int, stop_tokens: tuple[int, ...]) -> Request:
        """For the engine; chat without a limit may fill its slot.

        Raises:
          Refusal: a value is out of its range.
        """
        default = 16 if self.kind == "completion" else max(room, 1)
        limit = default if self.max_tokens is None else self.max_tokens
        if limit < 1:
            raise Refusal(400, f"max_tokens is {limit}; it must be at least 1.", "max_tokens")
        try:
            return Request(prompt=prompt, max_new_tokens=limit, stop_tokens=stop_tokens, **self.options)
        except ValueError as error:
            raise Refusal(400, str(error)) from None


def parse(kind: str, raw: bytes) -> Asked:
    """Understand a body.

    Raises:
      Refusal: it is not JSON, lacks something, or asks for what is not implemented: nothing is ignored silently.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}.") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object.")
    for name, value in body.items():
        if name in _IDLE and value in _IDLE[name]:
            continue
        if name in _IDLE or name not in _KNOWN[kind]:
            raise Refusal(400, f"{name}={json.dumps(value)[:80]} is not implemented here.", name)
    content = _messages(body) if kind == "chat" else body.get("prompt")
    if content is None:
        raise Refusal(400, "prompt is missing.", "prompt")
    number = lambda name, types: _typed(body, name, types, "a number" if float in types else "a whole number")
    options = {
        "temperature": number("temperature", (int, float)),
        "top_p": number("top_p", (int, float)),
        "top_k": number("top_k", (int,)),
        "seed": number("seed", (int,)),
    }
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    try:
        given |= {name: float(given[name]) for name in ("temperature", "top_p") if name in given}
    except OverflowError:
        raise Refusal(400, "temperature and top_p must be numbers of ordinary size.", "temperature") from None
    given.setdefault("temperature", 1.0)
    given["seed"] = given["seed"] % 2**32 if "seed" in given else secrets.randbits(32)
    limit = number("max_completion_tokens", (int,))
    stream_options = _typed(body, "stream_options", (dict,), "an object") or {}
    return Asked(
        kind=kind,
        content=content,
        options=given,
        max_tokens=number("max_tokens", (int,)) if limit is None else limit,
        stops=_stops(body.get("stop")),
        stream=bool(_typed(body, "stream", (bool,), "true or false")),
        with_usage=bool(stream_options.get("include_usage")),
    )


def _typed(body: Mapping[str, Any], name: str, types: tuple[type, ...], words: str) -> Any:
    value = body.get(name)
    if value is not None and type(value) not in types:
        raise Refusal(400, f"{name} must be {words}, not {json.dumps(value)[:80]}.", name)
    return value


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops) or len(stops) > 4:
        raise Refusal(400, "stop must be a string or a list of at most four.", "stop")
    if any(len(stop) > 256 for stop in stops):
        raise Refusal(400, "a stop string may have 256 characters.", "stop")
    return tuple(stops)


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages must be a list of at least one.", "messages")
    out = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refusal(400, "each message must be an object with a role and a content.", "messages")
        if message["role"] not in _ROLES:
            said = f"role {json.dumps(message['role'])[:80]} is none of {', '.join(_ROLES)}."
            raise Refusal(400, said, "messages")
        content = message.get("content")
        if isinstance(content, list):
            parts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in content]
            if any(not isinstance(part, str) for part in parts):
                raise Refusal(400, "only text can be in a message here.", "messages")
            content = "".join(parts)
        if not isinstance(content, str):
            raise Refusal(400, "the content of a message must be text.", "messages")
        out.append({**message, "content": content})
    return out


def identity(kind: str, model: str) -> dict[str, Any]:
    """The fields that every piece of one answer shares."""
    prefix, thing = ("chatcmpl", "chat.completion") if kind == "chat" else ("cmpl", "text_completion")
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": thing, "created": int(time.time()), "model": model}


def chunk(base: Mapping[str, Any], index: int, text: str | None, finish: str | None) -> dict[str, Any]:
    """One piece of a stream."""
    if base["object"] == "text_completion":
        choice = {"index": index, "text": text or "", "logprobs": None, "finish_reason": finish}
        return {**base, "choices": [choice]}
    delta: dict[str, Any] = {} if text is None else {"role": "assistant", "content": text}
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {**base, "object": "chat.completion.chunk", "choices": [choice]}


def finished(base: Mapping[str, Any], texts: list[tuple[str, str]], counts: Mapping[str, int]) -> dict[str, Any]:
    """A whole answer; ``texts`` are (text, why it ended)."""
    choices = []
    for index, (text, finish) in enumerate(texts):
        said = (
            {"text": text}
            if base["object"] == "text_completion"
            else {"message": {"role": "assistant", "content": text, "refusal": None}}
        )
        choices.append({"index": index, **said, "logprobs": None, "finish_reason": finish})
    return {**base, "choices": choices, "usage": dict(counts)}


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Token counts."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def sse(data: Mapping[str, Any] | str) -> bytes:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
