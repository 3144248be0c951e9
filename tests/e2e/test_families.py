# SPDX-License-Identifier: Apache-2.0
"""Every family from the command line: quantized to AutoAWQ's files, read back, and read by transformers when dense."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from awq_jax.cli import main
from awq_jax.families import FAMILIES
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.readers import unread
from tests.e2e.conftest import save_text_tools
from tests.models.families import TINY, Tiny
from tests.tiny_models import Oracle, logits_of, save_oracle, some_tokens

# Widths that groups of 16 divide and AutoAWQ's words of eight outputs fit.
WIDE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "n_embd": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 96,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "n_positions": 128,
}
ROWS = [next(row for row in TINY if row.family == family) for family in FAMILIES]
QUICK = ("phi3", "mixtral")  # parts in one tensor, and experts; the others take a minute together


def widened(row: Tiny) -> Tiny:
    wide = {name: WIDE.get(name, value) for name, value in row.arguments.items()}
    return Tiny(row.family, row.variant, wide, {}, row.model_type)


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.id, marks=() if row.family in QUICK else pytest.mark.slow) for row in ROWS]
)
def test_quantized_read_back_and_read_by_transformers(row: Tiny, tmp_path: Path):
    source = save_oracle(widened(row), tmp_path / "source")
    save_text_tools(source.path)
    text = ["--calib", str(source.path / "text.txt"), "--samples", "8", "--seq-len", "48"]
    assert main(["quantize", str(source.path), str(tmp_path / "out"), "--group-size", "16", "--quiet", *text]) == 0
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "dense"), "--to", "dense", "--quiet"]) == 0

    said = json.loads((tmp_path / "out" / "awq_jax_report.json").read_text())["warnings"]
    assert set(unread("autoawq", row.family)) == {line for line in said if "transformers" in line}
    written = HFCheckpoint.open(tmp_path / "out")
    assert (written.format, written.family.name) == ("autoawq", row.family)
    dense = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = some_tokens(320)
    theirs = Oracle(row, dense, tmp_path).logits(tokens)
    ours = logits_of(written.config, jax.tree.map(jnp.asarray, written.params()), tokens)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    # The rounding is visible, so that the comparison above means something.
    assert np.abs(ours - source.logits(tokens)).max() > 1e-3 * np.abs(theirs).max()

    report = json.loads((tmp_path / "out" / "awq_jax_report.json").read_text())
    reasons = {w["path"]: w["reason"] for layer in report["layers"] for w in layer["linears"]}
    for group in FAMILIES[row.family].groups:
        if group.producer is None:
            assert {reasons[sink.replace("*", "0")] for sink in group.sinks} == {group.reason}
