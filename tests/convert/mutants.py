# SPDX-License-Identifier: Apache-2.0
"""Directories that were damaged at random, or kept because they once reached something new, and how they are read."""

import base64
import json
import resource
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax import QTensor
from awq_jax._tree import leaves, put
from awq_jax_convert.family_file import FAMILY_FILE
from awq_jax_convert.formats import open_checkpoint, open_writer
from awq_jax_convert.hf import HFCheckpoint
from tests.convert.foreign import save_gptq, save_modelopt
from tests.models.families import TINY
from tests.tiny_models import save_oracle

CORPUS = Path(__file__).with_name("corpus.json")
WRITTEN = ("autoawq", "compressed-tensors", "native")
FORMATS = ("dense", "own table", "autoawq", "compressed-tensors", "gptq", "modelopt", "native")
TABLE = """
base = "llama"
name = "mine"
architectures = ["LlamaForCausalLM"]
linears = [{ theirs = "model.layers.*.mlp.up_proj", ours = "layers/*/mlp/up" }]
config = { hidden_size = "hidden_size" }
options = { gated = true }
[[groups]]
linear = "layers/*/mlp/up"
sinks = ["layers/*/mlp/down"]
"""
SECONDS = 5.0  # far above the hundredth of a second that opening takes
BYTES = 256 << 20  # far above the 200 kB of the files

# What a JSON value may become: other types, borders of integers, paths, expressions, names of other things.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e308, "", "x", "..", "/etc/passwd",
    "../../etc/passwd", "model.safetensors", "F32", "I32", "F8_E4M3", "BF16", "re:(a+)+$", "re:.*.*.*.*.*.*x", "gemv",
    "channel", "group", "gptq", "awq", "LlamaForCausalLM", "Qwen3ForCausalLM", "\0", "é" * 50, [], [0], [1, 2, 3],
    [2**40, 2**40], [-1, 8], [[]], {}, {"": None}, {"a": {"b": [1]}},
)  # fmt: skip


