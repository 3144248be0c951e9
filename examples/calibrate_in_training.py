# SPDX-License-Identifier: Apache-2.0
"""Calibrate inside a data-parallel training step: quantize every N steps and log what INT4 would cost now.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/calibrate_in_training.py

The step watches its own activations under `shard_map` and reduces the statistics over the devices, as it does with its
gradients; every twentieth step they decide a quantization, and its loss is measured. It is one program: no
calibration set is kept, no activation is stored.

On 8 fake CPU devices (jax 0.10.2; step, loss, loss at 3 bits): 0 0.6988 0.6757; 20 0.3109 0.3157; 40 0.2162 0.2222;
60 0.1680 0.1747; 80 0.1446 0.1536.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from awq_jax import QuantSpec, Recipe, adapt, all_reduce

D, INNER, STEPS, EVERY = 64, 128, 81, 20
RECIPE = Recipe(quant=QuantSpec(bits=3, group_size=32))


def student(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """A gated MLP behind a norm, and a residual."""
    h = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * params["norm"]
    return x + (jax.nn.silu(h @ params["gate"]) * (h @ params["up"])) @ params["down"]


def make_params(seed: int) -> dict[str, jax.Array]:
    """Random weights."""
    normal = lambda key, *shape: jax.random.normal(key, shape) * shape[0] ** -0.5
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    return {"norm": jnp.ones(D), "gate": normal(a, D, INNER), "up": normal(b, D, INNER), "down": normal(c, INNER, D)}


def main() -> None:
    """Train a student to imitate a teacher; log both losses."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    teacher, params, rng = make_params(0), make_params(1), np.random.default_rng(0)
    spread = np.exp(rng.standard_normal(D))
    draw = lambda: jnp.asarray(rng.standard_normal((jax.device_count() * 8, 16, D)) * spread, jnp.float32)
    table = adapt.propose(student, params, draw()[:4])
    optimizer = optax.adam(3e-3)
    loss = lambda apply, params, x: jnp.mean((apply(params, x) - student(teacher, x)) ** 2)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    def step(params: Any, state: Any, x: jax.Array) -> Any:
        def watched(params: Any) -> Any:
            y, stats = adapt.observing(student, table)(params, x)
            return jax.lax.pmean(jnp.mean((y - student(teacher, x)) ** 2), "data"), stats

        (value, stats), gradient = jax.value_and_grad(watched, has_aux=True)(params)
        update, state = optimizer.update(gradient, state)
        stats = {path: all_reduce(s, "data") for path, s in stats.items()}
        return optax.apply_updates(params, update), state, value, stats

    @jax.jit
    def quantized_loss(params: Any, stats: Any, x: jax.Array) -> jax.Array:
        return loss(adapt.serve(student), adapt.quantize_params(params, stats, table, RECIPE).params, x)

    state = optimizer.init(params)
    print(f"{jax.device_count()} devices\n\n| step | loss | loss at 3 bits |\n|---|---|---|")
    for index in range(STEPS):
        x = draw()
        before = params
        params, state, value, stats = step(params, state, x)
        if index % EVERY == 0:
            print(f"| {index} | {float(value):.4f} | {float(quantized_loss(before, stats, x)):.4f} |", flush=True)


if __name__ == "__main__":
    main()
