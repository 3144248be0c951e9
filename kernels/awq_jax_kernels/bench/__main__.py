# SPDX-License-Identifier: Apache-2.0
"""``python -m awq_jax_kernels.bench``, see the package."""

import argparse
import importlib.metadata

import jax

from awq_jax_kernels.bench import gpu_static, report, timing
from awq_jax_kernels.bench.shapes import parse_shapes

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Print one table."""
    parser = argparse.ArgumentParser(prog="python -m awq_jax_kernels.bench", description=__doc__)
    parser.add_argument("--static", action="store_true", help="cost by the compiler, without a TPU")
    parser.add_argument("--gen", default="v5e,v6e,v5p,v7x", help="with --static: TPU generations")
    parser.add_argument("--gpu", help="with --static: the assembler's count for this GPU instead, such as h100")
    parser.add_argument("--no-others", action="store_true", help="with --static: the kernel alone")
    parser.add_argument("--interpret", action="store_true", help="a small product in interpret mode, to try the path")
    parser.add_argument("--shape", help="KxN, comma-separated")
    parser.add_argument("--m", default="16,32,64,128,512")
    args = parser.parse_args(argv)
    shapes = parse_shapes(args.shape or ("256x256" if args.interpret else None))
    ms = [4] if args.interpret else [int(m) for m in args.m.split(",")]
    if args.static and args.gpu:
        return gpu_static.main(["--gpu", args.gpu])
    if args.static:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
        print(f"{versions}; microseconds (speed-up over the bf16 bound): {', '.join(report.COLUMNS)}")
        for generation in args.gen.split(","):
            for row in report.static_rows(generation, shapes, ms, others=not args.no_others):
                print(report.format_row(row), flush=True)
        return 0
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; microseconds (speed-up over bf16)")
    for k, n in shapes:
        for m in ms:
            us = timing.compare(m, k, n, interpret=args.interpret)
            cells = "  ".join(f"{name} {t:.1f} ({us['bf16'] / t:.2f}x)" for name, t in us.items())
            print(f"{m:4} x {k:5} x {n:5}  {cells}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
