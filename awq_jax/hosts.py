# SPDX-License-Identifier: Apache-2.0
"""Several processes at one quantization: they begin together, know of each other's failures, and end together.

Arrays travel by XLA's collectives, which wait for ever for a process that is gone. Words travel by the key-value store
of `jax.distributed`, beside them: every process beats there once a second and says there why it failed. Each therefore
learns what happened to the others, and ends by name rather than waiting.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

__all__ = ["Hosts", "ProcessLost", "leave", "together"]

_BEAT_S = 1.0
_SILENCE_S = 20.0  # without a beat a process counts as lost
_BROKEN_S = 4.0  # the same where a collective has failed
_GRACE_S = 10.0  # for the work at hand to notice by itself, before the process ends
_runs = itertools.count()
_parted = threading.Event()  # from processes that failed or are gone


class ProcessLost(RuntimeError):
    """Another process failed, is gone or is late; the message names it."""


class Hosts:
    """This process among those that work at one quantization; `together` makes it.

    Args:
      index: of this process; 0 is the one that writes.
      count: of all.
      client: the key-value store of `jax.distributed`; None where there is one process.
      limit_s: how long to wait for others where all meet.
    """

    def __init__(self, index: int = 0, count: int = 1, client: Any = None, limit_s: float = 600.0) -> None:
        self.index, self.count = index, count
        self._client, self._limit_s, self._home = client, limit_s, f"awq_jax/{next(_runs)}"
        self._problem = ""
        self._silence_s = _SILENCE_S
        self._beats: dict[str, tuple[str, float]] = {}
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="awq-jax hosts")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def meet(self, name: str, value: str = "", *, patience: float = 1.0) -> list[str]:
        """Wait until every process is here.

        Args:
          name: of the place, another each time.
          value: seen by all.
          patience: times the limit of the run.

        Returns:
          Every process's value.

        Raises:
          ProcessLost: one failed, is gone or did not come in time.
        """
        if self.count == 1:
            return [value]
        self._set(f"{name}/{self.index}", value)
        found = self._wait(name, range(self.count), patience)
        return [found[str(index)] for index in range(self.count)]

    def share(self, name: str, value: str | None) -> str:
        """What process 0 has, on every process; as `meet`, but only process 0 is waited for."""
        if self.count == 1 or self.first:
            assert value is not None
            if self.count > 1:
                self._set(f"{name}/0", value)
            return value
        return self._wait(name, (0,), 1.0)["0"]

    def agree(self, inputs: Mapping[str, str]) -> None:
        """Make sure that every process was given the same.

        Raises:
          ValueError: naming what differs, and where.
          ProcessLost: see `meet`.
        """
        rows = [json.loads(text) for text in self.meet("inputs", json.dumps(dict(inputs)))]
        for index, row in enumerate(rows):
            other = sorted(name for name in inputs if row.get(name) != rows[0].get(name))
            if other:
                said = "; ".join(f"{name} {rows[0].get(name)} and {row.get(name)}" for name in other)
                raise ValueError(
                    f"processes 0 and {index} were given other {' and '.join(other)} ({said}). Give every process the "
                    "same model, text and options."
                )

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(f"{self._home}/{key}", value, allow_overwrite=True)

    def _get(self, folder: str) -> dict[str, str]:
        rows = self._client.key_value_dir_get(f"{self._home}/{folder}/")
        return {key.rpartition("/")[2]: value for key, value in rows}

    def _wait(self, name: str, wanted: Any, patience: float) -> dict[str, str]:
        until, pause = time.monotonic() + patience * self._limit_s, 0.002
        while missing := [index for index in wanted if str(index) not in (found := self._get(name))]:
            if self._problem:
                raise ProcessLost(self._problem)
            if time.monotonic() > until:
                words = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(map(str, missing))}"
                raise ProcessLost(
                    f"process {self.index} waited {patience * self._limit_s:g} s for {words} at {name!r} "
                    "(--host-timeout)"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        return found

    def _watch(self) -> None:
        """Beat, and end this process when the others are lost and the work at hand does not notice."""
        for number in itertools.count():
            try:
                self._set(f"beat/{self.index}", str(number))
                self._look()
            except jax.errors.JaxRuntimeError:
                self._problem = self._problem or "process 0, which coordinates, is gone"
            if self._problem and not self._ended.wait(_GRACE_S):
                print(f"awq-jax: process {self.index}: {self._problem}", file=sys.stderr, flush=True)
                os._exit(1)
            if self._ended.wait(_BEAT_S):
                return

    def _look(self) -> None:
        failed = self._get("failed")
        failed.pop(str(self.index), None)
        if failed:
            index, said = min(failed.items())
            self._problem = self._problem or f"process {index} failed: {said}"
        now = time.monotonic()
        for index, beat in self._get("beat").items():
            if index == str(self.index) or self._beats.get(index, ("", 0.0))[0] != beat:
                self._beats[index] = (beat, now)
            elif now - self._beats[index][1] > self._silence_s:
                silent = f"process {index} has given no sign of life for {self._silence_s:g} s"
                self._problem = self._problem or silent

    def _why(self, error: BaseException) -> BaseException:
        """What to raise for an error: where it comes of another process, that."""
        if isinstance(error, ProcessLost):
            return error
        gloo = "Gloo" in str(error)  # gloo's errors arrive as ValueError, which otherwise says that the input is bad
        broken = gloo or any(isinstance(e, jax.errors.JaxRuntimeError) for e in (error, error.__cause__))
        if broken:  # a collective's end is closed; the reason may be on its way
            self._silence_s = _BROKEN_S
            until = time.monotonic() + 2 * _BROKEN_S
            while not self._problem and time.monotonic() < until:
                time.sleep(_BEAT_S / 10)
            if gloo or self._problem:
                return ProcessLost(self._problem or f"the connection to another process broke: {error}")
        return error

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Put what breaks in the block down to the process that it comes of.

        Raises:
          ProcessLost: instead of a collective's error.
        """
        try:
            yield
        except Exception as error:
            found = self._why(error) if self.count > 1 else error
            if found is error:
                raise
            raise found from error

    def _part(self, error: BaseException) -> None:
        """Say why this process ends; the coordinator stays until the others have heard."""
        _parted.set()
        self._ended.set()
        said = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._set(f"failed/{self.index}", said)
            until = time.monotonic() + _BROKEN_S
            while self.first and len(self._get("failed")) < self.count and time.monotonic() < until:
                time.sleep(_BEAT_S / 10)


