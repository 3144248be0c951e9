# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from awq_jax_convert.safetensors_dir import SafetensorsDir

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.int32)


def raw_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, ...] = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write_index(path: Path, weight_map: dict[str, str], **more: object) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, **more}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": A}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": B}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return tmp_path


def test_reads_one_file(tmp_path):
    half = A.astype(ml_dtypes.bfloat16)
    save_file({"a": A, "scalar": np.array(3.0, np.float16), "none": np.zeros((0, 4), np.float32)}, tmp_path / "x")
    header = {"h": entry("BF16", (2, 3), (0, 12))}
    (tmp_path / "model.safetensors").write_bytes(raw_file(header, half.tobytes()))
    with SafetensorsDir(tmp_path) as files:
        assert files.names() == ["h"] and "h" in files and files.nbytes == 12
        assert files.info("h") == ("BF16", (2, 3), 12)
        np.testing.assert_array_equal(files.read("h"), half)
    (tmp_path / "x").rename(tmp_path / "model.safetensors")
    with SafetensorsDir(tmp_path) as files:
        np.testing.assert_array_equal(files.read("a"), A)
        assert files.read("scalar") == 3.0 and files.read("scalar").shape == ()
        assert files.read("none").shape == (0, 4)
        with pytest.raises(KeyError, match=r"has no tensor 'b'"):
            files.read("b")


def test_reads_shards_without_metadata(sharded):
    with SafetensorsDir(sharded) as files:
        assert files.names() == ["a", "b"]
        np.testing.assert_array_equal(files.read("b"), B)


