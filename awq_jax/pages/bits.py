# SPDX-License-Identifier: Apache-2.0
"""Which group got which width under a budget, and what each width would have cost, from `Chosen`'s plain data."""

from collections.abc import Iterator, Mapping
from typing import Any

from awq_jax.pages.frame import table

__all__ = ["bits_by_layer", "bits_in_words", "bits_tables"]

Data = Mapping[str, Any]


def bits_in_words(budget: Data) -> str:
    """What a budget came to, in one line."""
    total = sum(choice["weights"] for choice in budget["choices"])
    shares = []
    for bits in budget["widths"]:
        share = sum(choice["weights"] for choice in budget["choices"] if choice["bits"] == bits) / total
        shares.append(f"{100 * share:.0f} % have {bits}")
    return (
        f"{budget['mean']:.4g} bits a weight with scales and zeros, of a budget of {budget['budget']:g}; of the "
        f"weights with a choice {', '.join(shares)}"
    )


def _place(choice: Data) -> tuple[int, str]:
    """Layer, and the linears' names in it."""
    layer = int(choice["sinks"][0].split("/", 2)[1])
    return layer, ", ".join(path.split("/", 2)[2] for path in choice["sinks"])


def bits_by_layer(budget: Data) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of a table: layers down, groups across, bits in the cells."""
    places = {_place(choice): str(choice["bits"]) for choice in budget["choices"]}
    names = tuple(dict.fromkeys(name for _, name in places))
    layers = sorted({layer for layer, _ in places})
    return ("layer", *names), [(str(i), *(places.get((i, name), "–") for name in names)) for i in layers]


def bits_tables(budget: Data) -> Iterator[str]:
    """HTML: the widths by layer, and what each would have cost."""
    yield table(*bits_by_layer(budget))
    head = ("layer", "linears", "bits", *(f"KL at {bits}" for bits in budget["widths"]))
    cell = lambda kl: "not finite" if kl is None else f"{kl:.2e}"
    rows = ((*_named(choice), str(choice["bits"]), *map(cell, choice["kl"])) for choice in budget["choices"])
    yield (
        "<details><summary>What each width would have cost: KL divergence of the model with these linears alone "
        f"rounded, nats a token</summary>{table(head, rows)}</details>"
    )


def _named(choice: Data) -> tuple[str, str]:
    layer, names = _place(choice)
    return str(layer), names
