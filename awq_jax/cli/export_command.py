# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint's prefill and decode as artefacts for a platform that need not be here.

They are StableHLO with the kernels inside; `loader.py` beside them runs them with jax and numpy alone.

  awq-jax export OUT ARTEFACTS --platform tpu --chip v6e --max-len 2048
"""

import argparse
import pathlib
import sys

from awq_jax.cli.family_option import add_family


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("dir", type=pathlib.Path, metavar="DIR", help="dense or quantized checkpoint")
    add("out", type=pathlib.Path, metavar="ARTEFACTS", help="directory to create")
    add("--platform", required=True, choices=("tpu", "cuda", "cpu"), help="that runs them")
    add("--chip", metavar="NAME", help="TPU generation whose tuned block sizes are taken, such as v6e")
    add("--batch", type=int, default=8, metavar="N", help="sequences at a time (%(default)s)")
    add("--max-len", type=int, metavar="N", help="positions of each (the model's, at most 1024)")
    add("--steps", type=int, default=8, metavar="N", help="tokens for each call of decode (%(default)s)")
    add_family(parser)
    add("--int8-cache", action="store_true", help="keys and values in int8")
    add("--int4-head", action="store_true", help="round the output head to INT4 too")


def run(args: argparse.Namespace) -> int:
    """Export."""
    from awq_jax.serving.export import export

    manifest = export(
        args.dir,
        args.out,
        platform=args.platform,
        batch=args.batch,
        max_len=args.max_len,
        steps=args.steps,
        chip=args.chip,
        int8_cache=args.int8_cache,
        int4_head=args.int4_head,
        family=args.family,
    )
    size = sum(file.stat().st_size for file in args.out.iterdir())
    if args.platform == "cuda" and manifest["product"] == "xla":
        print(
            "the INT4 product in it is XLA's, which is slower than the GPU kernel: that one is staged only on a "
            "machine that has a GPU. Export there to get it, or serve with vLLM.",
            file=sys.stderr,
        )
    print(f"{args.out}: decode and {len(manifest['prefill'])} prefills for {args.platform}, {size / 1e6:.1f} MB")
    return 0
