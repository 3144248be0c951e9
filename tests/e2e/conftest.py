# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.models.families import TINY, Tiny
from tests.tiny_models import Oracle, save_oracle

# Widths that groups of 32 divide and AutoAWQ's words of eight outputs fit; three layers: one lies in the middle.
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 60


def save_text_tools(directory: Path) -> None:
    """A byte-level tokenizer, generation settings and a text, beside the weights."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<end>", "eos_token": "<end>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")


def make_source(row: Tiny, path: Path, **options: object) -> Oracle:
    """A tiny checkpoint that can be quantized from text."""
    wide = Tiny(row.family, row.variant, {**row.hf, **SIZES})
    made = save_oracle(wide, path, **options)  # pyright: ignore[reportArgumentType]
    save_text_tools(path)
    return made


@pytest.fixture(scope="session", params=[TINY[0], TINY[3], TINY[5], TINY[7]], ids=lambda row: row.family)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """One model of each family, bfloat16 weights."""
    return make_source(request.param, tmp_path_factory.mktemp(request.param.family), dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A llama that tests must not change."""
    return make_source(TINY[0], tmp_path_factory.mktemp("llama"))


@pytest.fixture
def damaged(llama: Oracle, tmp_path: Path) -> Path:
    """A copy of the llama's directory, to be damaged."""
    return Path(shutil.copytree(llama.path, tmp_path / "damaged"))
