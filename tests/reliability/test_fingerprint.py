# SPDX-License-Identifier: Apache-2.0
"""What the digest of a run's weights sees: every byte, or where nothing is kept sizes and beginnings."""

from pathlib import Path

import pytest

from awq_jax.resume import fingerprint
from tests.reliability.job import calib

SIZE = 3 << 20


def weights(source: Path, *, whole: bool) -> str:
    return fingerprint(source, calib(), {}, "cpu", whole=whole)["weights"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(SIZE))
    return tmp_path


def changed(source: Path, at: int) -> None:
    with open(source / "model.safetensors", "r+b") as file:
        file.seek(at)
        file.write(b"\1")


@pytest.mark.parametrize(
    ("at", "seen_in_short"), [(0, True), ((1 << 20) - 1, True), (1 << 20, False), (SIZE - 1, False)]
)
def test_a_byte_is_seen(source: Path, at: int, seen_in_short: bool):
    before = {whole: weights(source, whole=whole) for whole in (True, False)}
    changed(source, at)
    assert weights(source, whole=True) != before[True]
    assert (weights(source, whole=False) != before[False]) is seen_in_short


def test_a_longer_file_and_another_config_are_seen(source: Path):
    before = weights(source, whole=False)
    changed(source, SIZE)
    longer = weights(source, whole=False)
    (source / "config.json").write_text('{"a": 1}')
    assert len({before, longer, weights(source, whole=False)}) == 3


def test_a_short_digest_says_what_it_is_and_is_never_taken_for_a_whole_one(source: Path):
    assert weights(source, whole=False).startswith("headers ")
    (source / "model.safetensors").write_bytes(b"all of it")
    assert weights(source, whole=False).removeprefix("headers ") != weights(source, whole=True)
