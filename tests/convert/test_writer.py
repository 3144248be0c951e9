# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from awq_jax._manifest import MANIFEST, read_manifest, verify
from awq_jax_convert import shard
from awq_jax_convert import writer as writer_module
from awq_jax_convert.safetensors_dir import SafetensorsDir
from awq_jax_convert.writer import DirectoryWriter

A = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_one_file_that_others_read(tmp_path):
    tensors = {
        "f": A,
        "b": A.astype(ml_dtypes.bfloat16),
        "h": A.astype(np.float16),
        "i": np.arange(3, dtype=np.int32),
        "u": np.arange(5, dtype=np.uint8),
        "scalar": np.array(7, np.int64),
        "none": np.zeros((0, 4), np.float32),
    }
    with DirectoryWriter(tmp_path / "out") as writer:
        for name, array in tensors.items():
            writer.add(name, array)
    assert sorted(os.listdir(tmp_path / "out")) == [MANIFEST, "model.safetensors"]
    foreign = load_file(tmp_path / "out" / "model.safetensors")
    with SafetensorsDir(tmp_path / "out") as files:
        for name, array in tensors.items():
            for found in (files.read(name), foreign[name]):
                assert found.dtype == array.dtype and found.shape == array.shape
                np.testing.assert_array_equal(found, array)


def test_shards_end_where_the_caller_says(tmp_path):
    with DirectoryWriter(tmp_path / "out", max_shard_bytes=100) as writer:
        for layer in range(3):
            for part in "ab":
                writer.add(f"{layer}.{part}", A + layer)
            writer.flush_if_full()  # two tensors of 48 bytes don't fill 100; four do
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 6 * 48
    assert index["weight_map"] == {
        **dict.fromkeys(["0.a", "0.b", "1.a", "1.b"], "model-00001-of-00002.safetensors"),
        **dict.fromkeys(["2.a", "2.b"], "model-00002-of-00002.safetensors"),
    }
    with SafetensorsDir(tmp_path / "out") as files:
        np.testing.assert_array_equal(files.read("2.b"), A + 2)


