# SPDX-License-Identifier: Apache-2.0
"""Which blocks of each weight's Gram matrix are kept, where all of it would take too much memory."""

import math
from collections.abc import Mapping

from awq_jax._gram import block_rows
from awq_jax._spec import Recipe
from awq_jax.adapt.table import Table
from awq_jax.gram_memory import device_memory, limit_of

__all__ = ["gram_rows"]

_GROUP = 128  # rows that stay together where no recipe says how large quantization groups are


def gram_rows(table: Table, limit: int | None, recipe: Recipe | None) -> Mapping[str, int]:
    """Rows of the blocks that are kept of the Gram matrix of what each weight reads; k is all of it.

    Args:
      table: a statistic is kept for the first weight that reads a tensor, and its blocks hold whole groups of them all.
      limit: of one input, those of all experts together; None takes what `quantize_checkpoint` does on this device.
      recipe: knows the groups.
    """
    limit = limit_of(device_memory()) if limit is None else limit
    rows = {}
    for path in set(table.source.values()):
        layout = table.weights[path]
        copies = math.prod(layout.sizes(layout.batch))
        if 4 * copies * layout.k**2 <= limit:
            rows[path] = layout.k
            continue
        sizes = [math.gcd(_GROUP, layout.k)]
        if recipe is not None:
            readers = [reader for reader, source in table.source.items() if source == path]
            specs = [recipe.spec_of(reader, reader.rpartition("/")[0])[1] for reader in readers]
            sizes = [spec.rows_per_group(layout.k, path) for spec in specs if spec is not None]
        rows[path] = block_rows(layout.k, math.lcm(*sizes), limit, copies)
    return rows
