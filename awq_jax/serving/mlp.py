# SPDX-License-Identifier: Apache-2.0
"""The MLP as serving runs it: what lies between the two products is one operation for a token of each row."""

from typing import Any

from jaxtyping import Array, Float

from awq_jax.models.mlp import Mlp
from awq_jax_kernels.gated import ACTIVATIONS, gated

__all__ = ["GatedMlp"]


class GatedMlp(Mlp):
    """`Mlp` with gate and up in one product, ``gate_up``; for single tokens `gated` reads it as it is."""

    def __call__(self, x: Float[Array, "b t d"], *, tap: Any = None) -> Float[Array, "b t d"]:
        """As `Mlp`."""
        product = getattr(self, "gate_up", None)
        if product is None or tap or x.shape[1] > 1 or self.config.activation not in ACTIVATIONS:
            return super().__call__(x, tap=tap)
        y = gated(product(x)[:, 0], activation=self.config.activation)
        return self.down(y[:, None])
