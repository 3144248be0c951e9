# SPDX-License-Identifier: Apache-2.0
"""What we write, loaded by transformers with gptqmodel and with compressed-tensors: each family's logits are our own.

CONTRIBUTING.md has the environment that they need. Outputs go to the table of docs/formats.md:

    python -m pytest -m clients -n 0 -s tests/clients | grep measured
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from awq_jax.cli import main
from awq_jax_convert.readers import unread
from tests.e2e.conftest import save_text_tools
from tests.e2e.test_families import ROWS, widened
from tests.fixtures.tiny import with_float32_products
from tests.models.families import Tiny
from tests.tiny_models import save_oracle, some_tokens

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")  # stacked in transformers, whose AWQ loader replaces Linear alone
CONV1D = ("gpt2",)  # not Linear
OWN_LINEAR = ("falcon", "falcon-new")  # FalconLinear reads .weight itself, which a compressed module lacks
OTHER_NAMES = ("phi3", "mixtral", "gpt_neox")  # GPTQModel.load looks for other tensors than the Hub's, without a word
TOKENS = some_tokens(320)

every_family = pytest.mark.parametrize("row", [pytest.param(row, id=row.family) for row in ROWS])


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS).long(), use_cache=False).logits.float().numpy()


def load(path: Path, **options: Any) -> Any:
    """As a user loads it; every tensor of the file is used and none is missing."""
    read: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, info = read(path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def written(row: Tiny, path: Path, *options: str) -> tuple[Path, np.ndarray]:
    """Our checkpoint of a tiny model, and the logits of what `convert --to dense` makes of it."""
    source = save_oracle(widened(row), path / "source", dtype=torch.float16).path
    save_text_tools(source)
    few = "--samples 4 --seq-len 32 --group-size 16 --rules identity --no-clip --quiet".split()
    calib = ["--calib", str(source / "text.txt")]
    assert main(["quantize", str(source), str(path / "out"), *calib, *few, *options]) == 0
    assert main(["convert", str(path / "out"), str(path / "dense"), "--to", "dense", "--quiet"]) == 0
    return path / "out", logits(load(path / "dense"))


def difference(row: Tiny, what: str, theirs: np.ndarray, ours: np.ndarray) -> float:
    off = float(np.abs(theirs - ours).max() / np.abs(ours).max())
    print(f"measured {row.family} {what} {off:.1e}")
    return off


def awq_weight(module: Any) -> Any:
    """``[out, in]`` of one of gptqmodel's linears by its own code, in float32."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm  # pyright: ignore[reportMissingImports]

    if not hasattr(module, "qzeros"):
        return None
    found = {name: getattr(module, name) for name in ("qweight", "qzeros", "bits", "group_size")}
    return dequantize_gemm(**found, scales=module.scales.float()).T


@pytest.fixture
def gptqmodel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # its pools want two, whatever the machine has
    monkeypatch.chdir(tmp_path)  # it writes logs where it runs
    return pytest.importorskip("gptqmodel", reason="pip install gptqmodel (CONTRIBUTING.md)")


@every_family
def test_autoawq_in_transformers(row: Tiny, gptqmodel: Any, tmp_path: Path):
    if unread("autoawq", row.family):
        pytest.skip("transformers can't load this family's AWQ files of anyone; docs/formats.md has what it says")
    path, ours = written(row, tmp_path)
    backend: Any = "torch_awq"  # the kernel that is not compiled when it is first used
    choice = transformers.AwqConfig(bits=4, group_size=16, backend=backend)
    model = load(path, quantization_config=choice)
    difference(row, "autoawq transformers float16 products", logits(model), ours)
    assert difference(row, "autoawq transformers", logits(with_float32_products(model, awq_weight)), ours) <= 1e-5


@every_family
def test_autoawq_in_gptqmodel(row: Tiny, gptqmodel: Any, tmp_path: Path):
    """Its own loader takes experts apart and knows GPT-2's Conv1D."""
    if row.family in OTHER_NAMES:
        pytest.skip("gptqmodel's loader does not find this family's tensors; docs/formats.md has which it looks for")
    path, ours = written(row, tmp_path)
    options: dict[str, Any] = {"backend": gptqmodel.BACKEND.AWQ_TORCH, "device": "cpu", "dtype": torch.float16}
    model = gptqmodel.GPTQModel.load(str(path), **options, attn_implementation="eager").model
    difference(row, "autoawq gptqmodel float16", logits(model), ours)
    assert difference(row, "autoawq gptqmodel", logits(with_float32_products(model, awq_weight)), ours) <= 1e-5


@pytest.fixture
def compressed_tensors() -> Any:
    return pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors (CONTRIBUTING.md)")


def _compressed(row: Tiny, tmp_path: Path, said: str, *options: str, **loaded: Any) -> None:
    few = ("--format", "compressed-tensors", "--scale-dtype", "float32")
    path, ours = written(row, tmp_path, *few, *options)
    assert difference(row, said, logits(load(path, **loaded)), ours) <= 1e-5


@pytest.mark.usefixtures("compressed_tensors")
@every_family
def test_compressed_tensors_in_transformers(row: Tiny, tmp_path: Path):
    if row.family in (*CONV1D, *OWN_LINEAR):
        pytest.skip("compressed modules have no weight, and this family's linears read it; docs/formats.md")
    _compressed(row, tmp_path, "compressed-tensors symmetric", "--symmetric")


@pytest.mark.usefixtures("compressed_tensors")
@every_family
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "symmetric"])
def test_compressed_tensors_made_dense_while_loading(row: Tiny, zeros: bool, tmp_path: Path):
    if row.family in CONV1D or (zeros and row.family in EXPERTS):
        pytest.skip("transformers can't load this; docs/formats.md has what it says")
    said = f"compressed-tensors {'zeros' if zeros else 'symmetric'} dequantized"
    dense = transformers.CompressedTensorsConfig(dequantize=True)
    _compressed(row, tmp_path, said, *(() if zeros else ("--symmetric",)), quantization_config=dense)
