# SPDX-License-Identifier: Apache-2.0
"""The MLP of a layer."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from awq_jax.models.config import DecoderConfig
from awq_jax.models.linear import Linear, Tap

__all__ = ["Mlp", "activate"]


def activate(config: DecoderConfig, x: Array) -> Array:
    """The config's activation function."""
    if config.activation.startswith("gelu"):
        return jax.nn.gelu(x, approximate=config.activation == "gelu_tanh")
    return jax.nn.relu(x) if config.activation == "relu" else jax.nn.silu(x)


class Mlp(nnx.Module):
    """``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))``.

    Args:
      config: of the model.
      inner: the width between; the config's intermediate_size if None.
      name: where it lies in a layer, for taps.
      dtype: of the parameters.
      rngs: for random weights.
    """

    def __init__(
        self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs, inner: int | None = None, name: str = "mlp"
    ) -> None:
        d, inner, bias = config.hidden_size, inner or config.intermediate_size, config.mlp_bias
        self.gate = Linear(d, inner, bias=bias, dtype=dtype, rngs=rngs) if config.gated else None
        self.up = Linear(d, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(inner, d, bias=bias, dtype=dtype, rngs=rngs)
        self.config, self.name = config, name

    def __call__(self, x: Float[Array, "b t d"], *, tap: Tap | None = None) -> Float[Array, "b t d"]:
        """What the MLP adds to the stream."""
        if tap:
            for part in ("gate", "up") if self.gate is not None else ("up",):
                tap(f"{self.name}/{part}", x)
        y = self.up(x)
        y = activate(self.config, y) if self.gate is None else activate(self.config, self.gate(x)) * y
        if tap:
            tap(f"{self.name}/down", y)
        return self.down(y)
