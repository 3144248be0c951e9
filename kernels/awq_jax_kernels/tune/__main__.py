# SPDX-License-Identifier: Apache-2.0
"""``python -m awq_jax_kernels.tune --gen v6e``: write ``int4_matmul/tuned/v6e.json``."""

import argparse
import importlib.metadata
import json
from pathlib import Path

from awq_jax_kernels.aot.tpu import compile_programs
from awq_jax_kernels.bench.cost import kernel_cost, program
from awq_jax_kernels.bench.shapes import parse_shapes
from awq_jax_kernels.chips import TPUS
from awq_jax_kernels.int4_matmul import config as configs
from awq_jax_kernels.int4_matmul.config import BlockConfig, tuned_key
from awq_jax_kernels.tune.candidates import candidates

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Tune every shape and m given, keep what the file says of others."""
    parser = argparse.ArgumentParser(prog="python -m awq_jax_kernels.tune", description=__doc__)
    parser.add_argument("--gen", required=True, help=f"one of {', '.join(TPUS)}")
    parser.add_argument("--shape", help="KxN, comma-separated; the four of the benchmark without it")
    parser.add_argument("--m", default="16,32,64,128,512")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--inside", action="store_true", help="as in a decode step, with x and y in VMEM")
    parser.add_argument("--out", type=Path, default=Path(configs.__file__).parent / "tuned")
    args = parser.parse_args(argv)
    file = args.out / f"{args.gen}.json"
    table = json.loads(file.read_text())["configs"] if file.exists() else {}
    for k, n in parse_shapes(args.shape):
        for m in map(int, args.m.split(",")):
            us, best = tune(args.gen, m, k, n, args.group, inside=args.inside)
            changed = {name: v for name, v in vars(best).items() if name != "interpret"}
            for zeros in (True, False):
                table[tuned_key(m, k, n, args.group, zeros)] = changed
            print(f"{args.gen} {m:4} x {k} x {n}: {us:6.1f} us {changed}", flush=True)
            versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
            file.write_text(json.dumps({"versions": versions, "configs": dict(sorted(table.items()))}, indent=1) + "\n")
    return 0


def tune(generation: str, m: int, k: int, n: int, g: int, *, inside: bool = False) -> tuple[float, BlockConfig]:
    """The cheapest candidate and its microseconds, by `awq_jax_kernels.bench.cost`.

    Args:
      generation: key of `TPUS`.
      m, k, n, g: the product's sizes.
      inside: between the operations of a decode step, with x and y in VMEM.

    Raises:
      RuntimeError: none compiles.
    """
    tried = candidates(generation, m, k, n, g)
    programs = [program("ours", m=m, k=k, n=n, g=g, still=True, inside=inside, config=vars(c)) for c in tried]
    compiled = compile_programs(programs, generation)
    ranked = [
        (kernel_cost(generation, config, result, m, k, n, g, zeros=True, inside=inside).us, config)
        for config, result in zip(tried, compiled, strict=True)
        if not result.error
    ]
    if not ranked:
        raise RuntimeError(f"no config for {m} x {k} x {n} compiles for {generation}: {compiled[0].error}")
    return min(ranked, key=lambda pair: pair[0])


if __name__ == "__main__":
    raise SystemExit(main())
