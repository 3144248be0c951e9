# SPDX-License-Identifier: Apache-2.0
"""A directory that appears whole or not at all."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from awq_jax._manifest import MANIFEST

__all__ = [
    "INCOMPLETE",
    "published",
    "refuse_existing",
    "refuse_lack_of_room",
    "sync_directory",
    "write_bytes",
    "write_file",
]

INCOMPLETE = "_INCOMPLETE"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_file(path: Path, pieces: Iterable[bytes | memoryview], nbytes: int) -> str:
    """Create a file with the umask's mode, and wait until the disk has it.

    Args:
      path: must not exist.
      pieces: the content.
      nbytes: its length, for the message when the disk is full.

    Returns:
      sha256 of the content.

    Raises:
      OSError: the disk is full (says how much is needed), or another error of the system.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "xb", buffering=0) as file:
            for piece in pieces:
                digest.update(piece)
                rest = memoryview(piece)
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _FULL:
            raise
        why = os.strerror(error.errno)
        said = f"{why}: {nbytes} bytes are needed for {path.name!r}. Make room, or choose another disk"
        raise OSError(error.errno, said, str(path.parent)) from error
    return digest.hexdigest()


def write_bytes(path: Path, content: bytes) -> str:
    """`write_file` of content that is in memory."""
    return write_file(path, (content,), len(content))


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Refuse a name that is taken, unless by what awq-jax wrote and with leave to replace it; or that can't be made."""
    above = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        said = "not a directory, so the output can't be made in it; choose another place"
        raise NotADirectoryError(errno.ENOTDIR, said, str(above))
    if not os.path.lexists(out):
        return
    if not overwrite:
        said = "the output exists; choose another name, or pass overwrite=True (--overwrite of quantize and convert)"
        raise FileExistsError(errno.EEXIST, said, str(out))
    ours = out.is_dir() and not out.is_symlink() and ((out / MANIFEST).is_file() or not any(out.iterdir()))
    if not ours:
        said = f"not overwritten: no {MANIFEST} in it says that awq-jax wrote it"
        raise FileExistsError(errno.EEXIST, said, str(out))


def refuse_lack_of_room(parent: Path, expected_bytes: int) -> None:
    """Refuse a disk that is too full, before anything is computed."""
    free = shutil.disk_usage(parent).free
    if free < expected_bytes:
        said = f"{expected_bytes} bytes are needed, {free} are free. Make room, or choose another disk"
        raise OSError(errno.ENOSPC, said, str(parent))


def _claim(work: Path, out: Path) -> int:
    """Create, lock and empty the working directory; the lock ends with the process, whatever ends it."""
    busy = BlockingIOError(errno.EWOULDBLOCK, "another process writes this output; wait, or choose another", str(out))
    work.mkdir(exist_ok=True)
    fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and lock another writer may have finished and renamed the very directory that is now locked.
        if not os.path.samestat(os.stat(work), os.fstat(fd)):
            raise busy
        for left in work.iterdir():  # by a writer that was killed
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    except (BlockingIOError, FileNotFoundError) as error:
        os.close(fd)
        raise busy from error
    return fd


def sync_directory(directory: Path) -> None:
    """Wait until the disk has the names in a directory; a file's own flush does not see to that."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_tree(top: Path) -> None:
    """Wait until the disk has every file and name under a directory, whoever wrote them."""
    for folder, _, names in os.walk(top):
        for name in names:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_directory(Path(folder))


def _replaced(out: Path) -> Path:
    """Where a directory is kept between the two renames that replace it."""
    return out.with_name(f".{out.name}.replaced")


def _tidy(out: Path) -> None:
    """Finish what a writer that was killed during `_move` began: put back what has no successor, remove what has."""
    replaced = _replaced(out)
    if replaced.is_dir() and not os.path.lexists(out):
        os.rename(replaced, out)
    shutil.rmtree(replaced, ignore_errors=True)


def _move(work: Path, out: Path) -> None:
    """Rename the finished directory to its name; what it replaces goes away afterwards."""
    replaced = _replaced(out)
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        os.rename(out, replaced)
    os.rename(work, out)
    sync_directory(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def published(out: str | os.PathLike[str], *, overwrite: bool = False, expected_bytes: int = 0) -> Iterator[Path]:
    """A directory to fill, which becomes ``out`` when the block ends normally and is removed when it does not.

    It is ``.NAME.incomplete`` beside ``out``, marked by a file ``_INCOMPLETE`` and locked against other writers.
    What a killed process left there is removed by the next writer of the same name.

    Args:
      out: the directory to create.
      overwrite: replace ``out``, if it is empty or holds our manifest.
      expected_bytes: refuse at once if the disk has less room.

    Raises:
      FileExistsError: ``out`` exists.
      BlockingIOError: another process is writing ``out``.
      OSError: not enough room.
    """
    target = Path(os.path.abspath(out))
    work = target.with_name(f".{target.name}.incomplete")
    refuse_existing(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    refuse_lack_of_room(target.parent, expected_bytes)
    lock = _claim(work, target)
    try:
        _tidy(target)
        refuse_existing(target, overwrite)
        write_bytes(work / INCOMPLETE, b"")
        yield work
        (work / INCOMPLETE).unlink()
        _sync_tree(work)
        refuse_existing(target, overwrite)
        _move(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)  # before the lock goes, while it is surely ours
        raise
    finally:
        os.close(lock)
