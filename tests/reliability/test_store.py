# SPDX-License-Identifier: Apache-2.0
"""The store of finished layers under every fault that can be injected; layers are made up, nothing is compiled."""

import contextlib
import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from awq_jax._qtensor import QTensor
from awq_jax.report import GroupReport, LayerReport, LinearReport
from awq_jax.resume import Session, lease, resuming
from awq_jax.resume.objects import Objects
from awq_jax.resume.session import Damaged, store_of
from tests.core.test_checkpoint import assert_same_bits
from tests.reliability.boundaries import observed, snapshots

INPUTS = {"weights": "a" * 64, "calibration": "b" * 64, "recipe": "c" * 64, "versions": "awq-jax 1", "devices": "cpu"}
LAYERS = 3


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of runs would wait for the disk; only a power cut shows whether it was flushed."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def layer(index: int) -> dict[str, Any]:
    numbers = np.random.default_rng(index)
    of = lambda *shape: numbers.standard_normal(shape).astype(np.float32)
    packed = numbers.integers(-128, 128, (4, 6)).astype(np.int8)
    zero = numbers.integers(0, 16, (2, 6)).astype(np.int8)
    return {
        "norm": {"scale": of(8)},
        "attn": {"q": {"kernel": QTensor(packed=packed, scale=of(2, 6).astype(np.float16), zero=zero, bits=3)}},
        "mlp": {"up": {"kernel": QTensor(packed=packed[:2], scale=of(1, 6).astype(ml_dtypes.bfloat16))}},
    }


def report(index: int) -> LayerReport:
    losses = (0.1 + index, None, 1 / 3)
    group = GroupReport(
        sinks=("a", "b"), producer=None, rule="paper", power=0.1, loss=0.1, rtn_loss=None, losses=losses
    )
    return LayerReport(
        index=index,
        error=1 / (3 + index),
        rtn_error=None,
        fell_back=bool(index % 2),
        groups=(group,),
        linears=(
            LinearReport(path="a", method="awq", starved=(3, 5)),
            LinearReport(path="b", method="rtn", reason="because"),
        ),
    )


def state(index: int) -> dict[str, np.ndarray]:
    return {"hidden": np.full((2, 3), index, np.float32), "other": np.full(2, -index, ml_dtypes.bfloat16)}


def keep(session: Session, index: int) -> None:
    session.add(report(index), layer(index))
    session.commit(state(index))


def job(out: Path, mode: str = "auto", inputs: dict[str, str] = INPUTS, stop_after: int = 0) -> int:
    """A run: check what is kept, add what is missing, and publish. Returns what was kept."""
    with resuming(out, mode, inputs) as session:
        kept = session.finished
        check(session)
        for index in range(kept, LAYERS):
            keep(session, index)
            if index + 1 == stop_after:
                raise KeyboardInterrupt
        check(session if mode != "never" else None)
        (out.parent / "partial").write_text("whole")
        os.rename(out.parent / "partial", out)
    return kept


def check(session: Session | None) -> None:
    for index, (found, params) in enumerate(session.layers() if session else ()):
        assert found == report(index)
        assert_same_bits(params, layer(index))
    if session and session.finished:
        assert_same_bits(session.state(), state(session.finished - 1))


def stopped(out: Path, after: int) -> Path:
    """The store of a run that was interrupted."""
    with pytest.raises(KeyboardInterrupt):
        job(out, stop_after=after)
    return store_of(out)


def current(store: Path) -> dict[str, Any]:
    newest = json.loads((store / "CURRENT").read_bytes())[0]
    return json.loads((store / "objects" / newest).read_bytes())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_kill_at_every_boundary_is_survived(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "copies").mkdir()
    kept = set()
    for copy in snapshots(home, tmp_path / "copies", lambda: job(home / "out")):
        if not (copy / "out").exists():
            kept.add(job(copy / "out"))
            assert [path.name for path in copy.iterdir()] == ["out"]
    assert kept == {0, 1, 2, 3}


def test_a_full_disk_at_every_boundary_leaves_a_whole_store(tmp_path: Path):
    """The disk is full at the n-th change; it stays so for the rest of that run, and has room in the next."""
    n = 0
    while True:
        n += 1
        home = tmp_path / str(n)
        home.mkdir()

        def fail(name: str, n: int = n) -> None:
            if len(boundaries.passed) >= n and name not in ("unlink", "rmdir"):  # a full disk still forgets
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

        with observed(fail) as boundaries, contextlib.suppress(OSError):
            job(home / "out")
            break
        job(home / "out")
        assert [path.name for path in home.iterdir()] == ["out"]
        shutil.rmtree(home)
    assert n > 40


