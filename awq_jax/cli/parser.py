# SPDX-License-Identifier: Apache-2.0
"""The parser of a command: help that fits the terminal, and an answer to a slip instead of a page of options."""

import argparse
import difflib
import re
import textwrap
from typing import Any, NoReturn

__all__ = ["Parser"]


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps a description's paragraphs to the terminal and leaves its indented commands as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
        return "\n\n".join(p if p.startswith(" ") else textwrap.fill(p, width) for p in paragraphs)


class Parser(argparse.ArgumentParser):
    """Of the program and, being its parser, of each command."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Formatter, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Refuse what is left over here, where the options that it may have meant are known."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(self._left_over(rest[0].partition("=")[0]))
        return found, rest

    def _left_over(self, word: str) -> str:
        if not word.startswith("-"):
            return f"{word!r} is one argument too many"
        names = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(word, names, n=1)
        return f"{word} is not an option here" + (f"; did you mean {near[0]}?" if near else "")

    def error(self, message: str) -> NoReturn:
        """One line, and where to read on."""
        end = "" if message.endswith(("?", ".")) else "."
        self.exit(2, f"{self.prog}: {message}{end} See `{self.prog} --help`.\n")