@contextlib.contextmanager
def together(limit_s: float = 600.0) -> Iterator[Hosts]:
    """Work that every process of `jax.distributed` does; with one process nothing is waited for.

    An error in one ends the block in all: there as what it is, elsewhere as `ProcessLost`.

    Args:
      limit_s: how long one may keep the others waiting between two layers.

    Raises:
      ProcessLost: another process failed, is gone or is late.
    """
    if jax.process_count() == 1:
        yield Hosts()
        return
    hosts = Hosts(jax.process_index(), jax.process_count(), _client(), limit_s)
    hosts._watcher.start()
    try:
        with hosts.explained():
            yield hosts
        hosts.meet("end", patience=10.0)  # process 0 flushes and reads back what it wrote
    except BaseException as error:
        hosts._part(error)
        raise
    finally:
        hosts._ended.set()


def _client() -> Any:
    """The key-value store of `jax.distributed`, which has no public name yet; orbax reaches for it in the same way.

    Raises:
      RuntimeError: this jax has it elsewhere.
    """
    try:
        from jax._src import distributed

        client = distributed.global_state.client
        if all(hasattr(client, name) for name in ("key_value_set", "key_value_dir_get")):
            return client
    except (ImportError, AttributeError):
        pass
    raise RuntimeError(
        f"jax {jax.__version__} does not have the key-value store of jax.distributed where awq-jax looks for it, so "
        "several processes cannot hear of each other's failures. Use a jax that it was tested with (0.10 to 0.12), or "
        "one process."
    )


def leave(code: int) -> int:
    """End the process if others are lost: jax's own farewell would wait for them for minutes."""
    if _parted.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
