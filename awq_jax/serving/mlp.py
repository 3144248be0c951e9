# SPDX-License-Identifier: Apache-2.0
"""The MLP as serving runs it: for a token of each row, what lies between its two products is no operation of XLA's."""

from typing import Any

from jaxtyping import Array, Float

from awq_jax._qtensor import QTensor, matmul
from awq_jax.models.mlp import Mlp
from awq_jax_kernels.codes import per_byte
from awq_jax_kernels.gated import ACTIVATIONS, gated
from awq_jax_kernels.gated_int4_matmul import gated_int4_matmul

__all__ = ["GatedMlp"]


class GatedMlp(Mlp):
    """`Mlp` with gate and up in one product, ``gate_up``, which for single tokens is read as it is."""

    def __call__(self, x: Float[Array, "b t d"], *, tap: Any = None) -> Float[Array, "b t d"]:
        """As `Mlp`."""
        product = getattr(self, "gate_up", None)
        if product is None or tap or x.shape[1] > 1 or self.config.activation not in ACTIVATIONS:
            return super().__call__(x, tap=tap)
        y = _second_product(product(x)[:, 0], self.down.kernel.get_value(), self.config.activation)
        return self.down.completed(y[:, None])


def _second_product(gate_up: Array, weight: Any, activation: str) -> Array:
    """``(activation(gate) * up) @ weight``."""
    if isinstance(weight, QTensor) and per_byte(weight.bits) == 2 and weight.activations == "float":
        return gated_int4_matmul(gate_up, weight.packed, weight.scale, weight.zero, activation=activation)
    return matmul(gated(gate_up, activation=activation), weight)