LAYOUTS = {
    "transposed": A.T,
    "fortran": np.asfortranarray(A),
    "strided": A[:, ::2],
    "reversed": A[::-1],
    "broadcast": np.broadcast_to(A[0], (5, 4)),
    "bfloat16 transposed": A.astype(ml_dtypes.bfloat16).T,
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_arrays_of_any_strides_keep_their_values(tmp_path, case):
    with DirectoryWriter(tmp_path / "out") as writer:
        writer.add("a", LAYOUTS[case])
    with SafetensorsDir(tmp_path / "out") as files:
        np.testing.assert_array_equal(files.read("a"), LAYOUTS[case])


@given(
    st.permutations(range(3)),
    st.lists(st.sampled_from([slice(None), slice(None, None, -1), slice(1, None, 2)]), max_size=3),
)
def test_bytes_are_row_major(axes, cuts):
    array = np.arange(60, dtype=np.int32).reshape(3, 4, 5).transpose(axes)[tuple(cuts)]
    assert bytes(shard.tensor_bytes(array)) == array.tobytes()


def test_manifest_holds_checksums_and_recipe(tmp_path):
    with DirectoryWriter(tmp_path / "out") as writer:
        writer.recipe = {"bits": 4}
        writer.add("a", A.T)
        writer.write_json("config.json", {"x": "é"})
    found = read_manifest(tmp_path / "out")
    assert found["recipe"] == {"bits": 4} and found["format_version"] == 1
    assert found["tensors"] == {"a": hashlib.sha256(A.T.tobytes()).hexdigest()}
    for name, digest in found["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    assert verify(tmp_path / "out") == 2


def test_bit_rot_is_found(tmp_path):
    with DirectoryWriter(tmp_path / "out") as writer:
        writer.add("a", A)
        writer.write_text("notes.txt", "x")
    weights = tmp_path / "out" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (tmp_path / "out" / "notes.txt").unlink()
    with pytest.raises(ValueError, match=r"(?s)model.safetensors: checksum differs.*notes.txt: missing"):
        verify(tmp_path / "out")


def test_manifest_of_another_version(tmp_path):
    (tmp_path / MANIFEST).write_text('{"format_version": 2, "files": {}}')
    with pytest.raises(ValueError, match=r"format_version 2; this awq-jax reads 1. Upgrade"):
        verify(tmp_path)


def test_nothing_is_left_after_an_exception(tmp_path):
    with pytest.raises(ZeroDivisionError), DirectoryWriter(tmp_path / "out", max_shard_bytes=1) as writer:
        writer.add("a", A)
        writer.flush_if_full()
        assert (tmp_path / ".out.incomplete" / "_INCOMPLETE").exists() and not (tmp_path / "out").exists()
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_a_disk_that_lies_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(shard.os, "pread", lambda fd, n, at, real=os.pread: real(fd, n, at).replace(b"\x41", b"\x42"))
    with pytest.raises(OSError, match="tensor 'a' reads back different"), DirectoryWriter(tmp_path / "out") as writer:
        writer.add("a", A)
    assert os.listdir(tmp_path) == []


def test_shards_under_way_end_before_what_they_write_to_is_removed(tmp_path, monkeypatch):
    begun, ended = threading.Event(), threading.Event()

    def slow(path, tensors, real=shard.write_shard):
        begun.set()
        time.sleep(0.1)
        digest = real(path, tensors)
        ended.set()
        return digest

    monkeypatch.setattr(writer_module, "write_shard", slow)
    with pytest.raises(ZeroDivisionError), DirectoryWriter(tmp_path / "out", max_shard_bytes=1) as writer:
        writer.add("a", A)
        writer.flush_if_full()
        begun.wait(60)
        assert not ended.is_set()  # the caller goes on meanwhile
        raise ZeroDivisionError
    assert ended.is_set() and os.listdir(tmp_path) == []


def test_a_shard_that_fails_behind_is_told_by_a_later_call(tmp_path, monkeypatch):
    def full(path, tensors):
        raise OSError(28, "no room")

    monkeypatch.setattr(writer_module, "write_shard", full)
    added = 0
    with pytest.raises(OSError, match="no room"), DirectoryWriter(tmp_path / "out", max_shard_bytes=1) as writer:
        for index in range(10):
            writer.add(str(index), A)
            added += 1
            writer.flush_if_full()
    assert added == writer_module.SHARDS_BEHIND + 1 and os.listdir(tmp_path) == []


def test_existing_output(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="the output exists; choose another name, or pass overwrite=True"):
        DirectoryWriter(out).__enter__()
    with pytest.raises(FileExistsError, match=f"not overwritten: no {MANIFEST}"):
        DirectoryWriter(out, overwrite=True).__enter__()
    assert (out / "thesis.txt").read_text() == "mine" and os.listdir(tmp_path) == ["out"]


def test_overwrite_replaces_what_was_written_before(tmp_path):
    for value in (1, 2):
        with DirectoryWriter(tmp_path / "out", overwrite=True) as writer:
            writer.add("a", A * value)
            if value == 1:
                writer.write_text("old.txt", "old")
    assert sorted(os.listdir(tmp_path / "out")) == [MANIFEST, "model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]
    with SafetensorsDir(tmp_path / "out") as files:
        np.testing.assert_array_equal(files.read("a"), A * 2)


def test_a_failed_overwrite_keeps_the_old(tmp_path):
    with DirectoryWriter(tmp_path / "out") as writer:
        writer.add("a", A)
    with pytest.raises(ZeroDivisionError), DirectoryWriter(tmp_path / "out", overwrite=True) as writer:
        raise ZeroDivisionError
    assert verify(tmp_path / "out") == 1 and os.listdir(tmp_path) == ["out"]


def test_a_second_writer_is_refused(tmp_path):
    with DirectoryWriter(tmp_path / "out") as writer:
        writer.add("a", A)
        with pytest.raises(BlockingIOError, match="another process writes this output"):
            DirectoryWriter(tmp_path / "out").__enter__()
    assert verify(tmp_path / "out") == 1


def test_what_a_killed_writer_left_is_removed(tmp_path):
    left = tmp_path / ".out.incomplete"
    (left / "sub").mkdir(parents=True)
    (left / "shard-00000").write_bytes(b"half")
    (left / "link").symlink_to(tmp_path)
    with DirectoryWriter(tmp_path / "out") as writer:
        writer.add("a", A)
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == [MANIFEST, "model.safetensors"]


def test_lack_of_room_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(OSError, match=r"1000000000000000000 bytes are needed, \d+ are free"):
        DirectoryWriter(tmp_path / "out", expected_bytes=10**18).__enter__()
    assert os.listdir(tmp_path) == []


FULL = """
import resource, signal, sys
import numpy as np
from awq_jax_convert.writer import DirectoryWriter
if sys.argv[2] == "small":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    with DirectoryWriter(sys.argv[1], max_shard_bytes=1) as writer:
        for i in range(3):
            writer.add(str(i), np.ones((1 + 100_000 * i, 4), np.float32))
            writer.flush_if_full()
except OSError as error:
    sys.exit(str(error))
"""


def test_a_full_disk_leaves_nothing(tmp_path):
    def write(size: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", FULL, tmp_path / "out", size], capture_output=True, text=True, check=False
        )

    failed = write("small")
    assert failed.returncode == 1
    assert re.search(r"1600\d+ bytes are needed for 'shard-00001'. Make room", failed.stderr)
    assert os.listdir(tmp_path) == []
    assert write("large").returncode == 0
    assert verify(tmp_path / "out") == 4


def test_paths_with_spaces_and_unicode(tmp_path):
    out = tmp_path / "ein Modell ✓" / "größe 4"
    with DirectoryWriter(out) as writer:
        writer.add("gewicht.ä", A)
        writer.write_text("läs mig.txt", "hej")
    with SafetensorsDir(out) as files:
        np.testing.assert_array_equal(files.read("gewicht.ä"), A)
    assert verify(out) == 2


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with DirectoryWriter(tmp_path / "out") as writer:
            writer.add("a", A)
            writer.write_text("x.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_read_only_directory_is_named(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root writes anywhere")
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match="out"):
        DirectoryWriter(tmp_path / "out").__enter__()


def test_bad_calls(tmp_path):
    with DirectoryWriter(tmp_path / "out") as writer:
        writer.add("a", A)
        with pytest.raises(ValueError, match="tensor 'a' was already written"):
            writer.add("a", A)
        with pytest.raises(ValueError, match="tensor 'd' is float64; files hold float32"):
            writer.add("d", A.astype(np.float64))
        for name in ("../x", "/etc/x", "", "..", MANIFEST, "model.safetensors", "_INCOMPLETE"):
            with pytest.raises(ValueError, match="not a plain, unused file name"):
                writer.write_text(name, "x")


def test_a_directory_that_holds_only_other_files(tmp_path):
    with DirectoryWriter(Path(tmp_path / "out")) as writer:
        writer.write_text("x.txt", "x")
    assert sorted(os.listdir(tmp_path / "out")) == [MANIFEST, "x.txt"]
