# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's PyTorch models are the definition of every family."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from awq_jax._tree import leaves
from awq_jax.models import Decoder, params_of
from awq_jax_convert.hf import HFCheckpoint
from tests.models.families import TINY
from tests.tiny_models import logits_of, rounding, save_oracle, some_tokens


def assert_close(got, wanted, tolerance):
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()


def test_logits_are_those_of_pytorch(oracle, checkpoint):
    tokens = some_tokens(checkpoint.config.vocab_size)
    got = logits_of(checkpoint.config, checkpoint.params(), tokens)
    assert_close(got, oracle.logits(tokens), rounding(checkpoint.config))


def test_parameters_go_into_the_decoder_and_come_out_unchanged(checkpoint):
    params = checkpoint.params()
    model = Decoder.from_params(checkpoint.config, params)
    out = dict(leaves(params_of(model)))
    assert out.keys() == set(checkpoint.paths())
    for path, leaf in leaves(params):
        np.testing.assert_array_equal(out[path], leaf)


@pytest.mark.parametrize("row", TINY[:1] + TINY[-1:], ids=lambda row: row.id)
def test_shards_read_as_one_file(row, tmp_path):
    one = save_oracle(row, tmp_path / "one")
    save_oracle(row, tmp_path / "many", max_shard_size="12KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    many = dict(leaves(HFCheckpoint.open(tmp_path / "many").params()))
    whole = dict(leaves(HFCheckpoint.open(one.path).params()))
    assert many.keys() == whole.keys()
    for path, leaf in whole.items():
        np.testing.assert_array_equal(many[path], leaf)


def test_bfloat16_widens_without_loss(tmp_path):
    saved = save_oracle(TINY[0], tmp_path / "x", dtype=torch.bfloat16)
    wide = transformers.AutoModelForCausalLM.from_pretrained(saved.path, dtype=torch.float32)
    checkpoint = HFCheckpoint.open(saved.path)
    assert {leaf.dtype for _, leaf in leaves(checkpoint.params(None))} == {np.dtype(ml_dtypes.bfloat16)}
    tokens = some_tokens(checkpoint.config.vocab_size)
    got = logits_of(checkpoint.config, checkpoint.params(), tokens)
    assert_close(got, dataclasses.replace(saved, model=wide).logits(tokens), rounding(checkpoint.config))


MECHANISMS = {
    "rope_scaling": ("llama-shared-heads-llama3-rope", None),
    "rope_theta": ("qwen2-untied", 10000.0),
    "sliding_window": ("mistral-window", 6),
    "norm_eps": ("qwen3-wide-heads", 1e-2),
    "norm_offset": ("gemma-shared-heads", 0.0),
    "scale_embedding": ("gemma-shared-heads", False),
    "activation": ("gemma-shared-heads", "silu"),
    "attn_softcap": ("gemma2-caps-window", None),
    "logit_softcap": ("gemma2-caps-window", None),
    "query_scalar": ("gemma2-caps-window", None),
    "sliding_layers": ("gemma2-caps-window", (False, True)),
    "local_rope_theta": ("gemma3_text-two-rotations", None),
    "rotary_fraction": ("phi3-half-rotation-window", 1.0),
    "parallel": ("gpt_neox-side-by-side", False),
    "normalize_experts": ("qwen2_moe-shared-expert", True),
    "experts_per_token": ("mixtral-four-experts", 1),
    "positions": ("bloom-four-heads", "rotary"),
}


@pytest.mark.parametrize("field", MECHANISMS)
def test_the_tiny_models_would_notice_a_lost_mechanism(field, tmp_path):
    """The comparison above is only worth something where each mechanism moves the logits beyond its tolerance."""
    name, other = MECHANISMS[field]
    (row,) = (row for row in TINY if row.id == name)
    checkpoint = HFCheckpoint.open(save_oracle(row, tmp_path / "x").path)
    config, params = checkpoint.config, checkpoint.params()
    tokens = some_tokens(config.vocab_size)
    right = logits_of(config, params, tokens)
    wrong = logits_of(dataclasses.replace(config, **{field: other}), params, tokens)
    assert np.abs(wrong - right).max() > 10 * rounding(config) * np.abs(right).max()
