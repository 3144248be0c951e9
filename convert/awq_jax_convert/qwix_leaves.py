# SPDX-License-Identifier: Apache-2.0
"""Quantized weights as qwix's inference path takes them.

qwix replaces a kernel by ``WithAux(QArray(qvalue, scale, zero_point), how)``. Its codes are those of `QTensor` less 8,
in int4; scales and zeros have the kernel's rank. qwix is imported here alone, when it is asked for.
(Format: qwix 0.1.8, ``core/qarray.py`` and ``providers/ptq.py``; its classes there are not its public interface.)
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax.adapt.kernel import QKernel, as_kernel
from awq_jax.adapt.layout import Layout
from awq_jax_kernels.nibbles import unpack_numpy

__all__ = ["to_qwix"]


def to_qwix(params: Any, *, dtype: Any = None) -> Any:
    """A parameter tree in which every quantized weight is what qwix's ``PtqProvider`` runs.

    ``w = (qvalue - zero_point) * scale``; no code and no zero changes. Weights that keep a scale for their inputs
    become ``WithAwqScale``, which ``qwix.contrib.awq.AwqInferenceProvider`` runs.

    Args:
      params: nested dict with `QTensor` leaves ``[*b, k, n]``, or what `awq_jax.linen.quantize` gives.
      dtype: of scales, and therefore of the weights that qwix multiplies with; None is that of the dense kernel,
        float32 for a bare `QTensor`.

    Returns:
      The tree with qwix's leaves; other leaves stay.

    Raises:
      ImportError: qwix is not installed.
      ValueError: a weight has eight bits, a scale leaves the range of dtype, or groups of rows lie across the kernel's
        axes in a way that qwix has no scales for.
    """
    if isinstance(params, Mapping):
        return {key: to_qwix(value, dtype=dtype) for key, value in params.items()}
    if isinstance(params, QTensor | QKernel):
        return _leaf(as_kernel(params), dtype)
    return params


def _leaf(kernel: QKernel, dtype: Any) -> Any:
    try:
        from qwix import QArray  # pyright: ignore[reportMissingImports]
        from qwix._src.core.qarray import HowToQuantize  # pyright: ignore[reportMissingImports]
        from qwix._src.providers.ptq import WithAux  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("qwix is not installed, or has moved its classes (pip install qwix==0.1.8).") from error
    weight, layout = kernel.weight, kernel.layout
    if weight.bits > 4:
        raise ValueError(f"a kernel of shape {layout.shape} has {weight.bits} bits; int4 is what is made for qwix.")
    shape = _scale_shape(layout, weight.group_size)
    codes = layout.kernel(jnp.asarray(unpack_numpy(np.asarray(weight.packed)).astype(np.int8) - 8))
    scale = _narrowed(weight.scale, jnp.dtype(dtype or kernel.dtype))
    zero = None if weight.zero is None else _on_axes(layout, shape, jnp.asarray(weight.zero) - 8).astype(jnp.int4)
    array = QArray(qvalue=codes.astype(jnp.int4), scale=_on_axes(layout, shape, scale), zero_point=zero, qtype=jnp.int4)
    tiles = {axis: whole // part for axis, (whole, part) in enumerate(zip(layout.shape, shape, strict=True))}
    how = HowToQuantize(
        qtype=jnp.int4,
        channelwise_axes=[
            axis for axis, tile in tiles.items() if tile == 1
        ],  # a list, as qwix has it: structures compare
        tiled_axes={axis: tile for axis, tile in tiles.items() if 1 < tile < layout.shape[axis]},
        calibration_method="absmax" if zero is None else "minmax",
    )
    if kernel.inverse is None:
        return WithAux(array=array, how=how)
    from qwix.contrib.awq import WithAwqScale  # pyright: ignore[reportMissingImports]

    if len(layout.contract) != 1 or kernel.inverse.ndim != 1:
        raise ValueError(
            f"a kernel of shape {layout.shape} keeps a scale for its inputs, and qwix has one for a single axis alone. "
            "Fold it into what makes the inputs, or leave the weight at identity."
        )
    return WithAwqScale(
        array=array, how=how, awq_scale=1 / jnp.asarray(kernel.inverse), contracting_axis=layout.contract[0]
    )


def _narrowed(scale: Any, dtype: Any) -> jax.Array:
    made = jnp.asarray(scale).astype(dtype)
    if not bool((jnp.isfinite(made) & (made > 0)).all()):
        raise ValueError(f"a scale leaves the range of {dtype}. Give dtype='float32'.")
    return made


def _scale_shape(layout: Layout, group_size: int) -> tuple[int, ...]:
    """Of scales on the kernel's axes: contracted axes shrink, the last first, until a group is full."""
    if layout.factors != layout.shape:
        raise ValueError(
            f"a kernel of shape {layout.shape} is reshaped before its product; qwix keeps it as {layout.factors}. Keep "
            "the parameter in that shape."
        )
    sizes, left = list(layout.shape), group_size
    for axis in reversed(layout.contract):
        taken = min(sizes[axis], left)
        if sizes[axis] % taken or left % taken:
            raise ValueError(
                f"groups of {group_size} rows lie across the axes of a kernel of shape {layout.shape}: qwix has no "
                "scales for that. Take a group size that divides the last contracted axis, or whole columns."
            )
        sizes[axis], left = sizes[axis] // taken, left // taken
    return tuple(sizes)


def _on_axes(layout: Layout, shape: tuple[int, ...], matrix: jax.Array) -> jax.Array:
    """Scales or zeros ``[*lead, k/g, n]`` as ``shape``."""
    back = [layout.order.index(axis) for axis in range(len(shape))]
    return matrix.reshape([shape[axis] for axis in layout.order]).transpose(back)
