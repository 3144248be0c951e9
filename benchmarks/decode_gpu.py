# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode of a model of Llama 3 8B's shapes with random weights on the GPU at hand, INT4 against bfloat16.

    PYTHONPATH=kernels:convert:. python -m benchmarks.decode_gpu --batch 1,4,16,64 --json decode_gpu.json

Weights are made where they lie, so a minute is enough; what runs is the step that serving runs. `llama_8b_serve.py`
times a checkpoint.
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

from awq_jax._qtensor import QTensor
from awq_jax.serving.abstract import LLAMA_8B, abstract_params
from awq_jax.serving.arrange import arranged
from awq_jax.serving.steps import decode, empty_slots
from benchmarks.llama_8b_serve import by_kernel, timed_prefill

LENGTH, SPAN, STEPS = 512, 1024, 64  # cached positions at first, positions that are read, tokens of a dispatch


def main() -> None:
    """A row for each kind of weights and batch."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kinds", default="int4,bf16")
    p.add_argument("--batch", default="1,4,16,64")
    p.add_argument("--prefill", default="512,2048", help="lengths of a prompt")
    p.add_argument("--layers", type=int, default=LLAMA_8B.num_layers)
    p.add_argument("--trace", type=pathlib.Path, help="folder for the device time of a step by kernel")
    p.add_argument("--json", type=pathlib.Path)
    a = p.parse_args()
    config = dataclasses.replace(LLAMA_8B, num_layers=a.layers)
    rows: list[dict[str, Any]] = []
    for kind in a.kinds.split(","):
        shapes = abstract_params(config, int4_head=True)
        params = made(shapes if kind == "int4" else dense(shapes))
        params = jax.block_until_ready(arranged(params, jnp.bfloat16))
        for length in map(int, a.prefill.split(",")):
            rows.append({"weights": kind, **timed_prefill(config, params, length)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        for batch in map(int, a.batch.split(",")):
            rows.append({"weights": kind, **timed(config, params, batch, a.trace and a.trace / f"{kind}-{batch}.txt")})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        del params
    about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "date": time.strftime("%Y-%m-%d")}
    text = json.dumps({**about, "layers": a.layers, "context": SPAN, "rows": rows}, indent=1)
    print(text)
    if a.json:
        a.json.write_text(text + "\n", encoding="utf-8")


def dense(shapes: Any) -> Any:
    """The same model in bfloat16."""
    is_weight = lambda leaf: isinstance(leaf, QTensor)
    bf16 = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) if is_weight(leaf) else leaf
    return jax.tree.map(bf16, shapes, is_leaf=is_weight)


def made(shapes: Any) -> Any:
    """Random parameters; scales and weights are so small that the stream stays finite."""
    keys = iter(range(1 << 20))
    return jax.tree.map(lambda leaf: _random(leaf.shape, str(leaf.dtype))(next(keys)), shapes)


@functools.cache
def _random(shape: tuple[int, ...], dtype: str) -> Any:
    def make(seed: Any) -> Any:
        key = jax.random.key(seed)
        if dtype == "int8":
            # Of zeros, which lie in 0..15 as well.
            return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8) & jnp.int8(15)
        if dtype == "float32":
            return jnp.ones(shape, jnp.float32)
        return jax.random.uniform(key, shape, dtype, 0.0005, 0.001)

    return jax.jit(make)


def timed(config: Any, params: Any, batch: int, trace: pathlib.Path | None) -> dict[str, Any]:
    """All sequences under way."""
    slots = empty_slots(config, batch, SPAN, dtype=jnp.bfloat16)
    cache = dataclasses.replace(slots.cache, lengths=slots.cache.lengths + LENGTH)
    start = dataclasses.replace(slots.start, budget=slots.start.budget + 16 * STEPS)
    slots = dataclasses.replace(slots, cache=cache, start=start)
    step = jax.jit(functools.partial(decode, config, steps=STEPS), donate_argnums=1)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        slots, drawn = step(params, slots)
        jax.block_until_ready(drawn)
        times.append(time.perf_counter() - begun)
    each = float(np.median(times[1:])) / STEPS
    if trace:
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.write_text(by_kernel(lambda: step(params, slots)[1], STEPS), encoding="utf-8")
    compiling = times[0] - each * STEPS
    return {
        "batch": batch,
        "ms_a_token": round(1e3 * each, 3),
        "tokens_s": round(batch / each, 1),
        "compile_s": round(compiling, 1),
    }


if __name__ == "__main__":
    main()
