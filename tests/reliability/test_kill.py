# SPDX-License-Identifier: Apache-2.0
"""A run may be killed at any moment; the next one ends with the same bits and leaves nothing else."""

import shutil
from pathlib import Path

import pytest

from tests.reliability.boundaries import snapshots
from tests.reliability.job import contents, make_source, run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "model")


# Orbax chooses other names for its files in every run, and takes long: of its boundaries a few must do.
@pytest.mark.parametrize(("format", "every"), [("autoawq", 1), ("native", 9)])
def test_a_kill_at_every_boundary_costs_nothing(source: Path, tmp_path: Path, format: str, every: int):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "copies").mkdir()
    copies = snapshots(home, tmp_path / "copies", lambda: run(source, home / "out", format=format))
    wanted = contents(home / "out")
    assert len(copies) > 50
    resumed = set()
    for copy in copies[::every]:
        published = (copy / "out").exists()
        if published:
            with pytest.raises(FileExistsError):
                run(source, copy / "out", format=format)
        else:
            resumed.add(run(source, copy / "out", format=format).resumed_layers)
        assert contents(copy / "out") == wanted, copy
        assert [path.name for path in copy.iterdir()] == ["out"], copy
        shutil.rmtree(copy)
    assert resumed == {0, 1, 2}
