# SPDX-License-Identifier: Apache-2.0
"""A directory that appears whole or not at all."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from awq_jax._manifest import MANIFEST, make_manifest, tree_digests

__all__ = [
    "INCOMPLETE",
    "beside",
    "digest_of",
    "published",
    "refuse_existing",
    "refuse_lack_of_room",
    "rename",
    "sync_directory",
    "take_lock",
    "working_directory",
    "write_bytes",
    "write_file",
    "write_manifest",
]

INCOMPLETE = "_INCOMPLETE"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_NO_FLUSH = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # of directories, on some network file systems


def digest_of(pieces: Iterable[bytes | memoryview]) -> str:
    """sha256 of a content, in hexadecimal."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def write_file(path: Path, pieces: Iterable[bytes | memoryview], nbytes: int) -> None:
    """Create a file with the umask's mode, and wait until the disk has it.

    Args:
      path: must not exist.
      pieces: the content.
      nbytes: its length, for the message when the disk is full.

    Raises:
      OSError: the disk is full (says how much is needed), or another error of the system.
    """
    try:
        with open(path, "xb", buffering=0) as file:
            for piece in pieces:
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


def write_bytes(path: Path, content: bytes) -> str:
    """`write_file` of content that is in memory; returns its sha256."""
    write_file(path, (content,), len(content))
    return digest_of((content,))


def write_manifest(work: Path, recipe: Mapping[str, Any] | None = None, **more: Any) -> None:
    """Write what says of a directory that it is ours, with the checksums of all that lies in it.

    Args:
      work: what `published` gave; nothing is written to it afterwards.
      recipe: what decided its content, as JSON values.
      **more: further JSON values.
    """
    manifest = make_manifest(tree_digests(work, skip=(INCOMPLETE,)), {}, recipe, **more)
    write_bytes(work / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


def _above(out: Path) -> Path:
    """The nearest directory over a name that is there already."""
    return next(parent for parent in out.absolute().parents if os.path.lexists(parent))


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Refuse a name that is taken, unless by what awq-jax wrote and with leave to replace it; or that can't be made."""
    above = _above(out)
    if not above.is_dir():
        said = "not a directory, so the output can't be made in it; choose another place"
        raise NotADirectoryError(errno.ENOTDIR, said, str(above))
    if not os.access(above, os.W_OK | os.X_OK):
        said = "not writable, so the output can't be made in it; choose another place"
        raise PermissionError(errno.EACCES, said, str(above))
    if not os.path.lexists(out):
        return
    if not overwrite:
        said = "the output exists; choose another name, or pass overwrite=True (--overwrite)"
        raise FileExistsError(errno.EEXIST, said, str(out))
    ours = out.is_dir() and not out.is_symlink() and ((out / MANIFEST).is_file() or not any(out.iterdir()))
    if not ours:
        said = f"not overwritten: no {MANIFEST} in it says that awq-jax wrote it"
        raise FileExistsError(errno.EEXIST, said, str(out))


def refuse_lack_of_room(parent: Path, expected_bytes: int) -> None:
    """Refuse a disk that is too full, before anything is computed; the directory need not be there yet."""
    above = parent if parent.is_dir() else _above(parent)
    free = shutil.disk_usage(above).free
    if free < expected_bytes:
        said = f"{expected_bytes} bytes are needed, {free} are free. Make room, or choose another disk"
        raise OSError(errno.ENOSPC, said, str(above))


def working_directory(out: str | os.PathLike[str]) -> Path:
    """Where an output is made before it has its name.

    >>> working_directory("/data/model-int4").as_posix()
    '/data/.model-int4.incomplete'
    """
    return beside(out, "incomplete")


def beside(out: str | os.PathLike[str], what: str) -> Path:
    """A hidden name beside an output, of what belongs to it.

    Raises:
      ValueError: the output is the root of everything.
    """
    target = Path(os.path.abspath(out))
    if not target.name:
        raise ValueError(f"{out} can't be an output; give the name of a directory to create.")
    return target.with_name(f".{target.name}.{what}")


def take_lock(fd: int, path: Path) -> None:
    """Lock an open file or directory against other processes; the lock ends with the process, whatever ends it.

    Raises:
      BlockingIOError: another process has it.
      OSError: the file system has no locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        said = "its file system has no locks, without which two runs could write one output; choose another place"
        raise OSError(error.errno, said, str(path)) from error


def _claim(work: Path, out: Path) -> int:
    """Create, lock and empty the working directory; the lock ends with the process, whatever ends it."""
    busy = BlockingIOError(errno.EWOULDBLOCK, "another process writes this output; wait, or choose another", str(out))
    work.mkdir(exist_ok=True)
    fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        take_lock(fd, work)
        # Between open and lock another writer may have finished and renamed the very directory that is now locked.
        if not os.path.samestat(os.stat(work), os.fstat(fd)):
            raise busy
        for left in work.iterdir():  # by a writer that was killed
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    except (BlockingIOError, FileNotFoundError) as error:
        os.close(fd)
        raise busy from error
    except OSError:
        os.close(fd)
        raise
    return fd


def sync_directory(directory: Path) -> None:
    """Wait until the disk has the names in a directory; a file's own flush does not see to that."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(fd)


def rename(old: Path, new: Path) -> None:
    """`os.rename`, believed where it is true: a network's file system may do it, lose its answer, be asked again, and
    then say that the old name is not there.
    """
    before = os.lstat(old)
    try:
        os.rename(old, new)
    except FileNotFoundError:
        if not os.path.lexists(new) or not os.path.samestat(before, os.lstat(new)):
            raise


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
    return beside(out, "replaced")


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
    try:
        rename(work, out)
    except OSError:
        if replaced.is_dir():
            os.rename(replaced, out)
        raise
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
    target, work = Path(os.path.abspath(out)), working_directory(out)
    refuse_existing(target, overwrite)
    refuse_lack_of_room(target.parent, expected_bytes)
    target.parent.mkdir(parents=True, exist_ok=True)
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
    except BaseException as error:
        if not isinstance(error, BlockingIOError):  # somebody took over, where the lock does not reach
            shutil.rmtree(work, ignore_errors=True)  # before the lock goes, while it is surely ours
        raise
    finally:
        os.close(lock)
