# SPDX-License-Identifier: Apache-2.0
"""Where the calibration set's hidden states wait between two layers: on the device, in the host's memory, in a file.

On the device a layer's step takes all of them at once. The other two hold them here, and they pass through a layer one
chunk after the other; the device then holds two chunks, however many there are.
"""

import contextlib
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from awq_jax._plan import LayerPlan

__all__ = ["PLACES", "OnDisk", "OnHost", "refuse_whole", "waiting"]

PLACES = ("device", "host", "disk")


def refuse_whole(place: str, plans: Sequence[LayerPlan], budget: float | None, processes: int) -> None:
    """Refuse a place that there is not, and work that takes all hidden states at once where they are not on the device.

    Raises:
      ValueError: named, with what works.
    """
    if place not in PLACES:
        raise ValueError(f"hidden states on {place!r}; choose from {', '.join(PLACES)} (--hidden-states).")
    if place == "device":
        return
    asked = {
        "--propagate quantized": any(plan.propagate for plan in plans),
        "--refine": any(plan.refine is not None for plan in plans),
        "--budget": budget is not None,
        "a run of several processes": processes > 1,
    }
    if found := [name for name, is_asked in asked.items() if is_asked]:
        raise ValueError(
            f"{' and '.join(found)} takes all hidden states at once, so they can't wait on the {place}. Use "
            "--hidden-states device, and fewer samples (--samples) or more devices (--mesh) if they do not fit."
        )


class OnHost:
    """Hidden states in memory, float32 ``[chunks, b, t, d]``.

    Args:
      shape: of all of them.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._array = np.empty(tuple(shape), np.float32)

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> np.ndarray:
        """A copy of a chunk: what a device on the host makes of it must not change with it."""
        return self._array[index].copy()

    def __setitem__(self, index: int, chunk: np.ndarray) -> None:
        self._array[index] = chunk

    def whole(self) -> np.ndarray:
        """All chunks."""
        return self._array


class OnDisk:
    """The same in a file.

    Args:
      shape: of all of them.
      file: for reading and writing; the room is taken at once.

    Raises:
      OSError: the disk has not the room.
    """

    def __init__(self, shape: Sequence[int], file: Any) -> None:
        self._shape, self._bytes, self._file = tuple(shape), 4 * math.prod(shape[1:]), file
        os.posix_fallocate(file.fileno(), 0, len(self) * self._bytes)

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        self._file.seek(index * self._bytes)
        return np.fromfile(self._file, np.float32, self._bytes // 4).reshape(self._shape[1:])

    def __setitem__(self, index: int, chunk: np.ndarray) -> None:
        self._file.seek(index * self._bytes)
        self._file.write(np.ascontiguousarray(chunk, np.float32).data)
        self._file.flush()

    def whole(self) -> np.ndarray:
        """All chunks, mapped: read when they are looked at."""
        return np.memmap(self._file, np.float32, "r", shape=self._shape)


@contextlib.contextmanager
def waiting(place: str, shape: Sequence[int], directory: pathlib.Path) -> Iterator[OnHost | OnDisk | None]:
    """Room for hidden states outside of the device; None where they stay on it.

    Args:
      place: of `PLACES`.
      shape: of all of them.
      directory: on whose disk. The file there has no name, so nothing is left of it however the process ends.
    """
    if place != "disk":
        yield OnHost(shape) if place == "host" else None
        return
    with tempfile.TemporaryFile(dir=directory) as file:
        yield OnDisk(shape, file)
