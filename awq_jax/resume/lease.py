# SPDX-License-Identifier: Apache-2.0
"""One writer at a time, whichever machine it runs on and whatever its clock says."""

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from awq_jax._publish import take_lock

__all__ = ["Lease", "leased"]

_BEAT_S = 1.0
_SILENCE_S = 10.0  # of another machine's holder, before it counts as dead


def _boot() -> str:
    """Which machine this is, and which of its starts."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _busy(path: Path, holder: str | None) -> BlockingIOError:
    who = f" ({holder})" if holder else ""  # who has just come has not said yet
    said = f"another process writes this output{who}; wait, or choose another"
    return BlockingIOError(errno.EWOULDBLOCK, said, str(path.parent))


class Lease:
    """What `leased` gives; `renew` before anything is changed."""

    def __init__(self, path: Path, token: str) -> None:
        self._path, self._token = path, token

    def renew(self) -> None:
        """Make sure that nobody took over, while this process was stopped for long.

        Raises:
          BlockingIOError: somebody did; what is on the disk is theirs now.
        """
        found = _read(self._path)
        if found.get("token") != self._token:
            raise _busy(self._path, found.get("holder"))


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _await_silence(path: Path) -> None:
    """Return when a holder on another machine shows no life for long enough.

    Its beats are changes of the file. They are compared with each other and timed by this machine's monotonic clock, so
    that clocks may jump and differ.
    """
    seen, deadline = os.stat(path).st_mtime_ns, time.monotonic() + _SILENCE_S
    while time.monotonic() < deadline:
        time.sleep(_BEAT_S / 4)
        if os.stat(path).st_mtime_ns != seen:
            raise _busy(path, _read(path).get("holder"))


def _locked(path: Path) -> int:
    """An open and locked descriptor of the file that has this name now."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            take_lock(fd, path)
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                return fd
        except FileNotFoundError:  # removed by its holder, who is done
            pass
        except BlockingIOError:
            os.close(fd)
            raise _busy(path, _read(path).get("holder")) from None
        except OSError:
            os.close(fd)
            raise
        os.close(fd)


def _beat(fd: int, ended: threading.Event) -> None:
    while not ended.wait(_BEAT_S):
        with contextlib.suppress(OSError):  # the next beat may succeed
            os.utime(fd)


@contextlib.contextmanager
def leased(path: Path) -> Iterator[Lease]:
    """Hold a lock file until the block ends.

    The kernel's lock ends with its process, so on one machine a dead holder never blocks. Where locks do not reach
    other machines, a holder there is alive as long as it touches the file.

    Args:
      path: of the file; its folder exists.

    Raises:
      BlockingIOError: somebody else holds it; says who.
    """
    fd = _locked(path)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(fd, ended), daemon=True)
    try:
        found = _read(path)
        if found.get("boot", _boot()) != _boot():
            _await_silence(path)
        token = secrets.token_hex(8)
        row = {"holder": f"process {os.getpid()} on {socket.gethostname()}", "boot": _boot(), "token": token}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(row).encode(), 0)
        beating.start()
        yield Lease(path, token)
    finally:
        ended.set()
        if beating.is_alive():
            beating.join()  # its descriptor may be another file's once it is closed
        os.close(fd)
