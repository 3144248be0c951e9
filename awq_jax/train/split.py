# SPDX-License-Identifier: Apache-2.0
"""What of a mixed tree is trained and what is frozen: codes have no gradient, and optimizers keep no state for them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from awq_jax.adapt.kernel import is_kernel

__all__ = ["apply_updates", "combine", "frozen_mask", "split"]


def frozen_mask(params: Any) -> Any:
    """True for each leaf that can be trained: floating, and not part of a quantized kernel. For `optax.masked`.

    >>> frozen_mask({"scale": jnp.ones(2), "step": jnp.zeros((), jnp.int32)})
    {'scale': True, 'step': False}
    """

    def mask(leaf: Any) -> Any:
        if is_kernel(leaf):
            return jax.tree.map(lambda _: False, leaf)
        return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))

    return jax.tree.map(mask, params, is_leaf=is_kernel)


def split(params: Any, trained: Callable[[str], Any] = lambda path: True) -> tuple[Any, Any]:
    """(trained, frozen): the same tree twice, with None where a leaf is in the other.

    Differentiate the first and `combine` inside: `jax.grad` refuses integer leaves, and the frozen ones get no
    cotangents at all.

    Args:
      params: mixed tree.
      trained: which of the floating leaves, by path; what counts as true is yes.
    """
    mask = jax.tree_util.tree_map_with_path(
        # A bool and nothing else: a leaf whose answer were a match or a number would be in neither tree.
        lambda keys, free: free and bool(trained(jax.tree_util.keystr(keys, simple=True, separator="/"))),
        frozen_mask(params),
    )
    choose = lambda keep: jax.tree.map(lambda leaf, free: leaf if free is keep else None, params, mask)
    return choose(True), choose(False)


def combine(trained: Any, frozen: Any) -> Any:
    """Inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None)


def apply_updates(params: Any, updates: Any) -> Any:
    """`optax.apply_updates` for a mixed tree: what has no gradient, the codes, stays as it is.

    `optax.masked` hands the float0 gradients of codes through, and nothing can be added to those.

    Args:
      params: mixed tree.
      updates: the same tree; leaves of dtype float0 are no updates.
    """
    frozen = lambda update: update.dtype == jax.dtypes.float0
    return jax.tree.map(lambda leaf, u: leaf if frozen(u) else (leaf + u).astype(leaf.dtype), params, updates)
