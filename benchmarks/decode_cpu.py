# SPDX-License-Identifier: Apache-2.0
"""Decode on this machine's CPU: packed INT4 against the same weights dequantized once, side by side in one run.

    python benchmarks/decode_cpu.py OUT

The packed path of a CPU dequantizes a block of the weight at a time in every step (`int4_matmul.xla.blockwise`), so it
pays in time for what it saves in memory. Rounds alternate, and the quickest of each counts.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.serving import Engine, Request, load

FORMS: dict[str, dict[str, Any]] = {
    "packed INT4, float32": {},
    "dense float32": {"dense": True},
    "dense bfloat16": {"dense": True, "dtype": "bf16"},
}


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    engines: dict[str, Any] = {}
    for name, options in FORMS.items():
        dtype = jnp.bfloat16 if options.get("dtype") else jnp.float32
        model = load(args.dir, dense=bool(options.get("dense")), dtype=dtype)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
        engines[name] = held, Engine(model.config, model.params, slots=args.batch, max_len=128, steps=args.tokens - 1)
    asked = [Request(prompt=(1, 2, 3, 4 + row), max_new_tokens=args.tokens) for row in range(args.batch)]
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(args.rounds + 1):  # the first compiles
        for name, (_, engine) in engines.items():
            start = time.perf_counter()
            engine.generate(asked)
            times[name].append(time.perf_counter() - start)
    print(f"| batch {args.batch} | tokens/s | of packed | MB held |\n|---|---|---|---|")
    best = {name: args.batch * args.tokens / float(np.min(taken[1:])) for name, taken in times.items()}
    for name, rate in best.items():
        print(f"| {name} | {rate:.0f} | {rate / best['packed INT4, float32']:.2f}x | {engines[name][0] / 1e6:.1f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
