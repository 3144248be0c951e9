# SPDX-License-Identifier: Apache-2.0
"""Text to ids by the checkpoint's own ``tokenizer.json``, and by nothing else.

Some versions of transformers choose a tokenizer class by model type and then split the same text otherwise than the
file says (seen between 4.57 and 5.x). A scale calibrated on other ids than the model is served with is worth less.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer

from awq_jax._files import read_text

__all__ = ["Tokenizer"]


class Tokenizer:
    """Encodes and decodes as ``tokenizer.json`` says; adds no special tokens unless asked."""

    def __init__(self, tokenizer: _Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a ``tokenizer.json``.

        Raises:
          FileNotFoundError: there is none; pre-tokenized ids need none.
          ValueError: the file is damaged, or a link out of its directory.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, so text cannot be encoded. Give token ids instead, or write the file with "
                "transformers: `AutoTokenizer.from_pretrained(src).save_pretrained(dst)`."
            )
        text = read_text(path.parent, path.name)
        try:
            return cls(_Tokenizer.from_str(text))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a valid tokenizer ({error}); download it again.") from error

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text.

        Args:
          text: any length.
          special: add what the tokenizer adds around a text, such as a token for its beginning.

        Raises:
          ValueError: half of a surrogate pair: JSON escapes and a shell's arguments can hold it, UTF-8 can't.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=special).ids
        except TypeError:
            at = next((i for i, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), 0)
            found = text[at : at + 1]
            raise ValueError(
                f"character {at} is {found!r}, half of a surrogate pair, not a letter; remove it."
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)
