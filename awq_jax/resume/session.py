# SPDX-License-Identifier: Apache-2.0
"""A run that can be killed at any moment: each finished layer is kept, with what the next one starts from.

Beside OUT lies ``.OUT.resume``: ``objects/`` holds files named by their sha256, ``CURRENT`` the digests of the last two
generations. A generation lists the finished layers, the state after the last of them and the fingerprint of the run.
Objects are flushed before ``CURRENT`` is renamed into place, so whenever a run is killed, ``CURRENT`` names a whole
generation.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax._publish import beside, refuse_existing, refuse_lack_of_room, rename, sync_directory, write_bytes
from awq_jax.report import LayerReport
from awq_jax.resume.layers import from_tensors, report_of, to_tensors
from awq_jax.resume.lease import Lease, leased
from awq_jax.resume.objects import Objects

__all__ = ["MODES", "Damaged", "Session", "refuse_output", "resuming", "store_of"]

MODES = ("auto", "required", "never")
_FORMAT = 1
_CURRENT, _LEASE, _OBJECTS = "CURRENT", "LEASE", "objects"
_CHEAP = 0.5  # seconds of a commit that every layer can afford
_PATIENCE = 10  # a dearer one waits for so many times its own length, so that keeping takes a tenth of a run at most


class Damaged(ValueError):
    """What was kept can't be used, and is left for people to look at."""


def store_of(out: str | os.PathLike[str]) -> Path:
    """Where the layers of an unfinished output are kept.

    >>> store_of("/data/model-int4").as_posix()
    '/data/.model-int4.resume'
    """
    return beside(out, "resume")


