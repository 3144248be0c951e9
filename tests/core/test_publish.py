# SPDX-License-Identifier: Apache-2.0
"""What a writer that was killed between its last two renames left is put right by the next one."""

from pathlib import Path

import pytest

from awq_jax._publish import published


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
