# SPDX-License-Identifier: Apache-2.0
"""`add_norm`: one kernel on a TPU or a Hopper GPU, where XLA makes two or three operations of it."""

import functools
from typing import Any, Literal

from jaxtyping import Array, Float, Float32

from awq_jax_kernels.add_norm import pallas_gpu, pallas_tpu, reference
from awq_jax_kernels.dispatch import Way, cuda, dispatch
from awq_jax_kernels.product import shapes_of, unmapped

__all__ = ["add_norm"]


def add_norm(
    h: Float[Array, "m d"],
    delta: Float[Array, "m d"] | None,
    weight: Float32[Array, " d"],
    *,
    eps: float,
    offset: float = 0.0,
    implementation: Literal["tpu", "gpu", "reference"] | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "m d"], Float[Array, "m d"]]:
    """``s = h + delta`` and ``s / sqrt(mean(s**2) + eps) * (offset + weight)``.

    The sum is rounded to the dtype of h, as a residual stream is, and normed in float32.

    Args:
      h: ``[m, d]``.
      delta: the same, or None for nothing.
      weight: float32 ``[d]``.
      eps: against division by zero.
      offset: 1 for models that store the weight less one.
      implementation: "tpu", "gpu" or "reference"; a refusal is then an error. None takes the kernel of the platform
        that the program is lowered for, where it takes the operands; a GPU's only where this process has one.
      interpret: run the kernel's Python on any platform.

    Returns:
      The sum and its norm, both in the dtype of h.

    Raises:
      ValueError: shapes that disagree, or the kernel was named and does not take these operands.

    >>> import jax.numpy as jnp
    >>> total, normed = add_norm(jnp.array([[1.0, 5.0]]), jnp.array([[2.0, -1.0]]), jnp.ones(2), eps=0.0)
    >>> total.tolist(), [round(x, 4) for x in normed[0].tolist()]
    ([[3.0, 4.0]], [0.8485, 1.1314])
    """
    if h.ndim != 2 or weight.shape != h.shape[1:] or (delta is not None and delta.shape != h.shape):
        shapes = shapes_of(h=h, delta=delta, weight=weight)
        raise ValueError(f"h must be (m, d), delta the same and weight (d,): {shapes}.")
    bound = {"eps": eps, "offset": offset}
    ways = {
        "tpu": Way(
            functools.partial(pallas_tpu.refusal, h),
            functools.partial(pallas_tpu.add_norm, **bound, interpret=interpret),
            "tpu",
        ),
        "gpu": Way(
            functools.partial(pallas_gpu.refusal, h),
            unmapped(pallas_gpu.add_norm, reference.add_norm, **bound),
            cuda(),
        ),
        "reference": Way(lambda: None, functools.partial(reference.add_norm, **bound)),
    }
    return dispatch(implementation, ways, "reference", (h, delta, weight), f"add_norm takes h {h.dtype}{list(h.shape)}")
