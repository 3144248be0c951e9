# SPDX-License-Identifier: Apache-2.0
"""Chat templates: Jinja text that comes with a checkpoint, run in a sandbox."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from awq_jax._files import read_json, read_text
from awq_jax.serving.extra import missing

__all__ = ["ChatTemplate"]

_LIMIT = 1 << 20  # bytes of a template


class ChatTemplate:
    """Turns messages into a prompt.

    Args:
      source: Jinja text. It sees the messages and a few names, and no attribute that begins with an underscore.
      tokens: ``bos_token``, ``eos_token`` and the like, by name.

    Raises:
      ValueError: it is too long, or not a template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        try:
            import jinja2
            import jinja2.sandbox
        except ModuleNotFoundError as error:
            raise missing("chat templates need", error.name) from error
        if len(source) > _LIMIT:
            raise ValueError(f"the chat template has {len(source)} characters; at most {_LIMIT} are read.")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        environment.globals.update(raise_exception=_refuse, strftime_now=_now)
        self._errors = (jinja2.TemplateError, TypeError, ValueError, OverflowError, RecursionError, ArithmeticError)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template can't be read: {error}.") from error
        self._tokens = dict(tokens)

    @classmethod
    def of_checkpoint(cls, directory: Path, override: Path | None = None) -> "ChatTemplate | None":
        """From a file given, ``chat_template.jinja`` or ``tokenizer_config.json``; None if there is none."""
        config: Any = {}
        if (directory / "tokenizer_config.json").is_file():
            config = read_json(directory, "tokenizer_config.json")
        beside = directory / "chat_template.jinja"
        source = config.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {row.get("name"): row.get("template") for row in source if isinstance(row, Mapping)}
            source = named.get("default")
        if beside.is_file():
            source = read_text(directory, beside.name)
        if override is not None:
            source = override.read_text(encoding="utf-8")
        if not isinstance(source, str):
            return None
        content = lambda token: token.get("content") if isinstance(token, Mapping) else token
        tokens = {name: content(token) for name, token in config.items() if name.endswith("_token")}
        return cls(source, {name: token for name, token in tokens.items() if isinstance(token, str)})

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt, with the beginning of the answer.

        Raises:
          ValueError: the template refuses these messages, or fails on them.
        """
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._tokens)
        except self._errors as error:
            raise ValueError(f"the chat template does not take these messages: {error}") from error


def _refuse(message: str) -> str:
    raise ValueError(message)


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
