# SPDX-License-Identifier: Apache-2.0
"""Several processes write one native checkpoint, each its share; whoever reads it finds what one would have written."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from awq_jax import QTensor
from awq_jax.checkpoint import read_part
from awq_jax.resume.layers import to_tensors
from tests.reliability.processes import free_port, writers

# Each process makes the same tree, writes its share, and says what `read_part` is to be given.
WRITE = """
import json, sys
from pathlib import Path
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
where, count, index, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
jax.distributed.initialize(where, count, index)
from awq_jax.checkpoint import write_part
from tests.reliability.test_together import tree
for name in ("one", "two"):
    said = write_part(folder / name, tree(name), together=f"occasion/{name}")
    print(json.dumps(said))
"""


def tree(name: str) -> dict[str, Any]:
    """Every kind of leaf: divided evenly or not, vectors, every dtype, values that arithmetic would not keep."""
    rng = np.random.default_rng(list(name.encode()))
    bits = rng.integers(0, 2**32, (64, 24), np.uint32)
    packed = rng.integers(-128, 128, (32, 24), np.int8)
    scale = rng.standard_normal((2, 24)).astype(ml_dtypes.bfloat16)
    return {
        "attn": {
            "q": {"kernel": QTensor(packed=packed, scale=scale, zero=rng.integers(0, 16, scale.shape, np.int8))},
            "k": {"kernel": QTensor(packed=packed, scale=scale.astype(np.float16))},
        },
        "float": {"kernel": bits.view(np.float32)},  # NaN payloads, infinities, subnormals
        "half": {"kernel": rng.standard_normal((3, 5)).astype(np.float16)},
        "norm": {"scale": rng.standard_normal(24).astype(np.float32)},
        "bytes": {"kernel": rng.integers(0, 256, (7, 8), np.uint8)},
        "scalar": {"scale": np.float32(1.5)},
    }


def written(count: int, folder: Path) -> list[dict[str, Any]]:
    import json

    where = f"127.0.0.1:{free_port()}"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE, where, str(count), str(index), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        )
        for index in range(count)
    ]
    try:
        said = [child.communicate(timeout=300) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * count, "\n".join(error for _, error in said)
    heard = [[line for line in out.splitlines() if line.startswith("{")] for out, _ in said]
    assert all(lines == heard[0] for lines in heard)
    return [json.loads(line) for line in heard[0]]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_is_read_has_the_bits_that_one_process_writes(tmp_path: Path, count: int):
    for name, description in zip(("one", "two"), written(count, tmp_path), strict=True):
        found, described = to_tensors(read_part(tmp_path / name, description))
        wanted, as_made = to_tensors(tree(name))
        assert described == as_made
        assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in found.items()} == {
            n: (a.dtype, a.shape, a.tobytes()) for n, a in wanted.items()
        }
        assert writers(tmp_path / name) == {f"ocdbt.process_{index}" for index in range(count)}
