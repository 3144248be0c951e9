# SPDX-License-Identifier: Apache-2.0
"""Calibration samples: token windows of one static shape, with a mask for what is padding."""

import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from awq_jax.texts import Encode, documents, encode_start, is_json_lines, read_text, refuse_file

__all__ = ["Samples", "check_vocabulary", "few_tokens", "from_documents", "from_stream", "read_calibration"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Tokens to calibrate on.

    Attributes:
      tokens: int32 ``[samples, seq_len]``, padded on the right with 0.
      mask: bool ``[samples, seq_len]``, False on padding.
      source: shown in reports.
      notes: what was shortened or missing, in words.

    Raises:
      ValueError: they are not as above, or all padding.
    """

    tokens: np.ndarray
    mask: np.ndarray
    source: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shapes = np.shape(self.tokens), np.shape(self.mask)
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or self.mask.dtype != bool:
            raise ValueError(
                f"calibration {self.source}: tokens {shapes[0]} and mask {shapes[1]} of {self.mask.dtype}; both must "
                "be [samples, seq_len], and the mask of booleans."
            )
        if not self.mask.any():  # nothing would be measured, and every layer rounded to nearest
            raise ValueError(
                f"calibration {self.source} is all padding: its mask is True for none of {self.mask.size} tokens. Set "
                "it where tokens count."
            )

    @property
    def count(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask.sum())

    @property
    def digest(self) -> str:
        """sha256 of tokens and mask."""
        return hashlib.sha256(self.tokens.tobytes() + self.mask.tobytes()).hexdigest()


def from_stream(ids: Sequence[int], *, samples: int, seq_len: int, source: str) -> Samples:
    """Cut one token stream into windows of ``seq_len``; the remainder of the stream is dropped.

    Raises:
      ValueError: the stream is shorter than one window.
    """
    available = len(ids) // seq_len
    if not available:
        raise ValueError(
            f"calibration text {source} has {len(ids)} tokens, fewer than one sample of seq_len={seq_len}. "
            f"Give more text, or set the sample length to at most {max(len(ids), 1)} (--seq-len)."
        )
    used = min(samples, available)
    tokens = np.asarray(ids[: used * seq_len], np.int32).reshape(used, seq_len)
    notes = () if used == samples else (f"{source} holds {used} samples of {seq_len} tokens, not {samples}",)
    notes += _copies(tokens.tolist(), source)
    return Samples(tokens=tokens, mask=np.ones(tokens.shape, bool), source=source, notes=notes)


def _copies(rows: Iterable[Sequence[int]], source: str) -> tuple[str, ...]:
    """A note where samples are the same as others: they add nothing to what is measured."""
    every = [tuple(row) for row in rows]
    copies = len(every) - len(set(every))
    return (f"{copies} of the {len(every)} samples of {source} are copies of others",) if copies else ()


def from_documents(documents: Iterable[Sequence[int]], *, samples: int, seq_len: int, source: str) -> Samples:
    """One sample per document: cut at ``seq_len``, shorter ones are padded and masked.

    Raises:
      ValueError: no document holds a token.
    """
    kept = list(itertools.islice((ids for ids in documents if len(ids)), samples))  # no more are read than are used
    if not kept:
        raise ValueError(f"calibration file {source} holds no tokens; give lines that are not empty (--calib).")
    cut = sum(len(ids) > seq_len for ids in kept)
    kept = [ids[:seq_len] for ids in kept]
    width = max(map(len, kept))
    tokens = np.zeros((len(kept), width), np.int32)
    mask = np.zeros((len(kept), width), bool)
    for row, ids in enumerate(kept):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    notes = [f"{cut} of {len(kept)} documents were cut at {seq_len} tokens"] if cut else []
    notes += [f"{source} holds {len(kept)} documents, not {samples}"] if len(kept) < samples else []
    return Samples(tokens=tokens, mask=mask, source=source, notes=(*notes, *_copies(kept, source)))


def read_calibration(path: pathlib.Path, encode: Encode | None, *, samples: int, seq_len: int) -> Samples:
    """Read a UTF-8 text file as one stream, or a ``.jsonl`` file as documents.

    Args:
      path: text, or JSON lines with ``{"text": ...}`` or pre-tokenized ``{"input_ids": [...]}``.
      encode: text to token ids; None if there is no tokenizer.
      samples: how many samples at most.
      seq_len: tokens of a sample at most.

    Raises:
      ValueError: not UTF-8, empty, too short, or a malformed line, named by its number.
      FileNotFoundError: no such file.
    """
    what = "calibration file"
    refuse_file(path, what, "--calib")
    if is_json_lines(path):
        lines = documents(path, encode, what)
        return from_documents(lines, samples=samples, seq_len=seq_len, source=path.name)
    text = read_text(path, what)
    if not text.strip():
        raise ValueError(f"{what} {path} is empty; give text (--calib).")
    ids = encode_start(text, encode, str(path), samples * seq_len)
    return from_stream(ids, samples=samples, seq_len=seq_len, source=path.name)


def check_vocabulary(samples: Samples, vocab_size: int) -> None:
    """Refuse ids that the embedding does not have; a device gather would clamp them silently.

    Raises:
      ValueError: naming the first offending id.
    """
    bad = samples.tokens[samples.mask & ((samples.tokens < 0) | (samples.tokens >= vocab_size))]
    if bad.size:
        raise ValueError(
            f"calibration {samples.source} has token id {int(bad[0])}, but the embedding has {vocab_size} rows. "
            "The tokenizer does not belong to this checkpoint: encode the text with the one that came with it."
        )


def few_tokens(samples: Samples, width: int) -> tuple[str, ...]:
    """A note where fewer tokens than channels leave most directions of the widest input unseen."""
    if samples.count >= width:
        return ()
    tokens = "1 token" if samples.count == 1 else f"{samples.count} tokens"
    return (
        f"{samples.source} holds {tokens} for inputs of up to {width} channels; what is searched fits these and little "
        f"else. Give at least {16 * width} (--calib, --samples, --seq-len)",
    )
