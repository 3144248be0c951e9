# SPDX-License-Identifier: Apache-2.0
import inspect
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from awq_jax import QTensor, QuantSpec, quantize
from awq_jax._manifest import MANIFEST, read_manifest, verify
from awq_jax._tree import leaves
from awq_jax.adapt.kernel import as_kernel
from awq_jax.checkpoint import load, save


def weight(rng, *shape: int, **spec: Any) -> QTensor:
    return quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), QuantSpec(group_size=8, **spec))


def mixed_tree(rng) -> dict[str, Any]:
    """Every width, scale dtype and number of leading axes, beside dense arrays of many dtypes."""
    return {
        "quantized": {
            "four": weight(rng, 16, 12),
            "three": weight(rng, 16, 12, bits=3, scale_dtype="bfloat16"),
            "two": weight(rng, 16, 12, bits=2, scale_dtype="float32"),
            "symmetric": weight(rng, 16, 12, symmetric=True),
            "eight": weight(rng, 16, 12, bits=8),
            "eight symmetric": weight(rng, 2, 16, 12, bits=8, symmetric=True),
            "experts": {"stacked": weight(rng, 3, 2, 16, 12), "symmetric": weight(rng, 3, 16, 12, symmetric=True)},
        },
        "dense": {
            str(np.dtype(dtype)): np.asarray(rng.standard_normal((3, 5)) * 10).astype(dtype)
            for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.int8, np.bool_)
        },
        "odd": {"scalar": np.float32(0.1), "nan": np.array([np.nan, -0.0, np.inf], np.float32), "one": np.ones((1, 1))},
    }


def assert_same_bits(got: Any, wanted: Any) -> None:
    """Structure, static fields, dtypes, shapes and every bit."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), map(np.asarray, jax.tree.leaves(wanted)), strict=True):
        assert isinstance(a, np.ndarray | np.generic)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_a_mixed_tree_comes_back_bit_for_bit(rng, tmp_path):
    tree = mixed_tree(rng)
    save(tmp_path / "x", tree, recipe={"bits": 4})
    loaded = load(tmp_path / "x")
    assert_same_bits(loaded, tree)
    kept = {path: (leaf.bits, leaf.zero is None) for path, leaf in leaves(loaded) if isinstance(leaf, QTensor)}
    assert kept["quantized/three"] == (3, False) and kept["quantized/experts/symmetric"] == (4, True)
    assert read_manifest(tmp_path / "x")["recipe"] == {"bits": 4}
    assert os.listdir(tmp_path) == ["x"]  # no working directory is left beside it


def test_the_manifest_knows_every_file(rng, tmp_path):
    save(tmp_path / "x", {"w": weight(rng, 16, 12)})
    files = {str(p.relative_to(tmp_path / "x")) for p in (tmp_path / "x").rglob("*") if p.is_file()}
    assert files == {MANIFEST, *read_manifest(tmp_path / "x")["files"]}
    assert verify(tmp_path / "x") == len(files) - 1


@pytest.fixture
def saved(rng, tmp_path):
    tree = {"w": weight(rng, 64, 32), "b": rng.standard_normal((64, 32))}
    save(tmp_path / "x", tree)
    return tmp_path / "x", tree


def test_a_flipped_bit_is_refused_wherever_it_is(saved):
    """Orbax alone would return wrong values for some of these."""
    directory, tree = saved
    files = read_manifest(directory)["files"]
    for name in files:
        whole = (directory / name).read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1}:
            (directory / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            for read in (load, verify):
                with pytest.raises(
                    ValueError, match=rf"(?s)is not what was written.*{Path(name).name}: checksum differs"
                ):
                    read(directory)
        (directory / name).write_bytes(whole)
    assert_same_bits(load(directory), tree)


@pytest.mark.parametrize("cut", [False, True])
def test_missing_and_shortened_files_are_named(saved, cut):
    directory, _ = saved
    (name, *_) = read_manifest(directory)["files"]
    whole = (directory / name).read_bytes()
    (directory / name).unlink()
    if cut:
        (directory / name).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{name}: {'checksum differs' if cut else 'missing'}"):
        load(directory)


def test_a_directory_without_a_manifest_is_not_ours(saved):
    directory, _ = saved
    (directory / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match=MANIFEST):
        load(directory)


def test_a_manifest_that_lists_no_files_of_its_tree_is_refused(saved):
    directory, _ = saved
    (directory / MANIFEST).write_text(json.dumps(read_manifest(directory) | {"files": {}}))
    with pytest.raises(ValueError, match="lists no files"):
        load(directory)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format_version": 2}, "format_version 2; this awq-jax reads 1. Upgrade awq-jax"),
        ({"parts": {}}, "holds no single parameter tree; a quantized model is loaded with load_model"),
        ({"parts": None}, "holds no single parameter tree"),
    ],
)
def test_a_manifest_that_says_something_else(saved, changed, said):
    directory, _ = saved
    manifest = read_manifest(directory) | changed
    (directory / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=said):
        load(directory)


def test_an_existing_output_is_kept(saved):
    directory, tree = saved
    with pytest.raises(FileExistsError, match=r"the output exists; .*overwrite=True"):
        save(directory, {"w": np.zeros(2, np.float32)})
    assert_same_bits(load(directory), tree)


def test_only_our_own_output_is_overwritten(saved, tmp_path):
    directory, _ = saved
    new = {"w": np.arange(3, dtype=np.float32)}
    save(directory, new, overwrite=True)
    assert_same_bits(load(directory), new)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"not overwritten: no .* in it says that awq-jax wrote it"):
        save(tmp_path / "foreign", new, overwrite=True)
    assert (tmp_path / "foreign" / "thesis.tex").read_text() == "years of work"


def test_a_tree_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="cannot write 'params'"):
        save(tmp_path / "x", {"w": np.array(["text"], dtype=object)})
    assert not os.listdir(tmp_path)


def test_other_trees_are_refused_and_nothing_is_written(rng, tmp_path):
    one = np.ones(2, np.float32)
    for tree, said in (
        ({"a": {"b": [one, one]}}, "'a/b' of the parameters is of type list"),
        ({"a": None}, "'a' of the parameters is of type NoneType"),
        ({"a": as_kernel(weight(rng, 16, 12))}, r"type QKernel.*orbax's own"),
        ({"a": {1: one}}, "'a' of the parameters has the key 1"),
        ({"a/b": weight(rng, 16, 12)}, "the tree of parameters has the key 'a/b'"),
        (weight(rng, 16, 12), "the tree of parameters is of type QTensor"),
        ({}, "is empty"),
    ):
        with pytest.raises(ValueError, match=said):
            inspect.unwrap(save)(tmp_path / "x", tree)
    assert not any(tmp_path.iterdir())
