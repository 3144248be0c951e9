# SPDX-License-Identifier: Apache-2.0
"""Rows that many tables have."""

from typing import Any, Literal

from awq_jax.families._table import Group, Key, Linear, Norm

__all__ = ["BEHIND_GELU", "PLAIN_MLP", "linear", "norm", "without"]

L = "layers/*"

BEHIND_GELU = Group(None, (f"{L}/mlp/down",), reason="a GELU lies between it and up, and a scale does not pass a GELU")

PLAIN_MLP = (  # all groups of a layer whose MLP has no gate, but for what its down projection reads
    Group(Norm(f"{L}/input_norm"), (f"{L}/attn/q", f"{L}/attn/k", f"{L}/attn/v"), output=f"{L}/attn"),
    Group(Linear(f"{L}/attn/v", tie="gqa"), (f"{L}/attn/o",)),
    Group(Norm(f"{L}/post_norm"), (f"{L}/mlp/up",), output=f"{L}/mlp"),
)


def linear(
    theirs: str,
    ours: str | tuple[str, ...],
    *,
    bias: bool = False,
    transpose: bool = True,
    layout: Literal["concat", "grouped"] = "concat",
) -> tuple[Key, ...]:
    """The weight of one of their modules and, where there may be one, its bias.

    >>> [key.ours for key in linear("model.layers.*.fc1", "layers/*/mlp/up", bias=True)]
    ['layers/*/mlp/up/kernel', 'layers/*/mlp/up/bias']
    """
    paths = (ours,) if isinstance(ours, str) else ours

    def place(leaf: str) -> Any:
        named = tuple(f"{path}/{leaf}" for path in paths)
        return named[0] if isinstance(ours, str) else named

    weight = Key(f"{theirs}.weight", place("kernel"), transpose=transpose, layout=layout)
    return (weight, Key(f"{theirs}.bias", place("bias"), optional=True, layout=layout)) if bias else (weight,)


def norm(theirs: str, ours: str, *, bias: bool = False) -> tuple[Key, ...]:
    """The gain of a norm and its bias."""
    gain = Key(f"{theirs}.weight", f"{ours}/scale")
    return (gain, Key(f"{theirs}.bias", f"{ours}/bias")) if bias else (gain,)


def without(rows: tuple[tuple[str, str], ...], *attributes: str) -> tuple[tuple[str, str], ...]:
    """Rows of `Family.config` but for some of config.json's attributes."""
    return tuple(row for row in rows if row[0] not in attributes)
