# SPDX-License-Identifier: Apache-2.0
"""`int4_matmul` without a kernel, for shapes and platforms that have none."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from awq_jax_kernels.nibbles import unpack_signed

__all__ = ["int4_matmul", "supports"]


def supports(x: Any, packed: Any, scale: Any, zero: Any = None, *, config: Any = None) -> str | None:
    """Why XLA can't take these operands, or None if it can: groups must hold whole bytes."""
    if config is not None:
        return "takes no config"
    g = x.shape[-1] // scale.shape[-2]
    return f"groups of {g} rows cut a byte in two" if g % 2 else None


def grouped(
    x: Float[Array, "m k"],
    packed: Int8[Array, "k2 n"],
    scale: Float[Array, "groups n"],
    zero: Int8[Array, "groups n"] | None = None,
    *,
    config: None = None,
) -> Float[Array, "m n"]:
    """``y = x @ ((q - zero) * scale)`` as one product per group, scaled after: no dense weight on any platform."""
    m, k = x.shape
    groups, n = scale.shape
    xg = x.reshape(m, groups, k // groups)
    q = unpack_signed(packed).reshape(groups, k // groups, n)
    scale = scale.astype(jnp.float32)
    # The int4 operand goes into the product as it is: XLA converts it on the way to the matrix unit.
    partial = jax.lax.dot_general(
        xg, q, (((2,), (1,)), ((1,), (0,))), precision="highest", preferred_element_type=jnp.float32
    )  # [groups, m, n]
    y = jnp.sum(partial * scale[:, None, :], axis=0)
    if zero is not None:
        sums = jnp.sum(xg.astype(jnp.float32), axis=-1)
        y -= jnp.matmul(sums, (zero.astype(jnp.float32) - 8) * scale, precision="highest")
    return y.astype(x.dtype)


def int4_matmul(x: Any, packed: Any, scale: Any, zero: Any = None, *, config: None = None) -> Any:
    return grouped(x, packed, scale, zero)
