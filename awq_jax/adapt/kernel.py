# SPDX-License-Identifier: Apache-2.0
"""A quantized kernel in the place of a dense one, whatever the shape that the program expects."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from awq_jax._pytree import pytree, static
from awq_jax._qtensor import QTensor, dequantize, product
from awq_jax.adapt.layout import Layout

__all__ = ["QKernel", "as_kernel", "is_kernel"]


@pytree
class QKernel:
    """A leaf that stands for a dense kernel of ``shape`` and ``dtype``; `awq_jax.adapt.serve` runs programs with it.

    Attributes:
      weight: the matrix ``[*lead, k, n]`` as a `QTensor`.
      inverse: ``1/t``, float32 ``[*lead, k]``, applied to the input at run time; None where the scale was folded.
      layout: how the matrix lies in the kernel.
      dtype: of the dense kernel, by name.
    """

    weight: Any
    inverse: Any = None
    layout: Any = static()
    dtype: Any = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense kernel."""
        return self.layout.shape

    @property
    def ndim(self) -> int:
        """Rank of the dense kernel."""
        return len(self.layout.shape)

    @property
    def size(self) -> int:
        """Weights of the dense kernel."""
        return math.prod(self.layout.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays as held in memory."""
        return self.weight.nbytes + (0 if self.inverse is None else self.inverse.nbytes)

    def contract(self, x: Array) -> Array:
        """``x @ matrix``: ``[*batch, m, k]`` to ``[*batch, m, n]``, once stacked layers are scanned away."""
        if self.inverse is not None:
            x = (x.astype(jnp.float32) * self.inverse[..., None, :]).astype(x.dtype)
        return product(x, self.weight)

    def dense(self) -> Array:
        """The kernel it stands for."""
        matrix = dequantize(self.weight)
        if self.inverse is not None:
            matrix = matrix * self.inverse[..., None]
        return self.layout.kernel(matrix).astype(self.dtype)


def as_kernel(leaf: Any) -> Any:
    """A bare `QTensor` ``[*lead, k, n]`` as the kernel of the same shape in float32; anything else as it is."""
    if not isinstance(leaf, QTensor):
        return leaf
    rank = leaf.ndim
    layout = Layout(
        shape=leaf.shape,
        factors=leaf.shape,
        stack=tuple(range(rank - 2)),
        contract=(rank - 2,),
        out=(rank - 1,),
    )
    return QKernel(weight=leaf, layout=layout, dtype="float32")


def is_kernel(leaf: Any) -> bool:
    """Whether a node stands for a dense kernel: a `QTensor`, a `QKernel`, or another record with ``contract``."""
    return isinstance(leaf, QTensor) or hasattr(leaf, "contract")


def dtype_name(leaf: Any) -> str:
    """Of an array, for a static field."""
    return str(np.dtype(leaf.dtype))
