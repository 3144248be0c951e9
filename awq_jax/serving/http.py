# SPDX-License-Identifier: Apache-2.0
"""From a directory to a listening socket."""

import socket
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from awq_jax.serving.engine import Engine
from awq_jax.serving.extra import missing
from awq_jax.serving.load import load
from awq_jax.serving.template import ChatTemplate
from awq_jax.serving.worker import Worker
from awq_jax_convert.hf_config import FamilyChoice
from awq_jax_convert.tokenizer import Tokenizer

__all__ = ["engine_of", "serve"]

POSITIONS = 4096  # of a slot, unless asked for more: a cache for all that a model was trained on may not fit


def engine_of(
    directory: Path,
    *,
    slots: int = 8,
    max_len: int | None = None,
    queue: int = 64,
    steps: int = 8,
    int8_cache: bool = False,
    int4_head: bool = False,
    dense: bool = False,
    family: FamilyChoice = None,
) -> tuple[Engine, Tokenizer, tuple[int, ...]]:
    """An engine over a checkpoint, its tokenizer, and the tokens that end a text; see `Engine` and `load`.

    Raises:
      FileNotFoundError: no checkpoint, or no tokenizer in it.
      ValueError: a number is outside its range.
    """
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json") if directory.is_dir() else None
    model = load(
        directory,
        dtype=jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16,
        int4_head=int4_head,
        dense=dense,
        family=family,
    )
    assert tokenizer is not None  # load refuses what is no directory
    length = min(POSITIONS, model.config.max_position_embeddings) if max_len is None else max_len
    engine = Engine(
        model.config,
        model.params,
        slots=slots,
        max_len=length,
        steps=steps,
        queue=queue,
        cache_dtype=jnp.int8 if int8_cache else None,
    )
    return engine, tokenizer, model.checkpoint.hf.stop_tokens


def serve(
    directory: Path,
    *,
    port: int,
    name: str | None = None,
    max_body: int = 1 << 20,
    chat_template: Path | None = None,
    **options: Any,
) -> None:
    """Listen on 127.0.0.1 until a signal asks to end; what is under way is finished.

    Args:
      directory: of the checkpoint.
      port: 0 takes a free one; the line that is printed says which.
      name: of the model.
      max_body: bytes of a request.
      chat_template: file instead of the checkpoint's.
      **options: of `engine_of`.

    Raises:
      ValueError: an option is outside its range, or the extra is not installed.
      OSError: the port is taken.
    """
    try:
        import uvicorn

        from awq_jax.serving.server import Limits, Served, application
    except ModuleNotFoundError as error:
        raise missing("serving needs", error.name) from error
    if not 0 <= port < 1 << 16 or max_body < 1:
        raise ValueError(f"port {port} and max-body {max_body}: a port lies between 0 and 65535, a body has bytes.")
    if chat_template is not None and not chat_template.is_file():
        raise FileNotFoundError(f"no chat template {chat_template}.")
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with listening:
        _bind(listening, port)  # first: a taken port is found before minutes of loading
        print(f"reading {directory} and compiling", file=sys.stderr, flush=True)  # minutes, for a large one
        engine, tokenizer, stops = engine_of(directory, **options)
        template = ChatTemplate.of_checkpoint(directory, chat_template)
        engine.compile()  # before the first client waits for it
        served = Served(
            name=name or directory.resolve().name,
            worker=Worker(engine),
            tokenizer=tokenizer,
            template=template,
            stop_tokens=stops,
            limits=Limits(body_bytes=max_body),
        )
        listening.listen(128)  # before the line below: who reads it may connect at once
        print(f"serving {served.name} on http://127.0.0.1:{listening.getsockname()[1]}/v1", flush=True)
        config = uvicorn.Config(
            application(served),
            log_level="warning",
            timeout_graceful_shutdown=30,
            limit_concurrency=1024,
            h11_max_incomplete_event_size=1 << 16,
            server_header=False,
        )
        uvicorn.Server(config).run(sockets=[listening])


def _bind(listening: socket.socket, port: int) -> None:
    """Of this machine alone."""
    try:
        listening.bind(("127.0.0.1", port))
    except OSError as error:
        why = f"{error.strerror}; take another (--port), or 0 for one that is free"
        raise type(error)(error.errno, why, f"port {port}") from None
