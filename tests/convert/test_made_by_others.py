# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that other tools made, with the logits that they compute: `tests/fixtures/make_*.py` made them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax_convert.formats import open_checkpoint
from tests.tiny_models import logits_of, rounding

FIXTURES = Path(__file__).parent.parent / "fixtures"
FORMS = {
    "autoawq": ("autoawq", "int4 g32"),
    "gptq": ("gptq", "int4 g32 symmetric"),
    "gptq_v2": ("gptq", "int4 g32"),
    "llmcompressor_awq": ("compressed-tensors", "int4 g32"),
}


def difference(name: str, kept: str = "logits") -> tuple[float, float]:
    """Of our logits to those kept beside a checkpoint, relative to the largest; and what rounding may make of it."""
    found = open_checkpoint(FIXTURES / name)
    with np.load(FIXTURES / name / "logits.npz") as stored:
        theirs, tokens = stored[kept], stored["tokens"]
    ours = logits_of(found.config, jax.tree.map(jnp.asarray, found.params()), tokens)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max()), rounding(found.config)


@pytest.mark.parametrize("name", FORMS)
def test_the_format_is_known(name: str):
    found = open_checkpoint(FIXTURES / name)
    assert (found.format, found.stored_form("layers/1/mlp/down/kernel")) == FORMS[name]
    with np.load(FIXTURES / name / "logits.npz") as stored:
        assert {"torch", "transformers"} < set(json.loads(str(stored["versions"])))


@pytest.mark.parametrize("name", FORMS)
def test_their_logits_are_ours(name: str):
    """Both multiply in float32, so that rounding alone is between them."""
    off, allowed = difference(name)
    assert off <= allowed < 1e-3


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_float16_products_are_what_gptqmodel_differs_by(name: str):
    """Its own product rounds inputs, weights and outputs to float16: ours is as far off it as its own twin."""
    with np.load(FIXTURES / name / "logits.npz") as stored:
        own = np.abs(stored["logits_float16"] - stored["logits"]).max() / np.abs(stored["logits"]).max()
    off, _ = difference(name, "logits_float16")
    assert abs(off - own) <= 1e-5 and own > 1e-4
