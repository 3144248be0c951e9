# SPDX-License-Identifier: Apache-2.0
"""Which Gram matrices are kept whole, and which as diagonal blocks, by the memory that there is."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence

import jax

from awq_jax._plan import GroupPlan, LayerPlan
from awq_jax._spec import Recipe

__all__ = ["blocked", "device_memory", "gram_bytes", "limit_of", "with_gram_limit"]

_SHARE = 8  # of a device's memory for one Gram matrix: it is there twice while it grows, beside weights and candidates


def device_memory() -> int:
    """Bytes that a device may hold; of a CPU what the machine has."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limit_of(memory: int) -> int:
    """Bytes of a Gram matrix on a device of so much memory, a power of two.

    >>> limit_of(16 << 30) == 1 << 31
    True
    """
    return 1 << (memory // _SHARE).bit_length() - 1


def _taps(plan: LayerPlan, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[GroupPlan, int, int]]:
    """(group, width of its input, how many Gram matrices it has) of every group that is observed."""
    for group in plan.groups:
        if group.quantized:
            *experts, k, _ = shapes[group.group.sinks[0]]
            yield group, k, experts[0] if experts and group.group.per_expert else 1


def with_gram_limit(recipe: Recipe, plans: Sequence[LayerPlan], shapes: Mapping[str, tuple[int, ...]]) -> Recipe:
    """A recipe with `SearchSpec.gram_limit` set where it is None and a device is too small for the widest input.

    The limit is a power of two, so that machines which differ little decide alike.

    Args:
      recipe: whose plans these are.
      plans: of the layers.
      shapes: of the kernels, by path relative to a layer.
    """
    limit = limit_of(device_memory())
    widest = max((4 * e * k * k for plan in set(plans) for _, k, e in _taps(plan, shapes)), default=0)
    if recipe.search.gram_limit is not None or widest <= limit:
        return recipe
    return dataclasses.replace(recipe, search=dataclasses.replace(recipe.search, gram_limit=limit))


def blocked(plans: Sequence[LayerPlan], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """A sentence for each input of which less than the whole Gram matrix is kept."""
    said: dict[str, None] = {}
    for plan in dict.fromkeys(plans):
        for group, k, experts in _taps(plan, shapes):
            rows = group.gram_block(k, plan.search.gram_limit, experts)
            if rows < k:
                said[
                    f"{group.group.sinks[0]}: of the Gram matrix of its {k} inputs blocks of {rows} rows were kept, "
                    f"which take {4 * experts * k * rows / 1e9:.2g} GB; all would take "
                    f"{4 * experts * k * k / 1e9:.2g} (--gram-limit)"
                ] = None
    return tuple(said)


def gram_bytes(plan: LayerPlan, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Of all Gram matrices of one layer, which are alive together."""
    limit = plan.search.gram_limit
    return sum(4 * e * k * group.gram_block(k, limit, e) for group, k, e in _taps(plan, shapes))
