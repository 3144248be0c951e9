# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel decode of a model of Llama 3 70B's shapes on the GPUs at hand, INT4 against bfloat16.

    PYTHONPATH=kernels:convert:. python benchmarks/llama_70b.py --chips 1,2,4 --batch 1,16 --json llama_70b.json

Weights are random and made where they lie, so no disk is needed; what runs is the step that serving runs
(`awq_jax.serving.sharding`). A model that does not fit is left out by its size, before anything is made.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from awq_jax._qtensor import QTensor
from awq_jax.serving.abstract import LLAMA_8B, abstract_params
from awq_jax.serving.sharding import shapes_on, sharded_programs, sharded_slots

CONFIG = dataclasses.replace(
    LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8
)
CONTEXT = 512  # positions that each sequence has when it is timed


def main() -> None:
    """A row for each number of chips, kind of weights and batch."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--chips", default="1,2,4")
    p.add_argument("--batch", default="1,16")
    p.add_argument("--layers", type=int, default=CONFIG.num_layers)
    p.add_argument("--shrink", type=int, default=1, help="divides every width, to rehearse")
    p.add_argument("--steps", type=int, default=64)
    p.add_argument("--json", type=pathlib.Path)
    a = p.parse_args()
    config = shrunk(dataclasses.replace(CONFIG, num_layers=a.layers), a.shrink)
    rows: list[dict[str, Any]] = []
    found = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "date": time.strftime("%Y-%m-%d")}
    found |= {"layers": config.num_layers, "context": CONTEXT, "rows": rows}

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if a.json:  # whatever ends the next one, this one is kept
            a.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    for chips in map(int, a.chips.split(",")):
        mesh = Mesh(np.array(jax.devices()[:chips]), ("tp",))
        for weights in ("int4", "bf16"):
            shapes = shapes_of(config, chips, dense=weights == "bf16")
            row = {"chips": chips, "weights": weights, "gb_a_chip": round(bytes_of(shapes) / chips / 1e9, 2)}
            if not fits(row["gb_a_chip"]):
                add({**row, "left out": "does not fit"})
            else:
                params = made(mesh, config, shapes)
                for b in a.batch.split(","):
                    add({**row, **timed(mesh, config, params, int(b), a.steps)})
                del params
    print(json.dumps(found, indent=1))


def shrunk(config: Any, by: int) -> Any:
    """The same layers, narrower."""
    narrow = {name: getattr(config, name) // by for name in ("vocab_size", "hidden_size", "intermediate_size")}
    return dataclasses.replace(config, num_heads=config.num_heads // by, **narrow)


def shapes_of(config: Any, chips: int, *, dense: bool) -> dict[str, Any]:
    """Parameters as serving holds them: fused, the head padded for the chips."""
    params = abstract_params(config, int4_head=True)
    is_weight = lambda leaf: isinstance(leaf, QTensor)
    if dense:
        bf16 = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) if is_weight(leaf) else leaf
        params = jax.tree.map(bf16, params, is_leaf=is_weight)
    wide = lambda leaf: jax.ShapeDtypeStruct(
        (leaf.shape[0], leaf.shape[1] + -leaf.shape[1] % (512 * chips)), leaf.dtype
    )
    return {**params, "lm_head": jax.tree.map(wide, params["lm_head"])}


def bytes_of(tree: Any) -> int:
    """Of all leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def fits(gb: float) -> bool:
    """Whether a chip has room for its share of the weights, and some for the rest."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 8e9)
    return gb * 1e9 < 0.93 * limit


def made(mesh: Mesh, config: Any, shapes: Any) -> Any:
    """Random parameters on the mesh."""
    slots = jax.eval_shape(functools.partial(sharded_slots, config, mesh, 1, 8, dtype=jnp.bfloat16))
    placed, _ = shapes_on(mesh, shapes, slots)
    keys = iter(range(1 << 20))
    return jax.tree.map(lambda leaf: random(leaf.shape, str(leaf.dtype), leaf.sharding)(next(keys)), placed)


@functools.cache
def random(shape: tuple[int, ...], dtype: str, sharding: Any) -> Any:
    """A program that makes one leaf: random codes, zeros among them; small scales and weights."""

    def make(seed: Any) -> Any:
        key = jax.random.key(seed)
        if dtype == "int8":
            codes = jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8)
            return codes & jnp.int8(15)  # as packed it is a weight too
        if dtype == "float32":
            return jnp.ones(shape, jnp.float32)
        return jax.random.uniform(key, shape, dtype, 0.0005, 0.001)

    return jax.jit(make, out_shardings=sharding)


def timed(mesh: Mesh, config: Any, params: Any, batch: int, steps: int) -> dict[str, Any]:
    """Tokens a second of one batch, all sequences under way."""
    span = CONTEXT + 8 * steps
    slots = sharded_slots(config, mesh, batch, span, dtype=jnp.bfloat16)
    cache = dataclasses.replace(slots.cache, lengths=slots.cache.lengths + CONTEXT)
    start = dataclasses.replace(slots.start, budget=slots.start.budget + 8 * steps)
    slots = dataclasses.replace(slots, cache=cache, start=start)
    decode = sharded_programs(config, mesh)[1]
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        slots, drawn = decode(params, slots, steps=steps, span=span)
        jax.block_until_ready(drawn)
        times.append(time.perf_counter() - begun)
    step = float(np.median(times[1:])) / steps
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {
        "batch": batch,
        "ms_a_token": round(1e3 * step, 3),
        "tokens_s": round(batch / step, 1),
        "compile_s": round(times[0] - steps * step, 1),
        "peak_gb": round(peak / 1e9, 2),
    }


if __name__ == "__main__":
    main()
