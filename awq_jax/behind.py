# SPDX-License-Identifier: Apache-2.0
"""Work that another thread does while this one goes on: layers are written while the next one is quantized."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["Behind"]


class Behind:
    """One piece of work at a time; a context manager, which waits for the last one.

    >>> done = []
    >>> with Behind() as behind:
    ...     behind.do(lambda: done.append(1))
    ...     behind.do(lambda: done.append(2))  # waits for the first
    ...     behind.wait()
    >>> done
    [1, 2]
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._doing: Future[Any] | None = None

    def do(self, work: Callable[[], Any]) -> None:
        """Begin work once what was begun before has ended; raises what that raised."""
        self.wait()
        self._doing = self._pool.submit(work)

    def wait(self) -> None:
        """Wait for what was begun; raises what it raised."""
        doing, self._doing = self._doing, None
        if doing is not None:
            doing.result()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._pool.shutdown()
        beside = self._doing.exception() if self._doing is not None else None
        if error is not None and beside is not None:  # the error that is on its way must not hide the other
            error.add_note(f"What was done behind it failed too: {type(beside).__name__}: {beside}")
