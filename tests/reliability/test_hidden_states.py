# SPDX-License-Identifier: Apache-2.0
"""Hidden states that wait on the host or the disk: the same checkpoint, and a device that holds a few chunks."""

import dataclasses
import errno
import os
import types
from pathlib import Path

import numpy as np
import pytest

from awq_jax import RefineSpec
from awq_jax.cli import main
from awq_jax.dry_run import dry_run
from awq_jax.hidden_states import waiting
from awq_jax.prepare import plans_of
from awq_jax_convert.hf import HFCheckpoint
from tests.reliability.job import RECIPE, contents, make_source, moved_codes, run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "model", layers=3)


@pytest.fixture(scope="module")
def in_chunks(source: Path) -> Path:
    out = source.parent / "host"
    run(source, out, hidden_states="host")
    return out


def test_the_device_gives_the_same_codes(source: Path, in_chunks: Path):
    run(source, source.parent / "device")
    codes, moved = moved_codes(source.parent / "device", in_chunks)
    assert codes > 100_000 and moved <= codes / 10_000  # ties: another program adds up in another order


def test_host_and_disk_give_the_same_bits_and_leave_nothing(source: Path, in_chunks: Path, tmp_path: Path):
    run(source, tmp_path / "disk", hidden_states="disk")
    assert contents(tmp_path / "disk") == contents(in_chunks)
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_an_interrupted_run_goes_on_from_where_it_was(source: Path, in_chunks: Path, tmp_path: Path):
    def interrupt(report: object, layers: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", hidden_states="disk", progress=interrupt)
    report = run(source, tmp_path / "out", hidden_states="host", resume="required")
    assert report.resumed_layers == 1
    assert contents(tmp_path / "out") == contents(in_chunks)


def test_what_was_begun_on_the_device_is_not_finished_elsewhere(source: Path, tmp_path: Path):
    def interrupt(report: object, layers: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", progress=interrupt)
    with pytest.raises(ValueError, match=r"with other hidden states"):
        run(source, tmp_path / "out", hidden_states="host")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipe": dataclasses.replace(RECIPE, propagate="quantized")}, "--propagate quantized takes all"),
        ({"recipe": dataclasses.replace(RECIPE, refine=RefineSpec(steps=2))}, "--refine takes all"),
        ({"budget": 4.5, "format": "native"}, "--budget takes all"),
        ({"hidden_states": "tape"}, "'tape'; choose from device, host, disk"),
    ],
)
def test_work_that_takes_all_at_once_is_refused_before_anything_is_written(source, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        run(source, tmp_path / "out", **{"hidden_states": "host", **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["host", "disk"])
def test_chunks_come_back(rng: np.random.Generator, tmp_path: Path, place: str):
    chunks = rng.standard_normal((3, 2, 5, 4)).astype(np.float32)
    with waiting(place, chunks.shape, tmp_path) as states:
        assert states is not None and len(states) == 3
        for index in (2, 0, 1, 1):
            states[index] = chunks[index]
        for index in range(3):
            np.testing.assert_array_equal(states[index], chunks[index])
        np.testing.assert_array_equal(states.whole(), chunks)
        taken = states[0]
        states[0] = chunks[1]
        np.testing.assert_array_equal(taken, chunks[0])  # who has a chunk keeps it
        assert not list(tmp_path.iterdir())  # not even now


def test_a_full_disk_is_told_before_a_layer_is_quantized(source, tmp_path, monkeypatch, capsys):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", full)
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3, 4, 5, 6, 7, 8]}\n' * 8)
    options = ["--group-size", "32", "--calib", str(tmp_path / "ids.jsonl"), "--samples", "4", "--seq-len", "8"]
    assert main(["quantize", str(source), str(tmp_path / "out"), *options, "--hidden-states", "disk"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_device_holds_no_more_for_more_samples(source: Path, monkeypatch: pytest.MonkeyPatch):
    # This process counts as well, and grows with every program it compiles.
    monkeypatch.setattr("awq_jax.dry_run.resource.getrusage", lambda _: types.SimpleNamespace(ru_maxrss=1))
    checkpoint = HFCheckpoint.open(source)
    plans = plans_of(checkpoint, RECIPE)
    cost = lambda samples, where: dry_run(
        checkpoint, plans, samples=samples, seq_len=64, batch=2, hidden_states=where
    )  # fmt: skip
    few, many = (cost(samples, "disk") for samples in (64, 512))
    assert many.device_bytes <= few.device_bytes < cost(512, "device").device_bytes
    grown = 4 * (512 - 64) * 64 * checkpoint.config.hidden_size
    assert cost(512, "host").host_bytes == many.host_bytes  # the file is mapped while it is kept
    assert many.host_bytes - few.host_bytes == grown and many.disk_bytes - few.disk_bytes == 4 * grown  # three are kept
