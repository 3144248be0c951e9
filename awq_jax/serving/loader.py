# SPDX-License-Identifier: Apache-2.0
"""Run an exported model. This file needs jax and numpy alone: `awq-jax export` puts a copy beside the artefacts.

from loader import Exported
model = Exported("OUT")
model.generate([[1, 2, 3]], max_new_tokens=16)
"""

import json
from pathlib import Path

import jax
import jax.export
import numpy as np

__all__ = ["VERSION", "Exported"]

VERSION = 1
NOTHING = -1


class Exported:
    """The artefacts of one directory, and slots for as many sequences as they were made for.

    Args:
      directory: what ``awq-jax export`` wrote.

    Raises:
      ValueError: another version wrote it, or it is for another platform than the one at hand.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        self.manifest = m = json.loads((directory / "manifest.json").read_text())
        if m.get("version") != VERSION:
            raise ValueError(f"{directory} has version {m.get('version')!r}; this loader reads version {VERSION}.")
        if jax.default_backend() not in {"cuda": ("gpu",)}.get(m["platform"], (m["platform"],)):
            raise ValueError(f"{directory} is for {m['platform']}; the devices here are {jax.default_backend()}.")
        held = np.memmap(directory / "weights.bin", np.uint8, "r")
        self.params = [jax.device_put(_array(held, leaf)) for leaf in m["params"]]
        self.batch, self.max_len, self.steps = m["batch"], m["max_len"], m["steps"]
        count = len(m["params"])
        run = lambda name, donated: jax.jit(
            jax.export.deserialize(bytearray((directory / name).read_bytes())).call, donate_argnums=donated
        )
        states = tuple(range(count, count + len(m["slots"])))
        self.decode = run(m["decode"], states)
        self.prefill = {int(bucket): run(name, states) for bucket, name in m["prefill"].items()}
        self.slots = self.empty()

    def empty(self) -> list[jax.Array]:
        """Idle slots."""
        make = lambda leaf: jax.device_put(np.full(leaf["shape"], leaf["value"], _dtype(leaf["dtype"])))
        return [make(leaf) for leaf in self.manifest["slots"]]

    def begin(
        self,
        row: int,
        prompt: list[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_tokens: tuple[int, ...] = (),
    ) -> int:
        """Put a prompt into a row; its first token.

        Raises:
          ValueError: there is no such row, a token that the model does not know, or more than a slot has room for.
        """
        length, most = len(prompt), self.manifest["stops"]
        if not 0 <= row < self.batch:  # XLA would clamp it, and write over the last row
            raise ValueError(f"row {row}; the artefacts have rows 0 to {self.batch - 1}.")
        odd = [token for token in prompt if not 0 <= token < self.manifest["vocab_size"]]
        if odd:
            raise ValueError(f"token {odd[0]} is outside the vocabulary of {self.manifest['vocab_size']}.")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        if length < 1 or length + max_new_tokens > self.max_len or len(stop_tokens) > most:
            raise ValueError(
                f"{length} tokens and {max_new_tokens} more, with {len(stop_tokens)} stop tokens: a slot has "
                f"{self.max_len} positions, and room for {most} stop tokens."
            )
        fits = [bucket for bucket in sorted(self.prefill) if bucket >= length]
        if not fits:
            raise ValueError(f"a prompt of {length} tokens; the largest bucket has {max(self.prefill)}.")
        tokens = np.zeros((1, fits[0]), np.int32)
        tokens[0, :length] = prompt
        one = lambda value, kind: np.array([value], kind)
        stops = np.full((1, most), NOTHING, np.int32)
        stops[0, : len(stop_tokens)] = stop_tokens
        given = [
            tokens,
            one(length, np.int32),
            one(row, np.int32),
            one(max_new_tokens, np.int32),
            stops,
            one(temperature, np.float32),
            one(top_k, np.int32),
            one(top_p, np.float32),
            one(seed, np.uint32),
        ]
        *self.slots, first = self.prefill[fits[0]](*self.params, *self.slots, *given)
        return int(np.asarray(first)[0])

    def advance(self) -> np.ndarray:
        """Up to ``steps`` tokens more for every row, int32 ``[batch, steps]``; -1 where a row has ended."""
        *self.slots, drawn = self.decode(*self.params, *self.slots)
        return np.asarray(drawn)

    def generate(self, prompts: list[list[int]], *, max_new_tokens: int, **options: object) -> list[list[int]]:
        """Continue at most ``batch`` prompts to their ends; ``options`` as in `begin`."""
        if len(prompts) > self.batch:
            raise ValueError(f"{len(prompts)} prompts; the artefacts are for {self.batch} at a time.")
        self.slots = self.empty()
        out = [
            [self.begin(row, prompt, max_new_tokens=max_new_tokens, **options)]  # type: ignore[arg-type]
            for row, prompt in enumerate(prompts)
        ]
        while (drawn := self.advance()).max() != NOTHING:
            for tokens, new in zip(out, drawn.tolist(), strict=False):
                tokens += [token for token in new if token != NOTHING]
        return out


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(jax.numpy, name))  # bfloat16 too


def _array(held: np.ndarray, leaf: dict) -> np.ndarray:
    part = held[leaf["offset"] : leaf["offset"] + leaf["nbytes"]]
    return np.asarray(part).view(_dtype(leaf["dtype"])).reshape(leaf["shape"])
