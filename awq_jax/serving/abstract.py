# SPDX-License-Identifier: Apache-2.0
"""Models and steps without weights: what a compiler needs to know of them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from awq_jax._qtensor import QTensor
from awq_jax._tree import nested, put
from awq_jax.models import DecoderConfig, param_shapes
from awq_jax.serving.fuse import fuse
from awq_jax.serving.sharding import shapes_on, sharded_step
from awq_jax.serving.steps import advance, decode, empty_slots
from awq_jax_kernels.chips import TPUS

__all__ = ["LLAMA_8B", "abstract_params", "decode_program", "traced_for"]

LLAMA_8B = DecoderConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    norm_eps=1e-5,
    rope_theta=500000.0,
)
"""The shapes of Llama 3 8B."""


def abstract_params(
    config: DecoderConfig, *, dtype: Any = jnp.bfloat16, group_size: int = 128, int4_head: bool = False
) -> dict[str, Any]:
    """Shapes of a quantized model's parameters, fused; the linears of the layers are INT4 with zero points.

    Args:
      config: of the model.
      dtype: of dense parameters and of scales.
      group_size: of the quantized weights.
      int4_head: the output head is INT4 too.
    """
    of = lambda shape, kind: jax.ShapeDtypeStruct(shape, jnp.dtype(kind))
    shapes = param_shapes(config)
    if int4_head:
        shapes["lm_head/kernel"] = (config.hidden_size, config.vocab_size)

    def leaf(path: str, shape: tuple[int, ...]) -> Any:
        module, _, name = path.rpartition("/")
        if name != "kernel" or not (path.startswith("layers/") or int4_head):
            return of(shape, jnp.float32 if module.endswith("norm") else dtype)
        k, n = shape
        scale, zero = of((k // group_size, n), dtype), of((k // group_size, n), "int8")
        return QTensor(packed=of((k // 2, n), "int8"), scale=scale, zero=zero)

    tree = nested((path, leaf(path, shape)) for path, shape in shapes.items())
    fused = dict(jax.eval_shape(fuse, tree))
    return put(fused, "layers", {str(i): fused["layers"][str(i)] for i in range(config.num_layers)})


def _padded(shares: int, leaf: Any) -> Any:
    """A shape as `awq_jax.serving.sharding.padded` makes it."""
    *rows, n = leaf.shape
    return jax.ShapeDtypeStruct((*rows, n + -n % (512 * shares)), leaf.dtype)


def traced_for(generation: str, function: Any) -> Any:
    """The function, traced as for a TPU that is not here, so that kernels take its tuned block sizes.

    Args:
      generation: a key of `awq_jax_kernels.chips.TPUS`.
      function: any.
    """
    tpu = TPUS[generation]
    device = jax.sharding.AbstractDevice(device_kind=tpu.device_kind, num_cores=tpu.cores, platform="tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            return function(*args, **kwargs)

    return traced


def decode_program(
    generation: str,
    devices: Sequence[Any],
    layers: int,
    batch: int,
    context: int,
    *,
    int4_head: bool,
    int8_cache: bool,
    steps: int = 0,
) -> tuple[Any, Any]:
    """Decode of an 8B Llama cut to some layers, and the shapes of its arguments, each with its place.

    Args:
      generation: a key of `TPUS`.
      devices: of a topology; several share heads and widths.
      layers: how many.
      batch: sequences.
      context: positions of the cache, all of which are read.
      int4_head, int8_cache: options of serving.
      steps: of the loop; 0 is one step without a loop, which is what a cost can be read from.
    """
    config = dataclasses.replace(LLAMA_8B, num_layers=layers)
    params = abstract_params(config, int4_head=int4_head)
    dtype = jnp.int8 if int8_cache else jnp.bfloat16
    slots = jax.eval_shape(functools.partial(empty_slots, config, batch, context, dtype=dtype))
    step = functools.partial(decode, steps=steps) if steps else advance
    if len(devices) > 1:
        params["lm_head"] = jax.tree.map(functools.partial(_padded, len(devices)), params["lm_head"])
        mesh = Mesh(np.array(devices), ("tp",))
        return jax.jit(sharded_step(config, mesh, step), donate_argnums=1), shapes_on(mesh, params, slots)
    here = SingleDeviceSharding(devices[0])
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
    alone = traced_for(generation, functools.partial(step, config))
    return jax.jit(alone, donate_argnums=1), jax.tree.map(place, (params, slots))
