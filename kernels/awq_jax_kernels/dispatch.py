# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operation runs: the one that is named, or that of the platform lowered for.

An operation describes each of its implementations as a `Way`. A refusal is a sentence about the operands, found from
shapes and dtypes alone: who names an implementation gets it as an error, who names none gets another implementation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

__all__ = ["Way", "cuda", "dispatch", "require", "stage"]


class Way(NamedTuple):
    """One implementation: why it can't take the operands, or None; what runs it; whose programs get it unnamed."""

    refusal: Callable[[], str | None]
    run: Callable[..., Any]
    platform: str | None = None


def cuda() -> str | None:
    """The platform of ways for GPUs. Staging them takes seconds, so only a process that has a GPU does."""
    return "cuda" if jax.default_backend() == "gpu" else None


def dispatch(named: str | None, ways: Mapping[str, Way], otherwise: str, operands: tuple[Any, ...], what: str) -> Any:
    """Run the way that is named, or let the platform decide.

    Args:
      named: a key of ways, or None.
      ways: the implementations.
      otherwise: the way that takes all operands on all platforms.
      operands: arrays, or trees of them.
      what: the operation and its operands, for errors.

    Raises:
      ValueError: the way that is named refuses, or there is none of this name.

    >>> import jax.numpy as jnp
    >>> ways = {"tpu": Way(lambda: "no tiles", jnp.sin, "tpu"), "reference": Way(lambda: None, jnp.negative)}
    >>> dispatch(None, ways, "reference", (jnp.float32(1),), "sin").item()
    -1.0
    >>> dispatch("tpu", ways, "reference", (jnp.float32(1),), "sin takes a scalar")
    Traceback (most recent call last):
    ValueError: no implementation of sin takes a scalar: tpu: no tiles. implementation='reference' takes everything.
    """
    if named is None:
        return stage(ways, otherwise, operands)
    require(ways, (named,), what)
    return ways[named].run(*operands)


def require(ways: Mapping[str, Way], names: Sequence[str], what: str) -> None:
    """Raise, with the reasons of all names, if the last of them refuses or is none of the ways.

    Raises:
      ValueError: so it is.
    """
    if names[-1] not in ways:
        raise ValueError(f"unknown implementation {names[-1]!r}; choose from {', '.join(ways)}.")
    if ways[names[-1]].refusal() is not None:
        reasons = {name: ways[name].refusal() for name in names}
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        raise ValueError(f"no implementation of {what}: {listed}. implementation='reference' takes everything.")


def stage(ways: Mapping[str, Way], otherwise: str, operands: tuple[Any, ...]) -> Any:
    """Stage the first way of every platform that takes the operands; lowering picks.

    The platform is that of the lowering, not of this process: a program exported for a TPU on a CPU gets the kernel.
    """
    default = ways[otherwise].run
    last_first = list(ways.values())[::-1]
    taken = {way.platform: way.run for way in last_first if way.platform and way.refusal() is None}
    return jax.lax.platform_dependent(*operands, default=default, **taken) if taken else default(*operands)
