# SPDX-License-Identifier: Apache-2.0
"""What the verbs refuse of their arguments, by shape and dtype alone: the same with arrays, tracers and shapes."""

from typing import Any

import jax.numpy as jnp

__all__ = ["refuse_activations", "refuse_gram", "refuse_shape", "refuse_weight"]


def _described(value: Any) -> str:
    """For example ``float32[4, 8]``."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return f"of type {type(value).__name__}"
    return f"{jnp.dtype(value.dtype).name}{list(value.shape)}"


def _refuse_other_than_floats(name: str, value: Any, wanted: str) -> None:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{name} is {_described(value)}; it must be an array {wanted}.")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} is {_described(value)}; it must hold floats. Cast it: x.astype(jnp.float32).")


def refuse_weight(weight: Any, name: str = "weight", *, leading: bool = True) -> None:
    """Refuse what is not a dense weight ``[*b, k, n]``.

    Args:
      weight: anything.
      name: what to call it.
      leading: whether axes ``*b`` may stand in front.

    Raises:
      TypeError: it is no array.
      ValueError: it has no floats, too few or too many axes, or no elements.

    >>> refuse_weight(jnp.zeros(4))
    Traceback (most recent call last):
    ValueError: weight is float32[4]; it must be [*b, k, n], inputs by outputs. A bias or a gain is not quantized.
    """
    wanted = "[*b, k, n]" if leading else "[k, n]"
    _refuse_other_than_floats(name, weight, wanted)
    if len(weight.shape) < 2:
        raise ValueError(
            f"{name} is {_described(weight)}; it must be {wanted}, inputs by outputs. "
            "A bias or a gain is not quantized."
        )
    if len(weight.shape) > 2 and not leading:
        raise ValueError(f"{name} is {_described(weight)}; it must be {wanted}. Map stacked weights with jax.vmap.")
    if not all(weight.shape):
        raise ValueError(f"{name} is {_described(weight)}: an axis of it is empty.")


def refuse_activations(x: Any, k: int | None = None, name: str = "x") -> None:
    """Refuse what is not activations ``[..., k]``.

    Args:
      x: anything.
      k: how many channels there must be; None takes any number.
      name: what to call it.

    Raises:
      TypeError: it is no array.
      ValueError: it has no floats, no axis, or another number of channels.
    """
    _refuse_other_than_floats(name, x, "[..., k]")
    if not x.shape:
        raise ValueError(f"{name} is a single number; it must be [..., k], channels last.")
    if k is not None and x.shape[-1] != k:
        raise ValueError(f"{name} is {_described(x)}; its last axis must have the {k} rows of the weight.")


def refuse_shape(name: str, value: Any, wanted: tuple[int, ...], why: str) -> None:
    """Refuse an array of another shape.

    Raises:
      ValueError: naming both shapes and why the one is wanted.

    >>> refuse_shape("ratio", jnp.ones(3), (2, 3), "one for each group and output")
    Traceback (most recent call last):
    ValueError: ratio is float32[3]; it must be [2, 3], one for each group and output.
    """
    if getattr(value, "shape", None) != wanted:
        raise ValueError(f"{name} is {_described(value)}; it must be {list(wanted)}, {why}.")


def refuse_gram(gram: Any, k: int, rows: int) -> None:
    """Refuse what is no Gram matrix of k inputs, whole or in blocks of whole groups.

    Args:
      gram: anything.
      k: rows of the weight.
      rows: of a group; divides k.

    Raises:
      TypeError: it is no array.
      ValueError: it has no floats, or another shape.

    >>> refuse_gram(jnp.eye(128), 256, 64)
    Traceback (most recent call last):
    ValueError: gram is float32[128, 128]; it must be [256, 256], or [256/b, b, b] with b a multiple of the group's 64.
    """
    wanted = f"[{k}, {k}], or [{k}/b, b, b] with b a multiple of the group's {rows}"
    _refuse_other_than_floats("gram", gram, wanted)
    block = gram.shape[-1] if gram.shape else 0
    in_blocks = block and k % block == 0 and block % rows == 0 and gram.shape == (k // block, block, block)
    if not in_blocks and gram.shape != (k, k):
        raise ValueError(f"gram is {_described(gram)}; it must be {wanted}.")
