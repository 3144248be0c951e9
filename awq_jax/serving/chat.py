# SPDX-License-Identifier: Apache-2.0
"""A conversation with a checkpoint, without a server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from awq_jax.serving.engine import Request
from awq_jax.serving.http import engine_of
from awq_jax.serving.template import ChatTemplate
from awq_jax.serving.text import TextStream
from awq_jax_convert.hf_config import FamilyChoice

__all__ = ["Chat"]


class Chat:
    """Keeps the messages; each `say` adds two.

    Args:
      directory: of the checkpoint.
      system: first message, where there is a template.
      chat_template: file instead of the checkpoint's.
      max_len: positions of the whole conversation.
      dense, family: see `awq_jax.serving.load.load`.
      max_new_tokens: of an answer, at most.
      **sampling: fields of `Request`.

    Raises:
      FileNotFoundError, ValueError: no such checkpoint or template, or a number outside its range.
    """

    def __init__(
        self,
        directory: Path,
        *,
        system: str | None = None,
        chat_template: Path | None = None,
        max_len: int | None = None,
        dense: bool = False,
        family: FamilyChoice = None,
        max_new_tokens: int = 256,
        **sampling: Any,
    ) -> None:
        Request(prompt=(0,), max_new_tokens=max_new_tokens, **sampling)  # refused before the weights are read
        self.template = ChatTemplate.of_checkpoint(directory, chat_template) if directory.is_dir() else None
        if system and directory.is_dir() and self.template is None:
            raise ValueError(
                f"{directory} has no chat template, so a system message has no place in what it reads (--system). Give "
                "a template (--chat-template), or begin your line with it."
            )
        options: dict[str, Any] = {"max_len": max_len, "dense": dense, "family": family}
        self._engine, self._tokenizer, self._stops = engine_of(directory, slots=1, **options)
        self._limit, self._sampling = max_new_tokens, sampling
        self.messages = [{"role": "system", "content": system}] if system else []

    def say(self, line: str) -> Iterator[str]:
        """The answer, piece by piece; what is not answered to its end is not kept.

        Raises:
          ValueError: the conversation has grown past the slot's positions.
        """
        messages = [*self.messages, {"role": "user", "content": line}]
        if self.template is None:
            ids = self._tokenizer.encode(line, special=True)
        else:
            ids = self._tokenizer.encode(self.template.render(messages))
        room = self._engine.max_len - len(ids)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, a slot {self._engine.max_len} positions; begin a new one, or "
                "give more (--max-len)."
            )
        text = TextStream(self._tokenizer.decode)
        pieces: list[str] = []
        ended = False

        def deliver(tokens: list[int], finish: str | None) -> None:
            nonlocal ended
            ended = finish is not None
            pieces.append(text.push(tokens) + (text.finish() if ended else ""))

        limit = min(self._limit, room)
        request = Request(prompt=tuple(ids), max_new_tokens=limit, stop_tokens=self._stops, **self._sampling)
        ticket = self._engine.submit(request, deliver)
        said = ""
        try:
            while not ended or pieces:
                if not pieces:
                    self._engine.step()
                while pieces:
                    said += pieces[0]
                    yield pieces.pop(0)
        finally:
            ticket.cancel()  # where nobody reads on; the next line gets the slot
        self.messages = [*messages, {"role": "assistant", "content": said}]
