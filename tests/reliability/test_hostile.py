# SPDX-License-Identifier: Apache-2.0
"""Bytes that somebody made up: every outcome is success or an error in words, and nothing outside is touched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from awq_jax._manifest import MANIFEST, verify
from awq_jax.checkpoint import load, save
from awq_jax.resume import resuming
from awq_jax.resume.session import Damaged, store_of
from awq_jax_convert.formats import open_checkpoint, open_writer
from awq_jax_convert.hf import HFCheckpoint
from tests.reliability.job import make_source

FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ERRORS = (ValueError, FileNotFoundError)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "model", layers=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "x"
    save(path, {"w": np.ones((2, 3), np.float32)})
    return path


def survives(read: Callable[[], Any]) -> None:
    """Success, or an error that says something."""
    try:
        read()
    except ERRORS as error:
        assert len(str(error)) > 10


def mutated(content: bytes, edits: list[tuple[float, int]], cut: float) -> bytes:
    """Bytes replaced at relative places, and the end cut off."""
    changed = bytearray(content)
    for at, value in edits:
        changed[int(at * (len(changed) - 1))] = value
    return bytes(changed[: max(1, round(cut * len(changed)))])


EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4)
CUTS = st.one_of(st.just(1.0), st.floats(0, 1))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def with_bytes(directory: Path, name: str, content: bytes, read: Callable[[], Any]) -> None:
    """Read with a file replaced, and put it back."""
    before = (directory / name).read_bytes()
    try:
        (directory / name).write_bytes(content)
        survives(read)
    finally:
        (directory / name).write_bytes(before)


@FUZZ
@given(edits=EDITS, cut=CUTS)
def test_a_mutated_header_or_shard(source: Path, edits: list[tuple[float, int]], cut: float):
    (name,) = (path.name for path in source.glob("*.safetensors"))
    content = (source / name).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    changed = mutated(content[:header], edits, 1.0) + content[header:]
    with_bytes(source, name, changed[: max(1, round(cut * len(changed)))], lambda: open_checkpoint(source))


@FUZZ
@given(edits=EDITS, cut=CUTS)
def test_a_mutated_config(source: Path, edits: list[tuple[float, int]], cut: float):
    changed = mutated((source / "config.json").read_bytes(), edits, cut)
    with_bytes(source, "config.json", changed, lambda: open_checkpoint(source))


@FUZZ
@given(data=st.data())
def test_a_config_with_other_values(source: Path, data: st.DataObject):
    config = json.loads((source / "config.json").read_bytes())
    config[data.draw(st.sampled_from(sorted(config)))] = data.draw(JSON)
    with_bytes(source, "config.json", json.dumps(config).encode(), lambda: open_checkpoint(source))


@FUZZ
@given(data=st.data())
def test_a_manifest_with_other_values(saved: Path, data: st.DataObject):
    manifest = json.loads((saved / MANIFEST).read_bytes())
    manifest[data.draw(st.sampled_from(sorted(manifest)))] = data.draw(JSON)
    with_bytes(saved, MANIFEST, json.dumps(manifest).encode(), lambda: load(saved))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_a_manifest_names_no_file_outside(saved: Path, tmp_path: Path, name: str):
    shutil.copytree(saved, tmp_path / "x")
    (tmp_path / "outside").write_text("secret")
    manifest = json.loads((saved / MANIFEST).read_bytes())
    (tmp_path / "x" / MANIFEST).write_text(json.dumps(manifest | {"files": {**manifest["files"], name: "0" * 64}}))
    with pytest.raises(ValueError, match="lies outside the directory"):
        verify(tmp_path / "x")


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", "0" * 63, "G" * 64])
def test_a_store_names_no_file_outside(tmp_path: Path, name: str):
    store = store_of(tmp_path / "out")
    (store / "objects").mkdir(parents=True)
    (tmp_path / "outside").write_text("secret")
    (store / "CURRENT").write_text(json.dumps([name]))
    with pytest.raises(Damaged, match="does not hold digests"), resuming(tmp_path / "out", "auto", {"weights": "1"}):
        pass
    assert (tmp_path / "outside").read_text() == "secret"


def test_nothing_that_could_run_is_passed_on(source: Path, tmp_path: Path):
    copy = shutil.copytree(source, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_bytes())
    (copy / "modeling_evil.py").write_text("raise SystemExit")
    remote = {"auto_map": {"AutoModel": "modeling_evil.Evil"}, "_attn_implementation_internal": "someone/kernel"}
    (copy / "config.json").write_text(json.dumps(config | remote))
    source_of = HFCheckpoint.open(copy)
    with open_writer("native", source_of, tmp_path / "out", group_size=32) as writer:
        writer.write_stem(source_of.stem())
        writer.write_layer(0, source_of.layer(0))
    assert not list((tmp_path / "out").rglob("*.py"))
    assert not json.loads((tmp_path / "out" / "config.json").read_bytes()).keys() & remote.keys()


@pytest.mark.parametrize("size", [10**9, 10**18, 2**63, 10**100])
@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size"])
def test_sizes_of_a_config_allocate_nothing(source: Path, tmp_path: Path, name: str, size: int):
    copy = shutil.copytree(source, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_bytes())
    (copy / "config.json").write_text(json.dumps(config | {name: size}))
    with pytest.raises(ValueError):
        open_checkpoint(copy)
