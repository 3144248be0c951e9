# SPDX-License-Identifier: Apache-2.0
"""`add_norm`: one kernel on a TPU or a Hopper GPU, where XLA makes two or three operations of it."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Float32

from awq_jax_kernels.add_norm import pallas_gpu, pallas_tpu, reference

__all__ = ["add_norm"]


def add_norm(
    h: Float[Array, "m d"],
    delta: Float[Array, "m d"] | None,
    weight: Float32[Array, " d"],
    *,
    eps: float,
    offset: float = 0.0,
    ahead: Sequence[Any] = (),
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
      ahead: arrays that what follows reads, such as a weight; a GPU's cache is asked for their beginnings. They change
        nothing of the result.
      implementation: "tpu", "gpu" or "reference"; a refusal is then an error. None takes the kernel of the platform that
        the program is lowered for, where it takes the operands; the GPU's only where this process has a GPU.
      interpret: run the kernel's Python on any platform.

    Returns:
      The sum and its norm, both in the dtype of h.

    Raises:
      ValueError: the kernel was named and does not take these operands.

    >>> import jax.numpy as jnp
    >>> total, normed = add_norm(jnp.array([[1.0, 5.0]]), jnp.array([[2.0, -1.0]]), jnp.ones(2), eps=0.0)
    >>> total.tolist(), [round(x, 4) for x in normed[0].tolist()]
    ([[3.0, 4.0]], [0.8485, 1.1314])
    """
    default = functools.partial(reference.add_norm, eps=eps, offset=offset)
    kernels = {
        "tpu": (pallas_tpu.refusal, functools.partial(pallas_tpu.add_norm, eps=eps, offset=offset, interpret=interpret)),
        "gpu": (pallas_gpu.refusal, functools.partial(pallas_gpu.add_norm, eps=eps, offset=offset)),
    }
    if implementation == "reference":
        return default(h, delta, weight)
    if implementation is not None:
        refusal, kernel = kernels[implementation]
        if reason := refusal(h):
            raise ValueError(f"no kernel takes h {h.dtype}{list(h.shape)}: {reason}.")
        return kernel(h, delta, weight, *(ahead if implementation == "gpu" else ()))
    platforms = {"tpu": "tpu"} | ({"cuda": "gpu"} if jax.default_backend() == "gpu" else {})
    taken = {platform: kernels[name][1] for platform, name in platforms.items() if not kernels[name][0](h)}
    if "cuda" in taken:
        taken = {name: kernel if name == "cuda" else _alone(kernel) for name, kernel in taken.items()}
        return jax.lax.platform_dependent(h, delta, weight, *ahead, default=_alone(default), **taken)
    return jax.lax.platform_dependent(h, delta, weight, default=default, **taken) if taken else default(h, delta, weight)


def _alone(function: Any) -> Any:
    """The function without what a GPU's cache is asked for."""
    return lambda h, delta, weight, *_: function(h, delta, weight)
