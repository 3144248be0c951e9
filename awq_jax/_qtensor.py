# SPDX-License-Identifier: Apache-2.0
"""A quantized weight."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from awq_jax._operands import refuse_activations, refuse_weight
from awq_jax._pytree import pytree, static
from awq_jax_kernels import layout
from awq_jax_kernels.codes import middle, per_byte
from awq_jax_kernels.int4_matmul import int4_matmul
from awq_jax_kernels.int4_matmul import reference as int4_reference
from awq_jax_kernels.int4_matmul.tiles import as_rows, prepare, rows_shape
from awq_jax_kernels.int8_matmul import int8_matmul
from awq_jax_kernels.int8_matmul import reference as int8_reference
from awq_jax_kernels.w8a8_matmul import w8a8_matmul

__all__ = ["QTensor", "codes_of", "dequantize", "dequantize_tree", "in_rows", "in_tiles", "matmul", "product"]


@pytree
class QTensor:
    """A quantized weight ``[*b, k, n]``: ``w = (q - zero) * scale``, one scale and zero per group of rows.

    It is a pytree whose leaves share their leading axes, so `jax.vmap`, `jax.lax.scan`, indexing and sharding
    of stacked layers or experts need no special code.

    Attributes:
      packed: int8 ``[*b, k/2, n]``, two codes to a byte as `awq_jax_kernels.nibbles` says; of eight bits ``q - 128``,
        ``[*b, k, n]``. `in_tiles` gives the first an order that GPUs read faster, int32 ``[*b, n/128, k/64, 4, 256]``.
      scale: floating ``[*b, k/g, n]``.
      zero: codes ``[*b, k/g, n]``, int8 0..15 or, of eight bits, uint8 0..255; None is `middle` everywhere, a
        symmetric weight.
      bits: width of the codes that were chosen, 2, 3, 4 or 8; nibbles hold the first three alike.
      activations: what `matmul` multiplies the weight by, as in `QuantSpec`: "float", or int8 codes with a step for
        each "token" or one for the whole "tensor".
      input_scale: that one step, float32 ``[*b, 1, n]``, the same in every column so that columns can be cut and joined
        like scales; None where there is none.

    The group size is ``k // scale.shape[-2]``, the shape is derived: neither can disagree with the arrays.
    """

    packed: Any
    scale: Any
    zero: Any = None
    input_scale: Any = None
    bits: int = static(default=4)
    activations: str = static(default="float")

    @property
    def shape(self) -> tuple[int, ...]:
        """The dense weight's shape ``(*b, k, n)``."""
        *b, rows, n = rows_shape(self.packed)
        return (*b, per_byte(self.bits) * rows, n)

    @property
    def ndim(self) -> int:
        """Rank of the dense weight."""
        return len(self.scale.shape)

    @property
    def group_size(self) -> int:
        """Rows that share one scale."""
        return self.shape[-2] // self.scale.shape[-2]

    @property
    def middle(self) -> int:
        """The code that is zero where there are no zeros: 8, and 128 of eight bits."""
        return middle(self.bits)

    def with_input_scale(self, step: Array) -> "QTensor":
        """The weight with a static step ``[*b]`` of its inputs."""
        each = jnp.broadcast_to(step.astype(jnp.float32)[..., None, None], self.scale.shape)
        return dataclasses.replace(self, input_scale=each)

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
    reference = int4_reference if per_byte(weight.bits) == 2 else int8_reference
    return reference.dequantize(as_rows(weight.packed), weight.scale, weight.zero).astype(dtype)


def codes_of(weight: QTensor) -> Array:
    """The codes ``q``, uint8 ``[*b, k, n]``."""
    return layout.unpack(as_rows(weight.packed), weight.bits)


def in_tiles(weight: QTensor) -> QTensor:
    """The same weight with its bytes in tile order, which Hopper GPUs read a few percent faster.

    Every function of the library takes either order; elsewhere than on such a GPU each product undoes it.

    Args:
      weight: ``[k, n]`` of 2 to 4 bits; k a multiple of 64, n of 128.

    Raises:
      ValueError: k or n is no such multiple.
    """
    return dataclasses.replace(weight, packed=prepare(weight.packed))


def in_rows(weight: QTensor) -> QTensor:
    """The same weight with its bytes in the order that is stored; the inverse of `in_tiles`."""
    return dataclasses.replace(weight, packed=as_rows(weight.packed))


def dequantize_tree(tree: Any, dtype: Any = jnp.float32) -> Any:
    """A tree in which every `QTensor` is replaced by the dense weight that it stands for; other leaves stay.

    Weights that multiply int8 activations stay too: as dense ones they would compute something else.

    Args:
      tree: of arrays and `QTensor` leaves.
      dtype: of the dense weights.
    """
    is_weight = lambda leaf: isinstance(leaf, QTensor)
    dense = lambda leaf: dequantize(leaf, dtype) if is_weight(leaf) and leaf.activations == "float" else leaf
    return jax.tree.map(dense, tree, is_leaf=is_weight)


def matmul(x: Array, weight: QTensor | Array) -> Array:
    """``x @ weight`` for a dense or a quantized weight, without building the dense one.

    Where a weight says that its activations are int8, x is rounded and the product is int8 by int8.

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
    return product(x, weight) if isinstance(weight, QTensor) else jnp.matmul(x, weight.astype(x.dtype))


def product(x: Array, weight: QTensor) -> Array:
    """``x @ weight`` of a quantized weight, by its width and its activations.

    Args:
      x: ``[*b, m, k]``, or any ``[..., k]`` for a weight ``[k, n]``.
      weight: ``[*b, k, n]``.
    """
    if weight.activations != "float":
        step = None if weight.input_scale is None else weight.input_scale[..., 0, 0]
        return w8a8_matmul(x, weight.packed, weight.scale, step)
    multiply = int4_matmul if per_byte(weight.bits) == 2 else int8_matmul
    return multiply(x, weight.packed, weight.scale, weight.zero)
