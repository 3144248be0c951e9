# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode of the model that `llama_8b.py` makes and quantizes: INT4 against bfloat16, on the GPU at hand.

    PYTHONPATH=kernels:convert:. python benchmarks/llama_8b_serve.py HOME --batch 1,16,64 --json serve.json

Packed and dense weights run one after the other in one process and through the same code, the steps that serving runs.
"""

import argparse
import collections
import functools
import glob
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.serving.engine import Request, start_of
from awq_jax.serving.load import load
from awq_jax.serving.steps import decode, empty_slots, prefill

KINDS = {"int4": ("int4-awq", True), "int4-dense-head": ("int4-awq", False), "bf16": ("dense", False)}


def main() -> None:
    """A row for each kind of weights, length of prompt and batch."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("home", type=pathlib.Path)
    p.add_argument("--kinds", default="int4,int4-dense-head,bf16", help="of weights")
    p.add_argument("--batch", default="1,4,16,64")
    p.add_argument("--prompt", default="512,2048", help="lengths that prefill is timed with; decode follows the first")
    p.add_argument("--steps", type=int, default=128, help="tokens of one dispatch")
    p.add_argument("--trace", type=pathlib.Path, help="folder for the device time of a step by kernel")
    p.add_argument("--json", type=pathlib.Path)
    a = p.parse_args()
    rows: list[dict[str, Any]] = []
    for kind in a.kinds.split(","):
        folder, head = KINDS[kind]
        begun = time.perf_counter()
        model = load(a.home / folder, dtype=jnp.bfloat16, int4_head=head)
        jax.block_until_ready(model.params)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / 1e9
        of_all = {"weights": kind, "load_s": round(time.perf_counter() - begun, 1), "weights_gb": round(held, 2)}
        for length in map(int, a.prompt.split(",")):
            rows.append({**of_all, **timed_prefill(model.config, model.params, length)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        for batch in map(int, a.batch.split(",")):
            trace = a.trace and a.trace / f"{kind}-{batch}.txt"
            rows.append({**of_all, **timed_decode(model, batch, int(a.prompt.split(",")[0]), a.steps, trace)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        del model
    about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "date": time.strftime("%Y-%m-%d")}
    text = json.dumps({**about, "rows": rows}, indent=1)
    print(text)
    if a.json:
        a.json.write_text(text + "\n", encoding="utf-8")


def beginner(config: Any, params: Any, length: int, budget: int) -> Callable[[Any, int], Any]:
    """A function of slots and a row that begins one sequence there."""
    step = jax.jit(functools.partial(prefill, config), donate_argnums=1)
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (1, length)).astype(np.int32)
    start = start_of(Request(prompt=(1,), max_new_tokens=budget))
    one = np.array([length], np.int32)
    return lambda slots, row: step(params, slots, tokens, one, np.array([row], np.int32), start)


def timed_prefill(config: Any, params: Any, length: int) -> dict[str, Any]:
    """One prompt."""
    slots = empty_slots(config, 1, length, dtype=jnp.bfloat16)
    begin = beginner(config, params, length, 1)
    times = []
    for _ in range(6):
        begun = time.perf_counter()
        slots, first = begin(slots, 0)
        jax.block_until_ready(first)
        times.append(time.perf_counter() - begun)
    return {"prefill": length, "ms": round(1e3 * float(np.median(times[1:])), 2), "compile_s": round(times[0], 1)}


def timed_decode(model: Any, batch: int, length: int, steps: int, trace: pathlib.Path | None) -> dict[str, Any]:
    """As many sequences, after prompts of one length."""
    span = 1 << (length + 4 * steps - 1).bit_length()
    slots = empty_slots(model.config, batch, span, dtype=jnp.bfloat16)
    begin = beginner(model.config, model.params, length, 8 * steps)
    for row in range(batch):
        slots, _ = begin(slots, row)
    step = jax.jit(functools.partial(decode, model.config, steps=steps), donate_argnums=1)
    times, drawn = [], None
    for _ in range(4):
        begun = time.perf_counter()
        slots, drawn = step(model.params, slots)
        jax.block_until_ready(drawn)
        times.append(time.perf_counter() - begun)
    assert (np.asarray(drawn) >= 0).all(), "a sequence ended before it was timed"
    each = float(np.median(times[1:])) / steps
    if trace:
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.write_text(by_kernel(lambda: step(model.params, slots)[1], steps), encoding="utf-8")
    return {
        "batch": batch,
        "context": span,
        "ms_a_token": round(1e3 * each, 3),
        "tokens_s": round(batch / each, 1),
        "compile_s": round(times[0] - each * steps, 1),
    }


def by_kernel(run: Callable[[], Any], steps: int) -> str:
    """Device microseconds of a step by kernel, the dearest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        total: dict[str, list[float]] = collections.defaultdict(list)
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            for line in plane.lines:
                if plane.name.startswith("/device:GPU") and line.name.startswith("Stream"):
                    for event in line.events:
                        total[event.name].append(event.duration_ns)
    us = lambda times: sum(times) / steps / 1e3
    rows = sorted(total.items(), key=lambda item: -us(item[1]))
    text = [f"{us(times):9.1f} us/step {len(times) / steps:7.1f} calls  {name}" for name, times in rows[:60]]
    launches = sum(map(len, total.values())) / steps
    return "\n".join([*text, f"{sum(map(us, total.values())):9.1f} us/step in all, {launches:.0f} launches", ""])


if __name__ == "__main__":
    main()
