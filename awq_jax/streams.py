# SPDX-License-Identifier: Apache-2.0
"""The calibration set on its way through the layers: all of it on the device, or chunk by chunk from where it waits."""

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax._plan import LayerPlan
from awq_jax.hidden_states import OnDisk, OnHost
from awq_jax.layer_step import LayerOutcome, no_statistics, observe_chunk, quantize_and_measure, quantize_observed
from awq_jax.models.config import DecoderConfig
from awq_jax.models.functional import embed
from awq_jax.sharding import Layout

__all__ = ["MEASURED", "InChunks", "Streams", "Whole", "float32"]

MEASURED = 4096  # tokens that a finished layer is measured again on, against round to nearest

_POLL_S = 0.001


@jax.jit
def float32(params: Any) -> Any:
    """Weights cross to the device as they are stored, and grow there."""
    return jax.tree.map(lambda array: array.astype(jnp.float32), params)


@functools.partial(jax.jit, static_argnums=0)
def _embedded(config: DecoderConfig, stem: Any, tokens: jax.Array) -> jax.Array:
    return embed(config, float32(stem), tokens)


def _awaited(outcome: LayerOutcome) -> LayerOutcome:
    """What the device made, waited for in Python, where signals are heard."""
    while not all(array.is_ready() for array in jax.tree.leaves(outcome)):
        time.sleep(_POLL_S)
    return outcome


class Whole:
    """Hidden states on the device; with ``propagate`` a second stream, which sees the layers as they are written.

    Args:
      batches: tokens and mask ``[chunks, b, t]``.
      config: of the model.
      layout: where arrays lie.
      propagate: keep the second stream.
    """

    def __init__(
        self, batches: tuple[np.ndarray, np.ndarray], config: DecoderConfig, layout: Layout, *, propagate: bool
    ) -> None:
        self._tokens, self._mask = map(layout.activations, batches)
        self._config, self._layout, self._propagate = config, layout, propagate
        self._shape = (*batches[0].shape, config.hidden_size)
        self._measured, self._counted = _measured(batches[0]), int(batches[1].sum())
        self._hidden = self._stream = None

    def begin(self, stem: Any) -> None:
        """Embed the tokens; the two streams part at the first quantized layer."""
        embedding = self._layout.whole({"embed": stem["embed"]})
        self._hidden = self._layout.hidden(_embedded(self._config, embedding, self._tokens))
        self._stream = jnp.copy(self._hidden) if self._propagate else None

    def resume(self, kept: Mapping[str, np.ndarray]) -> None:
        """Go on from a `state`; of several processes the first has it."""
        take = lambda name: self._layout.from_first(kept.get(name), self._shape)
        self._hidden, self._stream = take("hidden"), take("stream") if self._propagate else None

    def through(self, params: Any, config: DecoderConfig, plan: LayerPlan) -> LayerOutcome:
        """Quantize the next layer; the outcome on the host, without hidden states."""
        assert self._hidden is not None
        outcome = _awaited(
            quantize_and_measure(
                params,
                self._hidden,
                self._mask,
                self._stream,
                config=config,
                plan=plan,
                measured=self._measured,
                tokens=self._counted,
                placing=self._layout.placing,
            )
        )
        self._hidden = self._layout.hidden(outcome.hidden)
        self._stream = None if outcome.stream is None else self._layout.hidden(outcome.stream)
        return self._layout.fetch(dataclasses.replace(outcome, hidden=None, stream=None))

    def state(self) -> dict[str, np.ndarray]:
        """What the next layer starts from, on the host."""
        arrays = {"hidden": self._hidden, "stream": self._stream}
        return {name: self._layout.fetch_chunks(array) for name, array in arrays.items() if array is not None}


class InChunks:
    """Hidden states that wait outside of the device, which holds two chunks and those that layers are measured on.

    Args:
      waiting: where.
      batches, config, layout: as for `Whole`.
    """

    def __init__(
        self,
        waiting: OnHost | OnDisk,
        batches: tuple[np.ndarray, np.ndarray],
        config: DecoderConfig,
        layout: Layout,
    ) -> None:
        self._waiting, self._config, self._layout = waiting, config, layout
        self._tokens, self._mask = ([layout.activations(part[None]) for part in array] for array in batches)
        self._measured, self._counted = _measured(batches[0]), int(batches[1].sum())

    def begin(self, stem: Any) -> None:
        """Embed the tokens."""
        embedding = self._layout.whole({"embed": stem["embed"]})
        for index, tokens in enumerate(self._tokens):
            self._waiting[index] = np.asarray(_embedded(self._config, embedding, tokens))[0]

    def resume(self, kept: Mapping[str, np.ndarray]) -> None:
        """Go on from a `state`."""
        for index, chunk in enumerate(kept["hidden"]):
            self._waiting[index] = chunk

    def through(self, params: Any, config: DecoderConfig, plan: LayerPlan) -> LayerOutcome:
        """Quantize the next layer, as `Whole` does."""
        step: dict[str, Any] = {"config": config, "plan": plan, "placing": self._layout.placing}
        hidden, inputs, outputs = self._chunk(0), [], []
        total = no_statistics(params, hidden, self._mask[0], config, plan, self._counted)
        for index, mask in enumerate(self._mask):
            if index < self._measured:
                inputs.append(self._chunk(index))
            total, out = observe_chunk(params, total, hidden, mask, tokens=self._counted, **step)
            if index + 1 < len(self._waiting):
                hidden = self._chunk(index + 1)  # on its way while this one is worked on
            if index < self._measured:
                outputs.append(out)
            self._waiting[index] = np.asarray(out)[0]
        sample = [jnp.concatenate(parts) for parts in (inputs, outputs, self._mask[: self._measured])]
        del inputs, outputs  # they are in the sample: the device need not hold them twice
        return self._layout.fetch(_awaited(quantize_observed(params, total, *sample, **step)))

    def _chunk(self, index: int) -> jax.Array:
        return self._layout.hidden(self._waiting[index][None])

    def state(self) -> dict[str, np.ndarray]:
        """What the next layer starts from."""
        return {"hidden": self._waiting.whole()}


Streams = Whole | InChunks


def _measured(tokens: np.ndarray) -> int:
    """Chunks that make up about `MEASURED` tokens."""
    return max(1, round(MEASURED / tokens[0].size))