def some_weight(shape: tuple[int, ...], group: int = 8) -> QTensor:
    rng, (k, n) = np.random.default_rng(0), shape
    zero = rng.integers(0, 16, (k // group, n)).astype(np.int8)
    scale = rng.uniform(0.01, 0.1, zero.shape).astype(np.float16)
    return QTensor(packed=rng.integers(-128, 128, (k // 2, n), np.int8), scale=scale, zero=zero)


def make_originals(home: Path) -> dict[str, Path]:
    """One tiny model in every format, the dense one in several shards."""
    oracle = save_oracle(TINY[0], home / "whole")
    shutil.copytree(oracle.path, home / "own table")
    (home / "own table" / FAMILY_FILE).write_text(TABLE)
    save_gptq(oracle.path, home / "gptq")
    save_modelopt(oracle.path, home / "modelopt", lambda _, k: np.linspace(1, 2, k, dtype=np.float32))
    save_oracle(TINY[0], home / "dense", max_shard_size="20KB")
    dense = HFCheckpoint.open(home / "dense")
    for form in WRITTEN:
        with open_writer(form, dense, home / form, group_size=8) as writer:
            writer.write_stem(dense.stem())
            for index in range(dense.num_layers):
                tree = dense.layer(index)
                for path, leaf in list(leaves(tree)):
                    if path.endswith("/kernel"):
                        tree = put(tree, path, some_weight(leaf.shape))
                writer.write_layer(index, tree)
    return {form: home / form for form in FORMATS}


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    for key in node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from places(node[key])


def mutate_json(rng: np.random.Generator, node: Any) -> None:
    """Change, remove, double or rename something."""
    for _ in range(rng.integers(1, 4)):
        found = list(places(node))
        if not found:
            return
        container, key = found[rng.integers(len(found))]
        what = rng.integers(5)
        if what <= 1:
            container[key] = VALUES[rng.integers(len(VALUES))]
        elif what == 2:
            del container[key]
        elif what == 3 and isinstance(container[key], int):
            container[key] = container[key] + int(rng.choice([-1, 1, 8, -container[key], 2**33]))
        elif isinstance(container, dict):
            names = list(container)
            other = str(names[rng.integers(len(names))])
            container[other if rng.integers(2) else f"{key}x"] = container.pop(key)


def mutate_bytes(rng: np.random.Generator, raw: bytes) -> bytes:
    """Flip, cut, double or insert some bytes, most of them in the first kilobyte."""
    content = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        reach = min(len(content), 1024 if rng.integers(4) else len(content))
        at = int(rng.integers(max(reach, 1)))
        what = rng.integers(5)
        if what == 0 and content:
            content[at] = rng.integers(256)
        elif what == 1:
            del content[at:]
        elif what == 2:
            del content[at : at + int(rng.integers(1, 9))]
        elif what == 3:
            content[at:at] = content[at : at + int(rng.integers(1, 9))]
        else:
            content[at:at] = rng.bytes(int(rng.integers(1, 9)))
    return bytes(content)


def mutate_header(rng: np.random.Generator, raw: bytes) -> bytes:
    """A safetensors file with another header, whose length is right or not."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    mutate_json(rng, header)
    text = json.dumps(header).encode()
    claimed = len(text) if rng.integers(4) else int(rng.choice([0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63 - 1]))
    return claimed.to_bytes(8, "little") + text + raw[8 + length :]


def mutate(rng: np.random.Generator, directory: Path) -> None:
    """Change one file of a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    likely = [path for path in files if path.suffix in (".safetensors", ".json", ".toml")]
    chosen = (likely if rng.integers(8) else files)[rng.integers(len(likely))]
    raw = chosen.read_bytes()
    what = rng.integers(8)
    if what == 0:
        chosen.unlink()
        return
    try:
        if what > 1 and chosen.suffix == ".json":
            node = json.loads(raw)
            mutate_json(rng, node)
            chosen.write_text(json.dumps(node))
            return
        if what > 1 and chosen.suffix == ".safetensors":
            chosen.write_bytes(mutate_header(rng, raw))
            return
    except ValueError:  # an earlier mutation left no JSON
        pass
    chosen.write_bytes(mutate_bytes(rng, raw))


@contextmanager
def files_opened() -> Iterator[list[str]]:
    """Names of all files that are opened until the block ends."""
    names: list[str] = []
    live = [True]

    def hook(event: str, args: tuple[object, ...]) -> None:
        if live[0] and event == "open":
            names.append(str(args[0]))

    sys.addaudithook(hook)  # can't be removed again, only silenced
    yield names
    live[0] = False


def refusal(directory: Path, opened: list[str], label: str) -> str:
    """Read a damaged directory; why it was refused, empty where it was read.

    A crash, an error of another kind, one without a word, a file from outside, and time or memory out of proportion
    are failures.
    """
    opened.clear()
    said = ""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        open_checkpoint(directory).params(None)
    except (ValueError, OSError) as error:
        said = str(error)
        assert said, f"{label}: {type(error).__name__} without a word"
    except BaseException as error:
        raise AssertionError(f"{label}: {type(error).__name__}: {error}") from error
    assert time.process_time() - began < SECONDS, f"{label} took too long"
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < BYTES, f"{label} took {grown} bytes"
    home = str(directory.parent)
    outside = [name for name in opened if "passwd" in name or (name.startswith(home) and ".." in name)]
    assert not outside, f"{label} opened {outside}"
    return said


def changes(original: Path, mutant: Path) -> dict[str, Any]:
    """What makes one directory of another: new content by file, of weights the header alone; None for a file gone."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in original.rglob("*") if p.is_file()):
        name = str(path.relative_to(original))
        before, after = path.read_bytes(), (mutant / name).read_bytes() if (mutant / name).is_file() else None
        if after is None:
            found[name] = None
        elif after != before:
            same = 0  # bytes at the end that are as they were
            while same < min(len(before), len(after)) and before[-same - 1] == after[-same - 1]:
                same += 1
            head = base64.b85encode(zlib.compress(after[: len(after) - same], 9)).decode()
            found[name] = {"head": head, "tail": same}
    return found


def apply(changed: dict[str, Any], original: Path, into: Path) -> None:
    """Inverse of `changes`."""
    shutil.copytree(original, into)
    for name, row in changed.items():
        (into / name).unlink()
        if row is not None:
            before = (original / name).read_bytes()
            tail = before[len(before) - row["tail"] :]
            (into / name).write_bytes(zlib.decompress(base64.b85decode(row["head"])) + tail)