def test_only_the_last_two_generations_are_kept(tmp_path: Path):
    store = stopped(tmp_path / "out", 3)
    newest = current(store)
    held = {path.name for path in (store / "objects").iterdir()}
    assert len(newest["layers"]) == 3
    assert len(held) == 2 * 3 + 2 * 2  # tensors and record of each layer, state and list of two generations


def test_the_last_good_state_is_used_where_the_newest_is_damaged(tmp_path: Path):
    store = stopped(tmp_path / "out", 2)
    flip(store / "objects" / current(store)["state"])
    with pytest.warns(UserWarning, match=r"checksum differs.* The state before it is used: 1 layers"):
        assert job(tmp_path / "out") == 1


@pytest.mark.parametrize("part", ["tensors", "record"])
def test_a_damaged_layer_is_refused_and_left_for_people_to_look_at(tmp_path: Path, part: str):
    store = stopped(tmp_path / "out", 3)
    flip(store / "objects" / current(store)["layers"][0][part])
    before = {path: path.read_bytes() for path in (store / "objects").iterdir()}
    with pytest.raises(Damaged, match=r"checksum differs.*--resume never, which discards it"):
        job(tmp_path / "out")
    assert {path: path.read_bytes() for path in (store / "objects").iterdir()} == before
    assert job(tmp_path / "out", "never") == 0


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'["00"]', b"[1]", b"\xff"])
def test_a_damaged_pointer_is_refused(tmp_path: Path, content: bytes):
    store = stopped(tmp_path / "out", 1)
    (store / "CURRENT").write_bytes(content)
    with pytest.raises(Damaged, match="what an unfinished run kept is damaged"):
        job(tmp_path / "out")


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("mode", ["auto", "required"])
def test_other_inputs_are_refused_by_name(tmp_path: Path, name: str, mode: str):
    stopped(tmp_path / "out", 2)
    with pytest.raises(ValueError, match=rf"keeps 2 layers of a run with other {name} \(.*--resume never"):
        job(tmp_path / "out", mode, INPUTS | {name: "f" * 64})
    assert job(tmp_path / "out", mode) == 2  # it was not touched


def test_required_insists(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nothing to go on from.*--resume auto"):
        job(tmp_path / "out", "required")
    assert not list(tmp_path.iterdir())
    stopped(tmp_path / "out", 1)
    assert job(tmp_path / "out", "required") == 1


def test_never_keeps_nothing(tmp_path: Path):
    stopped(tmp_path / "out", 2)
    with resuming(tmp_path / "out", "never", INPUTS) as session:
        assert not list(tmp_path.iterdir())
        keep(session, 0)
        assert session.finished == 0 and not list(tmp_path.iterdir())


def test_a_word_that_is_no_mode(tmp_path: Path):
    with pytest.raises(ValueError, match="resume is 'maybe'; it is one of auto, required, never"):
        job(tmp_path / "out", "maybe")


@pytest.mark.parametrize(
    ("error", "left"),
    [(KeyboardInterrupt, True), (OSError, True), (RuntimeError, True), (MemoryError, True), (ValueError, False)],
)
def test_what_ends_a_run_decides_whether_its_layers_are_of_use(tmp_path: Path, error: type[BaseException], left: bool):
    with pytest.raises(error), resuming(tmp_path / "out", "auto", INPUTS) as session:
        keep(session, 0)
        raise error
    assert store_of(tmp_path / "out").exists() == left


def test_a_run_without_a_finished_layer_leaves_nothing(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), resuming(tmp_path / "out", "auto", INPUTS):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path):
    with resuming(tmp_path / "out", "auto", INPUTS) as session:
        keep(session, 0)
        for mode in ("auto", "required", "never"):
            with pytest.raises(
                BlockingIOError, match=rf"another process writes this output \(process {os.getpid()} on"
            ):
                job(tmp_path / "out", mode)
        keep(session, 1)
        check(session)


