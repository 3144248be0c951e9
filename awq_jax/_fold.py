# SPDX-License-Identifier: Apache-2.0
"""The exact rewrite that moves a scale from activations into weights.

A group's linears read ``x = producer(...)``. Multiplying their rows by ``t`` and dividing the producer's channels by it
leaves the model's function unchanged: ``(x / t) (diag(t) W) = x W``. Nothing is left to do at run time.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from awq_jax._operands import refuse_shape
from awq_jax._tie import Tie
from awq_jax._tree import get, put
from awq_jax.families._table import Group, Linear, Norm

__all__ = ["fold_scale", "scale_rows", "unscale_producer"]


def scale_rows(linear: Mapping[str, Any], t: Float[Array, "*e k"]) -> dict[str, Any]:
    """Multiply the rows of a linear's kernel ``[*e, k, n]`` by t; the bias stays."""
    return {**linear, "kernel": linear["kernel"] * t[..., :, None].astype(linear["kernel"].dtype)}


def unscale_producer(module: Mapping[str, Any], producer: Norm | Linear, t: Float[Array, "*e c"]) -> dict[str, Any]:
    """Divide a producer's output channels by t.

    A norm's gain becomes ``(offset + gain)/t - offset`` (offset 1 for norms that multiply by ``1 + gain``), a linear's
    kernel is divided column by column; biases are divided as well.
    """
    out = dict(module)
    if isinstance(producer, Norm):
        gain = module["scale"]
        out["scale"] = ((producer.offset + gain) / t.astype(gain.dtype) - producer.offset).astype(gain.dtype)
    else:
        out["kernel"] = module["kernel"] / t[..., None, :].astype(module["kernel"].dtype)
    if "bias" in module:
        out["bias"] = module["bias"] / t.astype(module["bias"].dtype)
    return out


def fold_scale(
    params: Mapping[str, Any], group: Group, t: Float[Array, "*e c"], tie: Tie | None = None
) -> dict[str, Any]:
    """Fold a scale into a group: rows of its sinks times t, channels of its producer over t.

    Args:
      params: nested dict holding the paths that the group names.
      group: producer and sinks, with paths relative to ``params``.
      t: one factor per producer channel, positive; of every expert where the group has a scale for each.
      tie: how the producer's channels spread over the sinks' rows, if they are not the same.

    Returns:
      A new tree that computes the same function.

    Raises:
      ValueError: the group has no producer, or t does not fit its channels or the sinks' rows.
      KeyError: a path of the group is missing.
    """
    if group.producer is None:
        raise ValueError(f"group {group.sinks} has no producer to fold a scale into: {group.reason}")
    made, channels = get(params, group.producer.path), getattr(t, "shape", ())
    leaf = "scale" if isinstance(group.producer, Norm) else "kernel"
    wanted = (*channels[:-1], made[leaf].shape[-1])
    refuse_shape("t", t, wanted, f"a factor for each channel of {group.producer.path!r}")
    rows = tie.spread(t) if tie else t
    for path in (*group.sinks, *group.float_sinks):
        kernel = get(params, path)["kernel"]
        if kernel.shape[-2] != rows.shape[-1]:
            raise ValueError(
                f"a scale of {rows.shape[-1]} channels does not fit {path!r} with a kernel {list(kernel.shape)}: its "
                f"rows are not the channels of {group.producer.path!r}. A Tie says how channels spread over rows."
            )
    out = dict(params)
    for path in (*group.sinks, *group.float_sinks):
        out = put(out, path, scale_rows(get(out, path), rows))
    path = group.producer.path
    return put(out, path, unscale_producer(get(out, path), group.producer, t))
