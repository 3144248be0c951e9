# SPDX-License-Identifier: Apache-2.0
"""Artefacts run without this package, and say what it would."""

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from awq_jax.serving import Engine, Request, load
from awq_jax.serving.export import export

pytest.importorskip("flatbuffers", reason="jax.export writes with flatbuffers; it is in the extra [serve]")

OPTIONS: dict[str, Any] = {"batch": 2, "max_len": 64, "steps": 4}

ALONE = """
import importlib.abc, json, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"awq_jax", "awq_jax_kernels", "awq_jax_convert", "flax", "transformers", "orbax"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
from loader import Exported
print(json.dumps(Exported(sys.argv[1]).generate(json.loads(sys.argv[2]), max_new_tokens=20)))
"""


@pytest.fixture(scope="module")
def artefacts(native, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "cpu"
    return out, export(native, out, platform="cpu", **OPTIONS)


def test_artefacts_need_jax_and_numpy_alone(artefacts, native, prompts):
    out, _ = artefacts
    given = [list(prompts[0]), list(prompts[1])]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", ALONE, str(out), json.dumps(given)], capture_output=True, text=True, env=env
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    model = load(native)
    engine = Engine(model.config, model.params, slots=2, max_len=64, steps=4)
    assert json.loads(ran.stdout) == engine.generate([Request(prompt=tuple(p), max_new_tokens=20) for p in given])


def test_the_manifest_says_where_every_leaf_lies(artefacts):
    out, manifest = artefacts
    assert json.loads((out / "manifest.json").read_text()) == manifest
    ends = [leaf["offset"] + leaf["nbytes"] for leaf in manifest["params"]]
    assert all(end <= leaf["offset"] for end, leaf in zip(ends, manifest["params"][1:], strict=False))
    assert (out / "weights.bin").stat().st_size >= ends[-1]
    for leaf in manifest["params"]:
        assert leaf["nbytes"] == np.dtype(leaf["dtype"]).itemsize * int(np.prod(leaf["shape"]))


def test_what_would_spoil_a_slot_is_refused(artefacts):
    from awq_jax.serving.loader import Exported

    model = Exported(artefacts[0])
    first = model.begin(1, [5, 6, 7], max_new_tokens=9)
    for row, prompt, new, said in (
        (2, [9], 9, "rows 0 to 1"),
        (-1, [9], 9, "rows 0 to 1"),
        (0, [9, 2048], 9, "token 2048 is outside the vocabulary of 2048"),
        (0, [-1], 9, "token -1"),
        (0, [9], 0, "at least 1"),
        (0, [9], 64, "a slot has 64 positions"),
    ):
        with pytest.raises(ValueError, match=said):
            model.begin(row, prompt, max_new_tokens=new)
    drawn = [first, *model.advance()[1], *model.advance()[1]]
    assert drawn == Exported(artefacts[0]).generate([[1], [5, 6, 7]], max_new_tokens=9)[1]


def test_another_version_or_platform_is_refused(artefacts, tmp_path):
    from awq_jax.serving.loader import Exported

    _, manifest = artefacts
    for change, said in (({"version": 99}, "version 99"), ({"platform": "tpu"}, "is for tpu")):
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match=said):
            Exported(tmp_path)


def test_a_tpu_s_artefacts_are_made_here_with_its_kernel_inside(native, tmp_path):
    """Made on a CPU, for a chip that is not there: the StableHLO holds Mosaic kernels and no dense weight."""
    import jax

    with jax.numpy_dtype_promotion("standard"):  # jax's own attention needs it in bfloat16
        manifest = export(native, tmp_path / "tpu", platform="tpu", chip="v6e", batch=2, max_len=32, steps=2)
    assert manifest["platform"] == "tpu" and manifest["product"] == "kernel" and set(manifest["prefill"]) == {"32"}
    exported = jax.export.deserialize(bytearray((tmp_path / "tpu" / "decode.bin").read_bytes()))
    text = exported.mlir_module()
    assert exported.platforms == ("tpu",) and "tpu_custom_call" in text
    assert "tensor<256x1536xbf16>" not in text and "tensor<256x1536xf32>" not in text  # gate and up, dense


def test_what_the_extra_brings_is_missed_before_any_work(tmp_path, monkeypatch, capsys):
    from awq_jax.cli import main

    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    assert main(["export", "nowhere", str(tmp_path / "out"), "--platform", "cpu"]) == 2
    assert "exporting needs flatbuffers: pip install 'awq-jax[serve]', or '.[serve]'" in capsys.readouterr().err


def test_a_model_of_few_positions_is_exported_as_it_is(native, tmp_path):
    manifest = export(native, tmp_path / "out", platform="cpu", batch=1, steps=1)
    assert manifest["max_len"] == 512


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"platform": "abacus"}, "platform 'abacus'"),
        ({"platform": "cpu", "chip": "v6e"}, "chip 'v6e' of platform 'cpu'"),
        ({"platform": "tpu", "chip": "v9"}, "chip 'v9'"),
        ({"platform": "cpu", "max_len": 100_000}, "the model has 512 positions"),
        ({"platform": "cpu", "batch": 0}, "at least 1"),
    ],
)
def test_refusals(native, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        export(native, tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())
