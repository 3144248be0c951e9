# SPDX-License-Identifier: Apache-2.0
"""Where the seconds of a quantized layer go: the loop's steps timed one by one, and the loop without its writing."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from awq_jax import layer_loop
from awq_jax.sharding import Layout
from awq_jax_convert import writer
from awq_jax_convert.hf_writer import HFWriter

__all__ = ["Enough", "medians", "steps_timed", "unwritten"]


class Enough(Exception):
    """Ends a run whose output nobody wants."""


@contextlib.contextmanager
def steps_timed() -> Iterator[dict[str, list[float]]]:
    """Wall seconds of each step, one entry to a layer; "written behind" and "shard" are of other threads."""
    found: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            begun = time.perf_counter()
            try:
                return real(*args, **more)
            finally:
                found[name].append(time.perf_counter() - begun)

        return call

    read_ahead = layer_loop._read_ahead

    def read(*args: Any) -> Iterator[Any]:
        layers = read_ahead(*args)
        following = timed("wait for reading", lambda: [next(layers, None)])
        while (layer := following())[0] is not None:
            yield layer.pop()

    class Behind(layer_loop.Behind):
        do = timed("wait for writing", layer_loop.Behind.do)

    with contextlib.ExitStack() as patched:
        replace = lambda *what: patched.enter_context(mock.patch.object(*what))
        replace(layer_loop, "_read_ahead", read)
        replace(layer_loop, "Behind", Behind)
        replace(layer_loop, "_write", timed("written behind", layer_loop._write))
        replace(layer_loop, "_refuse_unusable", timed("wait for the device", layer_loop._refuse_unusable))
        replace(layer_loop, "layer_report", timed("report", layer_loop.layer_report))
        replace(Layout, "layer", timed("to the device", Layout.layer))
        replace(writer, "write_shard", timed("shard", writer.write_shard))
        yield found


@contextlib.contextmanager
def unwritten() -> Iterator[None]:
    """Layers are computed and dropped; end the run with `Enough`, for what it would publish is not whole."""
    drop = lambda job, writer, session, report, params: jax.block_until_ready(params)
    with (
        mock.patch.object(layer_loop, "_write", drop),
        mock.patch.object(HFWriter, "write_stem", lambda self, stem: None),
    ):
        yield


def medians(found: dict[str, list[float]], skip: int = 2) -> dict[str, float]:
    """Of each step, without the first layers, which are compiled."""
    return {name: round(float(np.median(times[skip:] or times)), 4) for name, times in found.items()}