def foreign(path: Path) -> None:
    """A lock file that another machine's process wrote, where locks do not reach."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"holder": "process 1 on elsewhere", "boot": "another", "token": "x"}))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_SILENCE_S", 0.4)
    monkeypatch.setattr(lease, "_BEAT_S", 0.1)


def test_another_machine_that_shows_life_keeps_its_lease(tmp_path: Path, hasty: None, monkeypatch: pytest.MonkeyPatch):
    path = store_of(tmp_path / "out") / "LEASE"
    foreign(path)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: (sleep(s), os.utime(path)))
    with pytest.raises(BlockingIOError, match="process 1 on elsewhere"):
        job(tmp_path / "out")


@pytest.mark.parametrize("dated", [0, 4_000_000_000])
def test_another_machine_that_is_silent_loses_it_whatever_the_clocks_say(tmp_path: Path, hasty: None, dated: int):
    path = store_of(tmp_path / "out") / "LEASE"
    foreign(path)
    os.utime(path, (dated, dated))
    assert job(tmp_path / "out") == 0


def test_who_lost_the_lease_writes_no_more(tmp_path: Path):
    store, before = store_of(tmp_path / "out"), b""
    with pytest.raises(BlockingIOError, match="elsewhere"), resuming(tmp_path / "out", "auto", INPUTS) as session:
        keep(session, 0)
        before = (store / "CURRENT").read_bytes()
        foreign(store / "LEASE")  # while this process was suspended
        keep(session, 1)
    assert (store / "CURRENT").read_bytes() == before


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = iter([1e9, 0.0, 4e9, 1e9] * 1000)
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, lambda: next(clock))
    store = stopped(tmp_path / "out", 2)
    for path in store.rglob("*"):
        os.utime(path, (4e9, 4e9))
    assert job(tmp_path / "out") == 2


def test_who_lost_the_lease_leaves_the_new_holders_layers(tmp_path: Path):
    """Suspended before its first layer was kept: it has nothing, and what lies there now is not its own."""
    store = store_of(tmp_path / "out")
    with pytest.raises(BlockingIOError), resuming(tmp_path / "out", "auto", INPUTS) as session:
        foreign(store / "LEASE")
        (store / "CURRENT").write_text("theirs")
        session.check()
    assert (store / "CURRENT").read_text() == "theirs"


@pytest.mark.parametrize("name", ["", "objects"])
def test_a_store_that_is_a_link_is_refused(tmp_path: Path, name: str):
    """What is no longer needed is removed in it: that would be somebody else's."""
    theirs = tmp_path / "theirs"
    (theirs / "objects").mkdir(parents=True)
    (theirs / "objects" / "precious").touch()
    store = store_of(tmp_path / "home" / "out")
    link = store / name if name else store
    link.parent.mkdir(parents=True)
    link.symlink_to(theirs / name if name else theirs)
    for mode in ("auto", "never"):
        with pytest.raises(FileExistsError, match="a link, where an unfinished run's layers are to be kept; remove it"):
            job(tmp_path / "home" / "out", mode)
    assert (theirs / "objects" / "precious").exists()


@pytest.mark.parametrize("content", ["[]", "{", '{"inputs": 3}'])
def test_a_report_of_something_else_is_not_this_runs(tmp_path: Path, content: str):
    stopped(tmp_path / "out", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "awq_jax_report.json").write_text(content)
    with pytest.raises(FileExistsError, match="the output exists"):
        job(tmp_path / "out")
    assert store_of(tmp_path / "out").is_dir()


def test_lack_of_room_is_said_before_anything_is_done(tmp_path: Path):
    with (
        pytest.raises(OSError, match=r"bytes are needed, .* are free"),
        resuming(tmp_path / "out", "auto", INPUTS, expected_bytes=10**18),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_dear_commit_waits_for_ten_times_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    put = Objects.put_tensors

    def slow(self: Objects, tensors: Any) -> str:
        clock[0] += 3.0 if "hidden" in tensors else 0.0
        return put(self, tensors)

    monkeypatch.setattr(Objects, "put_tensors", slow)
    with pytest.raises(KeyboardInterrupt), resuming(tmp_path / "out", "auto", INPUTS) as session:
        assert session.due  # nothing is known of its cost yet
        keep(session, 0)
        session.add(report(1), layer(1))
        clock[0] += 29.0
        assert not session.due and session.pending == 1
        clock[0] += 1.0
        assert session.due
        session.add(report(2), layer(2))
        session.commit(state(2))
        session.add(report(3), layer(3))  # never committed
        raise KeyboardInterrupt
    with resuming(tmp_path / "out", "required", INPUTS) as session:
        assert session.finished == 3
        check(session)