class Session:
    """The finished layers of a run, and where the next ones go.

    Args:
      store: of this run; None keeps nothing.
      inputs: fingerprint of the run, by name.
      lease: on the store.
    """

    def __init__(self, store: Path | None, inputs: Mapping[str, str], lease: Lease | None = None) -> None:
        self._store, self._lease, self._inputs = store, lease, dict(inputs)
        self._layers: list[dict[str, str]] = []
        self._added: list[dict[str, str]] = []  # written, and lost if the run is killed before the next commit
        self._cost = self._committed = 0.0  # seconds that the last commit took, and when it ended
        self._state = ""
        self._digests: list[str] = []  # of the last generations, newest first
        if store is not None:
            self._objects = Objects(store / _OBJECTS)
            self._open(store)
            self._tidy()

    @property
    def finished(self) -> int:
        """Layers that need no work."""
        return len(self._layers)

    def layers(self) -> Iterator[tuple[LayerReport, dict[str, Any]]]:
        """Report and parameters of each finished layer, one in memory at a time.

        Raises:
          Damaged: a file is not what was written.
        """
        for row in self._layers:
            yield self._layer(row)

    def _layer(self, row: Mapping[str, str]) -> tuple[LayerReport, dict[str, Any]]:
        with self._named():
            record = json.loads(self._objects.get_bytes(row["record"]))
            tensors = self._objects.get_tensors(row["tensors"])
        return report_of(record["report"]), from_tensors(tensors, record["params"])

    def state(self) -> dict[str, np.ndarray]:
        """What the last `commit` was given.

        Raises:
          Damaged: a file is not what was written.
        """
        with self._named():
            return self._objects.get_tensors(self._state)

    def add(self, report: LayerReport, params: Mapping[str, Any]) -> None:
        """Write a layer that was finished; the next `commit` keeps it.

        Args:
          report: on the layer.
          params: of the layer, as the writer takes them.

        Raises:
          OSError: the disk is full or failing; earlier layers stay.
          BlockingIOError: another process took over.
        """
        if self._store is None or self._lease is None:
            return
        self._lease.renew()
        tensors, described = to_tensors(params)
        record = {"report": dataclasses.asdict(report), "params": described}
        row = {
            "tensors": self._objects.put_tensors(tensors),
            "record": self._objects.put_bytes(json.dumps(record, allow_nan=False).encode()),
        }
        self._added.append(row)

    def check(self) -> None:
        """Make sure that what is about to be written is still this run's.

        Raises:
          BlockingIOError: another process took over.
        """
        if self._lease is not None:
            self._lease.renew()

    @property
    def pending(self) -> int:
        """Layers that were added and not committed."""
        return len(self._added)

    @property
    def due(self) -> bool:
        """Whether `commit` is worth its time: the state of a large model is gigabytes, and a layer may take seconds."""
        return self._cost < _CHEAP or time.monotonic() - self._committed >= _PATIENCE * self._cost

    def commit(self, state: Mapping[str, Any]) -> None:
        """Keep the layers that were added; when this returns, no kill can take them away.

        Args:
          state: arrays that the next layer starts from, by name; float32, bfloat16 or float16.

        Raises:
          OSError, BlockingIOError: as `add`.
        """
        if self._store is None or self._lease is None:
            return
        begun = time.monotonic()
        self._lease.renew()
        layers = [*self._layers, *self._added]
        kept = self._objects.put_tensors({name: np.asarray(array) for name, array in state.items()})
        generation = {"format": _FORMAT, "inputs": self._inputs, "layers": layers, "state": kept}
        digest = self._objects.put_bytes(json.dumps(generation).encode())
        self._lease.renew()
        self._point(self._store, [digest, *self._digests[:1]])
        self._layers, self._added, self._state = layers, [], kept
        self._tidy()
        self._committed = time.monotonic()
        self._cost = self._committed - begun

    def _point(self, store: Path, digests: list[str]) -> None:
        new = store / f"{_CURRENT}.new"
        new.unlink(missing_ok=True)
        write_bytes(new, json.dumps(digests).encode())
        rename(new, store / _CURRENT)
        sync_directory(store)
        self._digests = digests

    def _open(self, store: Path) -> None:
        """Take the newest generation that is whole."""
        if not (store / _CURRENT).is_file():
            return  # killed before its first layer was finished
        with self._named():
            digests = json.loads((store / _CURRENT).read_bytes())
            if not isinstance(digests, list) or not digests or not all(map(_is_digest, digests)):
                raise ValueError(f"{store / _CURRENT} does not hold digests.")
        problems: list[str] = []
        for digest in digests:
            try:
                self._take(digest)
            except Damaged as problem:
                problems.append(str(problem))
                continue
            self._digests = digests[digests.index(digest) :]
            if problems:
                warnings.warn(f"{problems[0]} The state before it is used: {self.finished} layers.", stacklevel=2)
            return
        raise Damaged(problems[0])

    def _take(self, digest: str) -> None:
        with self._named():
            found = json.loads(self._objects.get_bytes(digest))
            if found["format"] != _FORMAT:
                raise ValueError(f"{self._store} has format {found['format']}; this awq-jax reads {_FORMAT}.")
        self._refuse_other(found["inputs"], len(found["layers"]))
        self._layers, self._state = found["layers"], found["state"]
        self.state()  # read now, while there is another generation to go back to
        self._layer(self._layers[-1])

    def _refuse_other(self, kept: Mapping[str, str], layers: int) -> None:
        other = [name for name, value in self._inputs.items() if kept.get(name) != value]
        if other:
            rows = "; ".join(f"{name} {_short(kept.get(name))}, now {_short(self._inputs[name])}" for name in other)
            raise ValueError(
                f"{self._store} keeps {layers} layers of a run with other {' and '.join(other)} ({rows}). Run it as it "
                "was begun, choose another output, or start anew with --resume never, which discards them."
            )

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Any damage, with what to do about it."""
        try:
            yield
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(
                f"what an unfinished run kept is damaged: {error} Start anew with --resume never, which discards it."
            ) from error

    def _tidy(self) -> None:
        """Remove what neither of the last two generations needs."""
        needed = set(self._digests)
        for digest in self._digests:
            with contextlib.suppress(ValueError):
                found = json.loads(self._objects.get_bytes(digest))
                needed |= {found["state"], *(name for row in found["layers"] for name in row.values())}
        self._objects.keep_only(needed)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _short(value: str | None) -> str:
    """A digest by its beginning; words as they are.

    >>> _short("ab" * 32), _short("cpu")
    ('abababababab…', 'cpu')
    """
    return f"{value[:12]}…" if value is not None and _is_digest(value) else str(value)


def _discard(store: Path) -> None:
    """Remove a store that is leased; CURRENT first, so that a half removed one counts as empty."""
    for name in (_CURRENT, f"{_CURRENT}.new"):
        (store / name).unlink(missing_ok=True)
    shutil.rmtree(store / _OBJECTS, ignore_errors=True)
    (store / _LEASE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else lies in it, and is not ours
        store.rmdir()


def _size(store: Path) -> int:
    return sum(path.stat().st_size for path in store.rglob("*") if path.is_file())


def _is_published(target: Path, inputs: Mapping[str, str]) -> bool:
    """Whether the output is that of this very run: it was killed after publishing, before it tidied up."""
    try:
        report = json.loads((target / "awq_jax_report.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("inputs") == dict(inputs)


def _refuse_link(store: Path) -> None:
    """What is removed in a store must not be somebody else's."""
    for path in (store, store / _OBJECTS):
        if path.is_symlink():
            said = "a link, where an unfinished run's layers are to be kept; remove it"
            raise FileExistsError(errno.EEXIST, said, str(path))


