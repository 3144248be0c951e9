# SPDX-License-Identifier: Apache-2.0
"""What SIGINT and SIGTERM do to a long run: the first lets it finish what it is at, the second stops it there."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["Stop", "stoppable"]


class Stop:
    """Whether a run was asked to stop.

    Attributes:
      working: what is being done is worth finishing; until then the first signal stops at once.
      asked: a signal came.
    """

    def __init__(self) -> None:
        self.working = self.asked = False

    def between(self) -> None:
        """Called where stopping costs nothing; says that what follows is worth finishing.

        Raises:
          KeyboardInterrupt: a signal came.
        """
        if self.asked:
            raise KeyboardInterrupt
        self.working = True

    def _signal(self, number: int, frame: Any) -> None:
        if self.asked or not self.working:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping after the layer at hand; once more to stop at once", file=sys.stderr, flush=True)


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Handle SIGINT and SIGTERM until the block ends; both arrive as KeyboardInterrupt."""
    stop, numbers = Stop(), (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop._signal) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
