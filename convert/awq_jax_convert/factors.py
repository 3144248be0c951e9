# SPDX-License-Identifier: Apache-2.0
"""Factors that a checkpoint multiplies a linear's inputs by at run time, moved into what makes these inputs.

``y = (x * f) w``. Where every reader of x has the same factors, the producer of x takes them: a norm's gain, or the
scales and the bias of a linear, whose codes stay as they are. Where nothing can, the weight becomes the float32 values
``diag(f) w``. Both compute what the checkpoint does, in float32.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax._tie import Tie
from awq_jax._tree import get, put
from awq_jax.families import Group, Linear, Norm
from awq_jax_convert.stored import dequantized

__all__ = ["FACTORS", "apply", "producers"]

FACTORS = "pre_quant_scale"
"""The last name component of such factors, ModelOpt's."""


def _in_layer(path: str) -> str:
    return path.removeprefix("layers/*/")


def producers(groups: Iterable[Group], modules: Iterable[str]) -> set[str]:
    """Module paths in a layer that may take factors which these modules have."""
    having = set(modules)
    return {
        _in_layer(group.producer.path)
        for group in groups
        if group.producer is not None and having & set(map(_in_layer, group.sinks))
    }


def apply(
    groups: Sequence[Group], tree: Mapping[str, Any], factors: Mapping[str, np.ndarray], tie: Tie
) -> dict[str, Any]:
    """One layer's parameters with the factors in them.

    Args:
      groups: of the family's table.
      tree: of the layer, on the host; what changes becomes float32.
      factors: ``[*e, k]`` by module path in the layer; positive.
      tie: how kv channels spread over what o reads.

    Returns:
      A new tree; it computes without factors what the old one computed with them.
    """
    out, left = dict(tree), dict(factors)
    for group in groups:
        readers = [_in_layer(path) for path in (*group.sinks, *group.float_sinks)]
        given = [left.get(path) for path in readers]
        first = given[0]
        if group.producer is None or first is None:
            continue
        if not all(each is not None and np.array_equal(each, first) for each in given):
            continue
        taken = _unspread(first, tie) if isinstance(group.producer, Linear) and group.producer.tie else first
        if taken is None:
            continue
        path = _in_layer(group.producer.path)
        out = put(out, path, _multiplied(get(out, path), group.producer, taken.astype(np.float32)))
        for reader in readers:
            del left[reader]
    for path, factor in left.items():
        kernel = _dense(get(out, f"{path}/kernel")) * factor.astype(np.float32)[..., :, None]
        out = put(out, f"{path}/kernel", kernel)
    return out


def _unspread(wide: np.ndarray, tie: Tie) -> np.ndarray | None:
    """The factors of kv channels from those of o's inputs; None where query heads that share one differ."""
    copies = wide.reshape(tie.kv_heads, tie.repeats, -1)
    return copies[:, 0].reshape(-1) if (copies == copies[:, :1]).all() else None


def _dense(kernel: Any) -> np.ndarray:
    return dequantized(kernel) if isinstance(kernel, QTensor) else np.asarray(kernel).astype(np.float32)


def _multiplied(module: Mapping[str, Any], producer: Norm | Linear, by: np.ndarray) -> dict[str, Any]:
    """A producer whose outputs are multiplied, channel by channel."""
    made = dict(module)
    wide = lambda name: np.asarray(module[name]).astype(np.float32)
    if isinstance(producer, Norm):
        made["scale"] = (producer.offset + wide("scale")) * by - producer.offset
    elif isinstance(module["kernel"], QTensor):
        kernel = module["kernel"]
        made["kernel"] = dataclasses.replace(kernel, scale=kernel.scale.astype(np.float32) * by[..., None, :])
    else:
        made["kernel"] = wide("kernel") * by[..., None, :]
    if "bias" in module:
        made["bias"] = wide("bias") * by
    return made
