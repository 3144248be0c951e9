# SPDX-License-Identifier: Apache-2.0
"""Serve a checkpoint on this machine, in OpenAI's dialect.

For trying out and for tests: it listens on 127.0.0.1 alone and knows no users. docs/serving.md says how to serve the
same checkpoint with vLLM.

  awq-jax serve OUT --port 8000
  curl http://127.0.0.1:8000/v1/completions \\
    -H 'content-type: application/json' -d '{"prompt": "Once"}'
"""

import argparse
import pathlib

from awq_jax.cli.family_option import add_family


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("dir", type=pathlib.Path, metavar="DIR", help="dense or quantized checkpoint")
    add("--port", type=int, default=8000, metavar="N", help="0 takes a free one (%(default)s)")
    add("--name", metavar="TEXT", help="of the model, for clients (the directory's)")
    add("--slots", type=int, default=8, metavar="N", help="sequences at a time (%(default)s)")
    add("--max-len", type=int, metavar="N", help="positions of a slot, prompt and answer (the model's, at most 4096)")
    add("--queue", type=int, default=64, metavar="N", help="requests that may wait (%(default)s)")
    add("--steps", type=int, default=8, metavar="N", help="tokens for each dispatch (%(default)s)")
    add("--max-body", type=int, default=1 << 20, metavar="BYTES", help="of a request (%(default)s)")
    add("--int8-cache", action="store_true", help="keys and values in int8")
    add("--int4-head", action="store_true", help="round the output head to INT4 too")
    add_family(parser)
    add("--dense", action="store_true", help="dequantize weights once, when loading; faster on a CPU")
    add("--chat-template", type=pathlib.Path, metavar="FILE", help="instead of the checkpoint's")


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from awq_jax.serving.http import serve

    serve(
        args.dir,
        port=args.port,
        name=args.name,
        slots=args.slots,
        max_len=args.max_len,
        queue=args.queue,
        steps=args.steps,
        max_body=args.max_body,
        int8_cache=args.int8_cache,
        int4_head=args.int4_head,
        dense=args.dense,
        family=args.family,
        chat_template=args.chat_template,
    )
    return 0
