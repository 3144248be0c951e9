# SPDX-License-Identifier: Apache-2.0
"""The vocabulary that a family's table is written in. A family is data: to add a model is to add a table.

Paths are those of `awq_jax.models.Decoder`'s parameters, with ``*`` for the layer index.
"""

import dataclasses
from typing import Any, Literal

__all__ = ["Family", "Group", "Key", "Linear", "Norm"]


@dataclasses.dataclass(frozen=True)
class Norm:
    """A normalisation whose gain absorbs ``1/t``: ``gain/t``, ``bias/t``.

    Attributes:
      path: of the module, for example ``layers/*/input_norm``.
      offset: 1.0 for ``(1 + w)`` norms, where ``w' = (1 + w)/t - 1``.
    """

    path: str
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear whose output columns and bias absorb ``1/t``.

    Attributes:
      path: of the module, for example ``layers/*/mlp/up``.
      tie: "gqa" where each output channel is read by several query heads, so the scale is one per kv channel.
    """

    path: str
    tie: Literal["gqa"] | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Linears that read one tensor and therefore share one scale.

    Attributes:
      producer: what absorbs the scale; None leaves the group at identity, and `reason` must say why.
      sinks: module paths of the quantized linears.
      float_sinks: consumers that stay in floating point (a router) and are multiplied by t too.
      per_expert: producer and sinks are stacked by expert, and each expert has a scale of its own.
      output: module path whose output the "block" objective compares; the linears' own output if None.
      reason: why there is no producer.
    """

    producer: Norm | Linear | None
    sinks: tuple[str, ...]
    float_sinks: tuple[str, ...] = ()
    per_expert: bool = False
    output: str | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Key:
    """One checkpoint tensor name and where it goes.

    Attributes:
      theirs: the Hugging Face name, ``*`` for the layer index; a second ``*`` is the index of an expert, whose tensors
        are stacked on a leading axis of ours.
      ours: the parameter path; empty for a tensor that is known and has no use. Several paths are parts of one tensor,
        side by side along its outputs.
      transpose: True where theirs is ``[out, in]`` and ours ``[in, out]``.
      optional: the tensor may be absent.
      layout: of several paths: "concat" is one after the other; "grouped" is q, k and v interleaved, for each kv head
        first its query heads, then its k and its v.
    """

    theirs: str
    ours: str | tuple[str, ...]
    transpose: bool = False
    optional: bool = False
    layout: Literal["concat", "grouped"] = "concat"

    @property
    def paths(self) -> tuple[str, ...]:
        """Ours, one or several."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
      name: shown to users.
      architectures: the Hugging Face ``architectures`` entries it serves.
      groups: what shares a scale and what absorbs it.
      keys: every tensor of a checkpoint; one that matches no row is an error.
      prefix: what the names begin with, but for the head's; checkpoints of the bare model lack it in all of them.
      when: (attribute, value) pairs of config.json that tell this table from others of the same architecture; an
        attribute that is left out has the value in `defaults`.
      options: fixed `DecoderConfig` fields of this family, for example ``(("qkv_bias", True),)``.
      config: (Hugging Face attribute, DecoderConfig field) pairs read from config.json.
      defaults: (Hugging Face attribute, value) pairs: what a config.json that leaves it out means, where it is not what
        `DecoderConfig` has.
      multiples: (field, factor, other field): what a field is where config.json leaves it out.
      full_every: each n-th layer attends over everything and the others over the window, where config.json has a window
        and no ``layer_types``; 0 where layers are alike.
      accepts: (attribute, values) pairs: attributes that are understood with these values alone.
      ignores: attributes without effect on the forward pass.
      no_clip: module paths whose weights are never clipped.
    """

    name: str
    architectures: tuple[str, ...]
    groups: tuple[Group, ...]
    keys: tuple[Key, ...]
    prefix: str = ""
    when: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    config: tuple[tuple[str, str], ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()
    multiples: tuple[tuple[str, int, str], ...] = ()
    full_every: int = 0
    accepts: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    ignores: tuple[str, ...] = ()
    no_clip: tuple[str, ...] = ()