BAD_FILES = {
    "empty": (b"", "0 bytes, too few for a header"),
    "garbage": (b"not safetensors at all, but long enough", "its header claims"),
    "cut in the header": (save({"a": A})[:40], "truncated"),
    "cut in the data": (save({"a": A})[:-1], "truncated"),
    "one byte more": (save({"a": A}) + b"\0", "longer than its header says"),
    "huge header length": (raw_file(b"{}", length=2**62), "the limit is 100000000"),
    "no object": (raw_file(b"[1]"), "does not begin with"),
    "bad json": (raw_file(b"{]"), "not valid JSON"),
    "bad utf-8": (raw_file(b'{"\xff": 1}'), "not valid JSON"),
    "deep json": (raw_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not valid JSON"),
    "duplicate key": (raw_file(b'{"a": 1, "a": 2}'), "'a' occurs twice"),
    "unknown dtype": (raw_file({"a": entry("F7")}, bytes(8)), "unknown dtype 'F7'"),
    "absurd dimensions": (raw_file({"a": entry(shape=(2**62, 2**62))}, bytes(8)), "needs 8507059.* bytes, has 8"),
    "negative dimension": (raw_file({"a": entry(shape=(-1, -2))}, bytes(8)), "no valid shape"),
    "dimension as float": (raw_file(b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', bytes(8)), "shape"),
    "dimension as bool": (raw_file(b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', bytes(1)), "shape"),
    "rank": (raw_file({"a": entry(shape=(1,) * 100)}, bytes(8)), "no valid shape"),
    "backward offsets": (raw_file({"a": entry(offsets=(8, 0))}, bytes(8)), "needs 8 bytes, has -8"),
    "overlap": (raw_file({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "overlap"),
    "hole": (raw_file({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24)), "leave a hole"),
    "no offsets": (raw_file({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "exactly dtype, shape"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_invalid_file(tmp_path, case):
    content, message = BAD_FILES[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        SafetensorsDir(tmp_path)
    assert "model.safetensors is not a valid safetensors file" in str(caught.value)
    assert "Re-download" in str(caught.value)


def test_damage_in_the_last_shard_is_found_on_opening(sharded):
    last = sharded / "model-00002-of-00002.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"00002-of-00002.safetensors is not a valid safetensors file.*truncated"):
        SafetensorsDir(sharded)


def test_all_differences_stand_in_one_error(sharded):
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"b": B, "c": B}, sharded / two)
    save_file({"b": B}, sharded / "model-00001-of-00009.safetensors")
    write_index(sharded, {"a": one, "b": one, "gone": two, "far": "model-00003-of-00003.safetensors"})
    with pytest.raises(ValueError, match=r"disagree") as caught:
        SafetensorsDir(sharded)
    for line in (
        "shard 'model-00003-of-00003.safetensors' is missing",
        "shard 'model-00001-of-00009.safetensors' is in the directory but not in the index",
        f"tensor 'gone' is not in {two!r}",
        f"tensor 'b' is not in {one!r}",
        f"tensor 'c' of {two!r} is not in the index",
    ):
        assert line in str(caught.value)


def test_a_tensor_in_two_shards(sharded):
    save_file({"a": A, "b": B}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"tensor 'a' is in 'model-00001.*' and 'model-00002"):
        SafetensorsDir(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_index_without_weight_map(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"no 'weight_map'"):
        SafetensorsDir(tmp_path)


@pytest.fixture
def opened():
    """Names of all files opened during the test."""
    names: list[str] = []
    live = [True]

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "open" and live[0]:
            names.append(str(args[0]))

    sys.addaudithook(hook)  # can't be removed again, only silenced
    yield names
    live[0] = False


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "subfolder", "suffix", "directory", "dots"])
def test_nothing_outside_the_directory_is_opened(tmp_path, opened, kind):
    home, secret = tmp_path / "model", tmp_path / "secret.safetensors"
    (home / "sub").mkdir(parents=True)
    (home / "folder.safetensors").mkdir()
    save_file({"a": A}, secret)
    save_file({"a": A}, home / "sub" / "x.safetensors")
    (home / "link.safetensors").symlink_to(secret)
    (home / "notes.txt").write_bytes(secret.read_bytes())
    name = {
        "parent": "../secret.safetensors",
        "absolute": str(secret),
        "link": "link.safetensors",
        "subfolder": "sub/x.safetensors",
        "suffix": "notes.txt",
        "directory": "folder.safetensors",
        "dots": "..",
    }[kind]
    write_index(home, {"a": name})
    opened.clear()
    with pytest.raises(ValueError, match=r"plain file names|outside its directory|only .safetensors|not a regular"):
        SafetensorsDir(home)
    assert [Path(o).name for o in opened] == ["model.safetensors.index.json"]


def test_links_of_a_hugging_face_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": A}, blobs / "123abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123abc")
    with SafetensorsDir(snapshot) as files:
        np.testing.assert_array_equal(files.read("a"), A)


PICKLE = """
import pickle, sys
from awq_jax_convert.safetensors_dir import SafetensorsDir
try:
    SafetensorsDir(sys.argv[1])
except ValueError as error:
    print(error)
assert "torch" not in sys.modules
"""


def test_pickles_are_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "marker",))

    import pickle

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    done = subprocess.run([sys.executable, "-c", PICKLE, tmp_path], capture_output=True, text=True, check=True)
    assert "never opened" in done.stdout and "save_pretrained" in done.stdout
    assert not (tmp_path / "marker").exists()


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        SafetensorsDir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is not a directory"):
        SafetensorsDir(tmp_path / "typo")


def test_two_candidates_are_ambiguous(sharded):
    save_file({"a": A}, sharded / "model.safetensors")
    with pytest.raises(ValueError, match=r"which one is the model is not clear"):
        SafetensorsDir(sharded)


@pytest.mark.parametrize("dtype", [np.float64, np.uint16, np.bool_])
def test_unread_dtypes_are_named(tmp_path, dtype):
    save_file({"a": A, "odd": np.zeros(3, dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors of .* 'odd' is .*read are F32, BF16, F16"):
        SafetensorsDir(tmp_path)


def test_fp8_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(raw_file({"w": entry("F8_E4M3", (8,))}, bytes(8)))
    with pytest.raises(ValueError, match=r"'w' is F8_E4M3"):
        SafetensorsDir(tmp_path)


TRUNCATE = """
import os, sys
import numpy as np
from awq_jax_convert.safetensors_dir import SafetensorsDir
files = SafetensorsDir(sys.argv[1])
os.truncate(sys.argv[1] + "/model.safetensors", 4096)
try:
    files.read("a")
except OSError as error:
    print(error)
"""


def test_a_file_truncated_while_open_is_an_error_not_a_signal(tmp_path):
    save_file({"a": np.ones(1 << 16, np.float32)}, tmp_path / "model.safetensors")
    done = subprocess.run([sys.executable, "-c", TRUNCATE, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ended inside tensor 'a'" in done.stdout and "truncated while it was read" in done.stdout


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 200), value=st.integers(0, 255))
def test_any_flipped_byte_is_read_or_refused(tmp_path_factory, at, value):
    path = tmp_path_factory.mktemp("flip")
    content = bytearray(save({"a": A, "b": B}))
    content[at % len(content)] = value
    (path / "model.safetensors").write_bytes(content)
    try:
        with SafetensorsDir(path) as files:
            for name in files.names():
                files.read(name)
    except ValueError as error:
        assert str(path) in str(error)
