# SPDX-License-Identifier: Apache-2.0
"""A tiny quantization whose runs are killed, and what it means that two of them ended alike."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax import QTensor, QuantSpec, Recipe, SearchSpec, quantize_checkpoint, rule
from awq_jax._manifest import read_manifest, verify
from awq_jax._tree import leaves
from awq_jax.calibration import Samples
from awq_jax.report import Report
from awq_jax.resume.layers import to_tensors
from awq_jax_convert.formats import open_checkpoint
from awq_jax_kernels.nibbles import unpack_numpy
from benchmarks.memory import VOCAB, make_checkpoint

RECIPE = Recipe(quant=QuantSpec(group_size=32), search=SearchSpec(rules=(rule("paper", n_grid=3),), clip_ratios=(0.8,)))


def make_source(path: Path, layers: int = 2) -> Path:
    """A random model, 128 wide."""
    make_checkpoint(path, layers, hidden=128, inner=192)
    return path


def calib(seed: int = 0) -> Samples:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (4, 24)).astype(np.int32)
    return Samples(tokens=tokens, mask=np.ones(tokens.shape, bool), source="random")


def run(source: Path, out: Path, **options: Any) -> Report:
    """The whole job; the same bits in every run."""
    return quantize_checkpoint(source, out, **{"recipe": RECIPE, "calib": calib(), "batch": 2, **options})


def moved_codes(one: Path, other: Path) -> tuple[int, int]:
    """How many codes two outputs have, and in how many they differ; other devices take sums in another order.

    Where that moves a weight across a tie its code moves by one. Norms were divided by scales that come of such sums:
    in bfloat16 they may round to the neighbour.
    """
    codes = moved = 0
    wanted, found = (dict(leaves(open_checkpoint(path).params(None))) for path in (one, other))
    assert wanted.keys() == found.keys()
    for path, a in wanted.items():
        b = found[path]
        if isinstance(a, QTensor):
            step = np.abs(unpack_numpy(a.packed).astype(int) - unpack_numpy(b.packed).astype(int))
            codes, moved = codes + step.size, moved + int((step > 0).sum())
            assert step.max() <= 1, path
            np.testing.assert_allclose(a.scale.astype(np.float32), b.scale.astype(np.float32), rtol=2**-9)
        else:
            np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=2**-7, err_msg=path)
    return codes, moved


_REPORT, _MANIFEST = "awq_jax_report.json", "awq_jax_manifest.json"


def contents(out: Path) -> dict[str, Any]:
    """Every file of an output by its relative path; of the report what is not a measurement of this very run.

    Orbax's files, which differ in every run, count by the bits that they hold.
    """
    found: dict[str, Any] = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    if any(path.is_dir() for path in out.iterdir()):
        verify(out)
        tensors, described = to_tensors(open_checkpoint(out).params(None))
        found |= {name: array.tobytes() for name, array in tensors.items()} | {"described": described}
        found["awq_jax_manifest.json"] = json.dumps(read_manifest(out) | {"files": {_REPORT: ""}}).encode()
    report, manifest = json.loads(found[_REPORT]), json.loads(found[_MANIFEST])
    for measured in ("seconds", "peak_memory_bytes", "peak_device_bytes", "resumed_layers"):
        del report[measured]
    del manifest["files"][_REPORT]
    for page in (name for name in found if name.endswith(".html")):  # the report once more, seconds included
        found[page] = manifest["files"][page] = ""
    return {**found, _REPORT: report, _MANIFEST: manifest}
