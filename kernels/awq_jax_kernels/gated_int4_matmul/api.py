# SPDX-License-Identifier: Apache-2.0
"""`gated_int4_matmul`: `gated`, then `int4_matmul`; on a TPU one kernel for few rows."""

import functools
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int8, Int32

from awq_jax_kernels.dispatch import Way, dispatch
from awq_jax_kernels.gated.api import check, gated
from awq_jax_kernels.gated.reference import of_halves
from awq_jax_kernels.int4_matmul import int4_matmul, pallas_tpu
from awq_jax_kernels.int4_matmul.tiles import is_tiled, rows_shape
from awq_jax_kernels.product import check_groups, check_rows, shapes_of, unmapped

__all__ = ["gated_int4_matmul"]


def gated_int4_matmul(
    product: Float[Array, "m w"],
    packed: Int8[Array, "k2 n"] | Int32[Array, "n128 k64 4 256"],
    scale: Float[Array, "groups n"],
    zero: Int8[Array, "groups n"] | None = None,
    *,
    activation: str,
    implementation: Literal["tpu", "reference"] | None = None,
    config: Any = None,
) -> Float[Array, "m n"]:
    """``(activation(product[:, :w/2]) * product[:, w/2:]) @ ((q - zero) * scale)``.

    What lies between is rounded to the dtype of the product, as `gated` does it.

    Args:
      product: ``[m, w]``, gate and up side by side; half of w is the weight's k.
      packed, scale, zero: as in `int4_matmul`.
      activation: as in `gated`.
      implementation: "tpu", one kernel that makes its x while the first codes travel, or "reference", the two one after
        the other. None takes the kernel where it takes the operands, in programs for a TPU.
      config: block sizes for "tpu".

    Returns:
      ``[m, n]`` in the dtype of the product. There is no gradient.

    Raises:
      ValueError: shapes that disagree, an unknown activation, or a kernel that was named and refuses.

    >>> import jax.numpy as jnp
    >>> packed = jnp.full((1, 1), 0x21 ^ 0x88 - 256, jnp.int8)  # codes 1 and 2, down one column
    >>> scale, zero = jnp.full((1, 1), 0.5), jnp.zeros((1, 1), jnp.int8)
    >>> gate_up = jnp.array([[100.0, 100.0, 0.1, 1.0]])
    >>> gated_int4_matmul(gate_up, packed, scale, zero, activation="silu").item()
    105.0
    """
    check(product, activation)
    shapes = shapes_of(product=product, packed=packed, scale=scale, zero=zero)
    x, rows = jax.ShapeDtypeStruct((*product.shape[:-1], product.shape[-1] // 2), product.dtype), rows_shape(packed)
    check_rows(x, rows, 2, shapes)
    check_groups(x.shape[-1], rows, scale, zero, shapes)
    if config is not None and implementation != "tpu":
        raise ValueError("config belongs to the kernel: name it, implementation='tpu'.")
    operands = (product, packed, scale, zero)
    bound = {"activation": activation, "config": config}
    ways = {
        "tpu": Way(functools.partial(_refusal, config, *operands), unmapped(_in_one, _apart, **bound), "tpu"),
        "reference": Way(lambda: None, functools.partial(_apart, **bound)),
    }
    return dispatch(implementation, ways, "reference", operands, f"gated_int4_matmul takes {shapes}")


def _refusal(config: Any, product: Any, packed: Any, *rest: Any) -> str | None:
    if is_tiled(packed):
        return "packed is in the tile order of a GPU"
    return pallas_tpu.supports_halves(product, packed, *rest, config=config)


def _in_one(product: Any, *weight: Any, activation: str, config: Any) -> Any:
    return pallas_tpu.multiply_halves(product, *weight, of_halves=of_halves(activation), config=config)


def _apart(product: Any, *weight: Any, activation: str, config: Any) -> Any:
    """The two one after the other; a config is the kernel's."""
    return int4_matmul(gated(product, activation=activation), *weight)
