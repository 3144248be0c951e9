# SPDX-License-Identifier: Apache-2.0
"""A quantized weight."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from awq_jax._operands import refuse_activations, refuse_weight
from awq_jax._pytree import pytree, static
from awq_jax_kernels.int4_matmul import int4_matmul
from awq_jax_kernels.int4_matmul.reference import dequantize as _dequantize

__all__ = ["QTensor", "dequantize", "matmul"]


@pytree
class QTensor:
    """An INT4 weight ``[*b, k, n]``: ``w = (q - zero) * scale``, one scale and zero per group of rows.

    It is a pytree whose three leaves share their leading axes, so `jax.vmap`, `jax.lax.scan`, indexing and sharding
    of stacked layers or experts need no special code.

    Attributes:
      packed: int8 ``[*b, k/2, n]``, the layout of `awq_jax_kernels.nibbles`.
      scale: floating ``[*b, k/g, n]``.
      zero: int8 codes 0..15, ``[*b, k/g, n]``; None is 8 everywhere, a symmetric weight.
      bits: width of the codes that were chosen; the nibbles hold them whatever it is.

    The group size is ``k // scale.shape[-2]``, the shape is derived: neither can disagree with the arrays.
    """

    packed: Any
    scale: Any
    zero: Any = None
    bits: int = static(default=4)

    @property
    def shape(self) -> tuple[int, ...]:
        """The dense weight's shape ``(*b, k, n)``."""
        *b, k2, n = self.packed.shape
        return (*b, 2 * k2, n)

    @property
    def ndim(self) -> int:
        """Rank of the dense weight."""
        return len(self.packed.shape)

    @property
    def group_size(self) -> int:
        """Rows that share one scale."""
        return self.shape[-2] // self.scale.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays as held in memory."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __getitem__(self, index: Any) -> "QTensor":
        """Select along the leading axes ``*b`` only."""
        return jax.tree.map(lambda leaf: leaf[index], self)


def dequantize(weight: QTensor, dtype: Any = jnp.float32) -> Array:
    """The dense weight ``(q - zero) * scale``, ``[*b, k, n]``.

    Args:
      weight: the quantized weight.
      dtype: of the result; the arithmetic is float32.
    """
    return _dequantize(weight.packed, weight.scale, weight.zero).astype(dtype)


def dequantize_tree(tree: Any, dtype: Any = jnp.float32) -> Any:
    """A tree in which every `QTensor` is replaced by the dense weight that it stands for; other leaves stay.

    Args:
      tree: of arrays and `QTensor` leaves.
      dtype: of the dense weights.
    """
    is_weight = lambda leaf: isinstance(leaf, QTensor)
    dense = lambda leaf: dequantize(leaf, dtype) if is_weight(leaf) else leaf
    return jax.tree.map(dense, tree, is_leaf=is_weight)


def matmul(x: Array, weight: QTensor | Array) -> Array:
    """``x @ weight`` for a dense or a quantized weight, without building the dense one.

    Args:
      x: ``[..., k]``.
      weight: ``[k, n]``.

    Returns:
      ``[..., n]`` in the dtype of x. Differentiable in x, in reverse mode alone: `jax.jvp` and `jax.jacfwd` raise. A
      quantized weight is frozen: codes get float0, and the scale gets zero (`awq_jax.train.learned` trains it).

    Raises:
      TypeError: an argument is no array.
      ValueError: x is not ``[..., k]`` floats, or the weight not ``[k, n]`` for the same k.
    """
    if not isinstance(weight, QTensor):
        refuse_weight(weight)
    refuse_activations(x, weight.shape[-2])
    if isinstance(weight, QTensor):
        return int4_matmul(x, weight.packed, weight.scale, weight.zero)
    return jnp.matmul(x, weight.astype(x.dtype))
