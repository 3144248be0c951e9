# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Made

from awq_jax_convert.tokenizer import Tokenizer


@pytest.fixture
def file(tmp_path):
    """A tokenizer of bytes, with a token that is put at the beginning of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Made(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<s>")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("text", ["", "plain", " two  spaces ", "Zürich, 東京 🙂\n\ttab"])
def test_text_survives(file, text):
    tokenizer = Tokenizer.from_file(file)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text


def test_special_tokens_only_where_asked(file):
    tokenizer = Tokenizer.from_file(file)
    plain = tokenizer.encode("text")
    assert 256 not in plain
    assert tokenizer.encode("text", special=True) == [256, *plain]
    assert tokenizer.decode([256, *plain]) == "text"


def test_the_vocabulary_reaches_to_the_largest_id(file):
    assert Tokenizer.from_file(file).vocab_size == 257


def test_missing(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer.json is missing, so text cannot be encoded\. Give token ids"
    ):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("damage", ["empty", "cut", "not utf-8", "not json", "another json"])
def test_damaged(file, damage):
    whole = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "cut": whole[: len(whole) // 2],
            "not utf-8": b"\xff" + whole,
            "not json": b"tokenizer",
            "another json": json.dumps({"vocab": {"a": 0}}).encode(),
        }[damage]
    )
    with pytest.raises(ValueError, match=r"tokenizer.json is not (a valid tokenizer|UTF-8) .*; download it again"):
        Tokenizer.from_file(file)


def test_a_link_out_of_the_directory_is_not_read(file, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").symlink_to(file)
    with pytest.raises(ValueError, match=r"tokenizer.json is a link to .*, outside its directory; it is not followed"):
        Tokenizer.from_file(tmp_path / "model" / "tokenizer.json")
