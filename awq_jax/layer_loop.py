# SPDX-License-Identifier: Apache-2.0
"""The layers of a checkpoint, one after the other: read, quantized, written, kept to resume from."""

import dataclasses
import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from awq_jax._plan import LayerPlan
from awq_jax._qtensor import QTensor
from awq_jax._tree import leaves
from awq_jax.behind import Behind
from awq_jax.coverage import layer_report
from awq_jax.hidden_states import OnDisk, OnHost
from awq_jax.hosts import Hosts
from awq_jax.layer_step import LayerOutcome
from awq_jax.report import LayerReport
from awq_jax.resume import Session
from awq_jax.resume.layers import report_of
from awq_jax.sharding import Layout
from awq_jax.streams import InChunks, Streams, Whole, float32
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.sink import ModelWriter

__all__ = ["Clock", "Job", "Progress", "quantize_layers"]

Progress = Callable[[LayerReport, int], None]


class Clock:
    """Wall seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what the block takes to a phase."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begun


@dataclasses.dataclass(frozen=True)
class Job:
    """What stays the same from layer to layer."""

    checkpoint: HFCheckpoint
    plans: tuple[LayerPlan, ...]
    layout: Layout
    hosts: Hosts
    clock: Clock
    progress: Progress | None
    keep: bool  # finished layers, to resume from
    strict: bool = False  # activations that are not finite are an error
    waiting: OnHost | OnDisk | None = None  # where hidden states are between two layers, if not on the device


def _read_ahead(checkpoint: HFCheckpoint, layout: Layout, start: int) -> Iterator[Any]:
    """The layers in order, as they are stored, on the devices; while one is worked on the next one travels.

    Whoever takes a layer has it alone: it leaves the devices when it has become float32.
    """
    read = lambda index: layout.layer(checkpoint.layer(index, None))
    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(read, start)] if start < checkpoint.config.num_layers else []
        for following in range(start + 1, checkpoint.config.num_layers + 1):
            layer = [coming.pop().result()]
            if following < checkpoint.config.num_layers:
                coming.append(reader.submit(read, following))
            yield layer.pop()


def _refuse_unusable(index: int, params: Any, outcome: LayerOutcome, *, strict: bool) -> None:
    """Stop at what would be silently wrong: scales outside their dtype's range; with strict, activations too."""
    if strict and (taps := [tap for tap, finite in outcome.finite.items() if not np.all(finite)]):
        raise ValueError(
            f"activations at layers/{index}/{', '.join(taps)} are not finite; what reads them would be rounded to "
            "nearest. Look at the weights before them and at the calibration text, or leave out --strict."
        )
    for path, leaf in leaves(params):
        if isinstance(leaf, QTensor):
            scale = np.asarray(leaf.scale).astype(np.float32)
            if np.isnan(scale).any():
                raise ValueError(f"layers/{index}/{path} has become NaN; its weights are damaged or overflow float32.")
            if not (np.isfinite(scale).all() and (scale > 0).all()):
                raise ValueError(
                    f"scales of layers/{index}/{path} leave the range of {leaf.scale.dtype} (from {scale.min():.3g} to "
                    f"{scale.max():.3g}). Use bfloat16 scales and the native format, or leave the weight in floating "
                    "point with an override."
                )


def _finished(job: Job, writer: ModelWriter | None, session: Session, resumed: int) -> Iterator[LayerReport]:
    """Write the layers that an earlier run finished; process 0 has them, the others hear of them."""
    kept = session.layers()
    for index in range(resumed):
        text = None
        if writer and job.hosts.first:
            report, params = next(kept)
            writer.write_kept(index, params)
            text = json.dumps(dataclasses.asdict(report), allow_nan=False)
        report = report_of(json.loads(job.hosts.share(f"finished layer {index}", text)))
        if job.progress:
            job.progress(report, len(job.plans))
        yield report


def _write(job: Job, writer: ModelWriter | None, session: Session, report: LayerReport, params: Any) -> None:
    """A finished layer to the output, and to what a later run goes on from."""
    if writer:
        session.check()
        writer.write_layer(report.index, params)
    if job.keep:
        session.add(report, params)


def _commit(job: Job, behind: Behind, session: Session, streams: Streams) -> None:
    """Keep the layers that were written, and what the next one starts from."""
    with job.clock.phase("keep for resuming"):
        behind.wait()
        if session.pending or job.hosts.count > 1:
            session.commit(streams.state())


def _streams(job: Job, batches: tuple[np.ndarray, np.ndarray]) -> Streams:
    config, layout = job.checkpoint.config, job.layout
    if job.waiting is not None:
        return InChunks(job.waiting, batches, config, layout)
    return Whole(batches, config, layout, propagate=job.plans[0].propagate)


def quantize_layers(
    job: Job, batches: tuple[np.ndarray, np.ndarray], writer: ModelWriter | None, session: Session, resumed: int
) -> Iterator[LayerReport]:
    """Write the layers that are finished, quantize and write the others, one after the other."""
    checkpoint, clock, streams = job.checkpoint, job.clock, _streams(job, batches)
    with clock.phase("read and write"):
        stem = checkpoint.stem(None)
        if writer:
            writer.write_stem(stem)
        yield from _finished(job, writer, session, resumed)
        kept = session.state() if session.finished else {}
    if resumed:
        streams.resume(kept)
    else:
        streams.begin(stem)
    del stem, kept
    layers = _read_ahead(checkpoint, job.layout, resumed)
    with Behind() as behind:
        for index in range(resumed, checkpoint.config.num_layers):
            plan = job.plans[index]
            job.hosts.meet(f"layer {index}")
            with clock.phase("read and write"):
                params = next(layers)
            with clock.phase("quantize"):
                params = float32(params)
                outcome = streams.through(params, checkpoint.config.of_layer(index), plan)
            _refuse_unusable(index, outcome.layer.params, outcome, strict=job.strict)
            report = layer_report(index, plan, outcome)
            with clock.phase("read and write"):
                behind.do(functools.partial(_write, job, writer, session, report, outcome.layer.params))
                if job.hosts.count > 1:
                    behind.wait()  # processes that write together do it in the same order
            if job.keep and job.hosts.share(f"keep {index}", str(session.due)) == "True":  # all fetch, or none
                _commit(job, behind, session, streams)
            try:
                if job.progress:
                    job.progress(report, len(job.plans))
            except KeyboardInterrupt:  # asked to stop: there is time to keep what was not due yet
                if job.keep and job.hosts.count == 1:
                    _commit(job, behind, session, streams)
                raise
            yield report
        with clock.phase("read and write"):
            behind.wait()
