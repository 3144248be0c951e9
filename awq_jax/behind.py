# SPDX-License-Identifier: Apache-2.0
"""Work that another thread does while this one goes on: layers are written while the next one is quantized."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["Behind"]


class Behind:
    """A few pieces of work at a time; a context manager, which waits for the last of them.

    Args:
      at_once: pieces under way at most.

    >>> done = []
    >>> with Behind() as behind:
    ...     behind.do(lambda: done.append(1))
    ...     behind.do(lambda: done.append(2))  # waits for the first
    ...     behind.wait()
    >>> done
    [1, 2]
    """

    def __init__(self, at_once: int = 1) -> None:
        self._at_once = at_once
        self._pool = ThreadPoolExecutor(at_once)
        self._doing: deque[Future[Any]] = deque()

    def do(self, work: Callable[[], Any]) -> None:
        """Begin work once there is room for it; raises what the piece that it waited for raised."""
        while len(self._doing) >= self._at_once:
            self._doing.popleft().result()
        self._doing.append(self._pool.submit(work))

    def wait(self) -> None:
        """Wait for what was begun; raises what it raised."""
        while self._doing:
            self._doing.popleft().result()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._pool.shutdown()
        found = [beside for piece in self._doing if (beside := piece.exception()) is not None]
        if error is not None:  # the error that is on its way must not hide the others
            for beside in found:
                error.add_note(f"What was done behind it failed too: {type(beside).__name__}: {beside}")
