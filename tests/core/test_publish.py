# SPDX-License-Identifier: Apache-2.0
"""What a writer that was killed between its last two renames left is put right by the next one."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from awq_jax._manifest import verify
from awq_jax._publish import published, rename, sync_directory, write_manifest


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The old output aside, the new one not yet in its place."""
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "awq_jax_manifest.json").write_text("old")
    (tmp_path / ".out.incomplete").mkdir()
    (tmp_path / ".out.incomplete" / "awq_jax_manifest.json").write_text("new")
    return tmp_path / "out"


def test_the_old_output_comes_back_and_is_not_overwritten_unasked(killed: Path):
    with pytest.raises(FileExistsError, match="choose another name"), published(killed):
        pass
    assert [path.name for path in killed.parent.iterdir()] == ["out"]
    assert (killed / "awq_jax_manifest.json").read_text() == "old"


def test_the_old_output_is_back_if_the_next_writer_fails(killed: Path):
    with pytest.raises(RuntimeError), published(killed, overwrite=True):
        raise RuntimeError
    assert [path.name for path in killed.parent.iterdir()] == ["out"]
    assert (killed / "awq_jax_manifest.json").read_text() == "old"


def test_what_has_a_successor_is_removed(killed: Path):
    killed.mkdir()
    (killed / "awq_jax_manifest.json").write_text("newer")
    with pytest.raises(RuntimeError), published(killed, overwrite=True):
        raise RuntimeError
    assert [path.name for path in killed.parent.iterdir()] == ["out"]
    assert (killed / "awq_jax_manifest.json").read_text() == "newer"


def test_the_old_output_stays_where_the_new_one_cannot_take_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "awq_jax_manifest.json").write_text("old")
    real = os.rename

    def failing(old: Path, new: Path) -> None:
        if Path(old).suffix == ".incomplete":
            raise OSError(errno.EIO, "injected", str(old))
        real(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="injected"), published(out, overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "awq_jax_manifest.json").read_text() == "old"


@pytest.mark.parametrize("done", [True, False])
def test_a_rename_that_was_done_and_is_said_not_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool):
    """A network's file system was asked twice, because its first answer was lost."""
    real = os.rename

    def asked_again(old: Path, new: Path) -> None:
        if done:
            real(old, new)
        raise FileNotFoundError(errno.ENOENT, "no such file", str(old))

    (tmp_path / "old").write_text("x")
    monkeypatch.setattr(os, "rename", asked_again)
    if done:
        rename(tmp_path / "old", tmp_path / "new")
        assert (tmp_path / "new").read_text() == "x"
    else:
        with pytest.raises(FileNotFoundError):
            rename(tmp_path / "old", tmp_path / "new")


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="has no locks, without which two runs could write one output"):
        published(tmp_path / "out").__enter__()


@pytest.mark.parametrize(("number", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_directories_that_cannot_be_flushed_are_no_failure(tmp_path: Path, monkeypatch, number: int, raises: bool):
    def refuse(fd: int) -> None:
        raise OSError(number, "injected")

    monkeypatch.setattr(os, "fsync", refuse)
    if raises:
        with pytest.raises(OSError, match="injected"):
            sync_directory(tmp_path)
    else:
        sync_directory(tmp_path)


def test_the_root_is_no_output():
    with pytest.raises(ValueError, match="/ can't be an output; give the name of a directory to create"):
        published("/").__enter__()


def test_what_has_a_manifest_is_ours_to_replace(tmp_path: Path):
    """As comparisons and demos have, whose directories are no checkpoints."""
    for text in ("old", "new"):
        with published(tmp_path / "out", overwrite=text == "new") as work:
            (work / "report.md").write_text(text)
            write_manifest(work, format="comparison")
    assert (tmp_path / "out" / "report.md").read_text() == "new"
    assert verify(tmp_path / "out") == 1
