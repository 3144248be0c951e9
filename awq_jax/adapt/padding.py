# SPDX-License-Identifier: Apache-2.0
"""Which rows of a product are tokens and which are padding."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool

__all__ = ["mask_rows"]


def mask_rows(mask: Bool[Array, "*t"], free: tuple[int, ...], path: str) -> Bool[Array, " m"]:
    """The mask of a batch, for the rows of one product.

    Axes are matched by their sizes, in order: rows ``[b, t]`` and ``[b * t]`` are the mask's own, further axes behind
    them (heads) share it.

    Args:
      mask: ``[b, t]`` or of any other shape, True where a token counts.
      free: sizes of the axes that make up the rows, in order.
      path: of the weight, for the error.

    Raises:
      ValueError: the rows are not made of the mask's axes.

    >>> mask_rows(jnp.array([[True, False]]), (1, 2, 3), "o").tolist()
    [True, True, True, False, False, False]
    """
    wanted = [size for size in mask.shape if size != 1]
    ends = [i for i in range(len(free) + 1) if math.prod(free[:i]) == mask.size]
    if not ends or [size for size in free[: ends[0]] if size != 1] not in (wanted, [mask.size]):
        raise ValueError(
            f"the rows that {path!r} reads are {free}, which do not begin with the mask's axes {mask.shape}, so it "
            "can't be told which of them are padding. Set the padding to zero before its rows are rearranged and "
            "observe without a mask, or give batches without padding."
        )
    return jnp.repeat(mask.reshape(-1), math.prod(free[ends[0] :]))
