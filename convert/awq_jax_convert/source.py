# SPDX-License-Identifier: Apache-2.0
"""What every kind of checkpoint directory offers: parameters by path, read one layer at a time."""

import abc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax.families import Family
from awq_jax.models import DecoderConfig
from awq_jax_convert.hf_config import HFConfig
from awq_jax_convert.scheme import Scheme, form

__all__ = ["Checkpoint"]


class Checkpoint(abc.ABC):
    """A checkpoint directory; opening it reads and checks headers, no tensor.

    Attributes:
      path: of the directory.
      hf: its config.json, understood.
      nbytes: of all its tensors.
      format: "dense", or the name of the quantized format.
    """

    path: Path
    hf: HFConfig
    nbytes: int
    format: str

    @property
    def family(self) -> Family:
        """The table of its model family."""
        return self.hf.family

    @property
    def config(self) -> DecoderConfig:
        """Of our decoder."""
        return self.hf.decoder

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return self.config.num_layers

    @property
    def outside(self) -> tuple[tuple[str, str], ...]:
        """(module path, why) of the weights outside the layers: they are never quantized."""
        if self.config.tie_embeddings:
            return (("embed", "the embedding is the output head too"),)
        return (
            ("embed", "an embedding is looked up, not multiplied"),
            ("lm_head", "every token's logits depend on it"),
        )

    @abc.abstractmethod
    def paths(self) -> list[str]:
        """All parameter paths, sorted, for example ``layers/0/attn/q/kernel``."""

    @abc.abstractmethod
    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of a parameter; of a quantized one, the dense weight's."""

    @abc.abstractmethod
    def stored_nbytes(self, path: str) -> int:
        """The bytes that a parameter takes, as kept."""

    @abc.abstractmethod
    def stored_dtype(self, path: str) -> np.dtype:
        """The dtype that a dense parameter is kept in."""

    @abc.abstractmethod
    def scheme(self, path: str) -> Scheme | None:
        """The number format of a quantized weight, None for a dense parameter."""

    def is_quantized(self, path: str) -> bool:
        """Whether a parameter is a quantized weight."""
        return self.scheme(path) is not None

    def stored_form(self, path: str) -> str:
        """How a parameter is kept, for people: ``bfloat16``, or ``int4 g128``."""
        kept = self.scheme(path)
        if kept is None:
            return str(self.stored_dtype(path))
        return form(kept.bits, kept.group_size, symmetric=kept.symmetric, activations=kept.activations)

    @abc.abstractmethod
    def layer(self, index: int, dtype: Any = np.float32) -> dict[str, Any]:
        """The parameters of one layer, ``{"attn": {"q": {"kernel": [in, out], ...}, ...}, ...}``.

        Args:
          index: 0 .. num_layers - 1.
          dtype: of dense arrays; None keeps each as stored, a transposed one as a view. Quantized kernels are `QTensor`
            with numpy leaves.

        Raises:
          IndexError: there is no such layer.
          ValueError: a weight is not finite.
          OSError: a file changed since it was opened.
        """

    @abc.abstractmethod
    def stem(self, dtype: Any = np.float32) -> dict[str, Any]:
        """Everything outside the layers: embedding, final norm, and the output head unless it is tied.

        Args:
          dtype: as in `layer`.

        Raises:
          ValueError: a weight is not finite, or a tied head differs from the embedding.
          OSError: a file changed since it was opened.
        """

    def params(self, dtype: Any = np.float32) -> dict[str, Any]:
        """All parameters: `stem`, and under ``layers`` each layer by its index as text."""
        layers = {str(index): self.layer(index, dtype) for index in range(self.num_layers)}
        return {**self.stem(dtype), "layers": layers}

    def _refuse_index(self, index: int) -> None:
        if not 0 <= index < self.num_layers:
            raise IndexError(f"layer {index} of {self.path}: it has layers 0 to {self.num_layers - 1}.")

    def _refuse_shapes(self, wrong: Iterable[str]) -> None:
        wrong = list(wrong)
        if wrong:
            more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(
                f"tensors of {self.path} do not fit its config.json; one of them is of another model.\n  "
                + "\n  ".join(wrong[:5])
                + more
            )


def cast(node: Any, dtype: Any) -> Any:
    """Dense leaves of a nested dict as ``dtype``; None and `QTensor` leave them as they are."""
    if isinstance(node, dict):
        return {key: cast(value, dtype) for key, value in node.items()}
    return node if dtype is None or isinstance(node, QTensor) else np.asarray(node).astype(dtype)
