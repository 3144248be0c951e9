# SPDX-License-Identifier: Apache-2.0
"""What a command is at, for those who wait: one line that changes on a terminal, a line each in a log."""

import contextlib
import sys
from collections.abc import Callable, Iterator

__all__ = ["telling"]


@contextlib.contextmanager
def telling(first: str, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A function to call with each step as it begins."""
    from rich.console import Console

    if quiet:
        yield lambda step: None
    elif sys.stderr.isatty():
        with Console(stderr=True).status(first) as status:
            yield status.update
    else:
        yield lambda step: print(step, file=sys.stderr, flush=True)