def refuse_output(out: str | os.PathLike[str], mode: str, *, overwrite: bool = False, expected_bytes: int = 0) -> None:
    """What `resuming` refuses, as far as the file system alone can tell; nothing is changed.

    Args:
      out, mode, overwrite, expected_bytes: as for `resuming`.

    Raises:
      ValueError, OSError: as `resuming`.
    """
    if mode not in MODES:
        raise ValueError(f"resume is {mode!r}; it is one of {', '.join(MODES)} (--resume).")
    target, store = Path(os.path.abspath(out)), store_of(out)
    _refuse_link(store)
    refuse_existing(target, overwrite)
    if mode == "required" and not (store / _CURRENT).is_file():
        raise FileNotFoundError(f"nothing to go on from: {store} keeps no layer. Start with --resume auto.")
    refuse_lack_of_room(target.parent, expected_bytes - (_size(store) if store.is_dir() else 0))


@contextlib.contextmanager
def resuming(
    out: str | os.PathLike[str],
    mode: str,
    inputs: Mapping[str, str],
    *,
    overwrite: bool = False,
    expected_bytes: int = 0,
) -> Iterator[Session]:
    """A `Session` beside an output that is to be made; it goes away when the block ends normally.

    It also goes away where the input turns out to be wrong (ValueError), because no run with that input can use it.

    Args:
      out: the directory that the run creates.
      mode: "auto" goes on where there is something to go on from, "required" insists, "never" discards and keeps
        nothing.
      inputs: fingerprint of the run.
      overwrite: whether ``out`` may exist.
      expected_bytes: of output and store; refuse at once if the disk has less room.

    Raises:
      FileNotFoundError: "required", and nothing is kept.
      FileExistsError: ``out`` exists.
      BlockingIOError: another process makes this output.
      ValueError: other inputs; names those that differ, keeps what is there.
      Damaged: what is kept can't be read.
    """
    target, store = Path(os.path.abspath(out)), store_of(out)
    _refuse_link(store)
    if mode in MODES and store.is_dir() and _is_published(target, inputs):
        with leased(store / _LEASE):
            _discard(store)
    refuse_output(out, mode, overwrite=overwrite, expected_bytes=expected_bytes)
    target.parent.mkdir(parents=True, exist_ok=True)
    if mode == "never":
        if store.is_dir():
            with leased(store / _LEASE):
                _discard(store)
        yield Session(None, inputs)
        return
    store.mkdir(exist_ok=True)
    with leased(store / _LEASE) as lease:
        session = Session(store, inputs, lease)
        try:
            yield session
        except BaseException as error:
            if not session.finished or (isinstance(error, ValueError) and not isinstance(error, Damaged)):
                _discard_own(store, lease)
            raise
        _discard_own(store, lease)


def _discard_own(store: Path, lease: Lease) -> None:
    """`_discard`, unless another process took over."""
    with contextlib.suppress(BlockingIOError):
        lease.renew()
        _discard(store)
