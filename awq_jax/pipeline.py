# SPDX-License-Identifier: Apache-2.0
"""A checkpoint directory in, a quantized one out, one layer in memory at a time."""

import dataclasses
import os
import pathlib
import resource
from collections.abc import Mapping
from contextlib import ExitStack

import jax

from awq_jax._plan import LayerPlan
from awq_jax._spec import Recipe
from awq_jax.admit import admit
from awq_jax.budget import Chosen, Measuring, choose, kept_beside
from awq_jax.calibration import Samples
from awq_jax.gram_memory import blocked
from awq_jax.hidden_states import waiting
from awq_jax.hosts import together
from awq_jax.layer_loop import Clock, Job, Progress, quantize_layers
from awq_jax.model_card import model_card
from awq_jax.pages import quantization_page
from awq_jax.prepare import (
    chunks_of,
    expected_bytes,
    kernel_shapes,
    room_bytes,
    specs_of,
)
from awq_jax.report import LayerReport, LinearReport, Report
from awq_jax.resume import Session, fingerprint, resuming
from awq_jax_convert.formats import open_follower, open_writer, unsaved
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.hf_config import FamilyChoice
from awq_jax_convert.readers import unread
from awq_jax_convert.sink import ModelWriter

__all__ = ["quantize_checkpoint"]


def quantize_checkpoint(
    src: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    budget: float | None = None,
    calib: str | pathlib.Path | Samples | None = None,
    samples: int = 128,
    seq_len: int = 512,
    batch: int = 8,
    format: str = "autoawq",
    overwrite: bool = False,
    resume: str = "auto",
    mesh: Mapping[str, int] | None = None,
    serve_tp: int = 1,
    family: FamilyChoice = None,
    hidden_states: str = "device",
    strict: bool = False,
    host_timeout: float = 600.0,
    progress: Progress | None = None,
    measuring: Measuring = lambda done, layers: None,
) -> Report:
    """Quantize a Hugging Face checkpoint directory.

    One layer's weights, statistics and activations are in memory at a time, beside the calibration set's hidden states.
    What can be refused is refused before anything is written; the output appears under its name only when it is
    complete and was read back. A run that is killed goes on from its last finished layer when it is started again, and
    makes the same bits.

    Under `jax.distributed` every process calls this with the same arguments; process 0 writes, and an error in one ends
    it in all (`awq_jax.hosts`).

    Args:
      src: directory with config.json, safetensors and, for text, tokenizer.json.
      out: directory to write; must not exist unless ``overwrite``.
      recipe: format, search and overrides.
      budget: mean bits of a quantized weight at most, scales and zeros included: the width of what no override names is
        then chosen by group and layer, by what rounding it costs the model, and not that of the recipe
        (`awq_jax.budget`).
      calib: UTF-8 text or JSON lines, or `Samples`; None takes the Python documentation and says so.
      samples: calibration samples at most.
      seq_len: tokens of a sample at most.
      batch: samples that go through a layer together.
      format: "autoawq" or "compressed-tensors" (what vLLM and transformers load), or "native".
      overwrite: replace an existing output.
      resume: "auto" goes on from an unfinished run of the same inputs if there is one, "required" refuses to start
        anew, "never" discards what is there and keeps nothing.
      mesh: devices to spread over, for example ``{"data": 2, "model": 4}``; see `awq_jax.sharding.Layout`.
      serve_tp: refuse groups that so many serving devices would cut in two.
      family: a table, the name of one or its TOML file, instead of the one that serves config.json's architecture.
      hidden_states: where those of the calibration set wait between two layers: on the "device", or on the "host" or
        "disk", from where they pass through a layer batch by batch, so that the device's memory does not depend on how
        many there are.
      strict: activations that are not finite are an error; otherwise the weights that read them are rounded to nearest
        and named in the report.
      host_timeout: seconds that a process may keep the others waiting between two layers.
      progress: called with each `LayerReport` and the number of layers.
      measuring: called with (layers done, layers) while widths are tried.

    Returns:
      The report, also written to ``out/awq_jax_report.json``, ``.csv`` and ``.html``.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: bad input, named.
      ProcessLost: another process failed, is gone or is late.
    """
    clock = Clock()
    with together(host_timeout) as hosts:
        admitted = admit(
            src,
            out,
            recipe=recipe,
            format=format,
            budget=budget,
            calib=calib,
            samples=samples,
            seq_len=seq_len,
            batch=batch,
            mesh=mesh,
            serve_tp=serve_tp,
            family=family,
            hidden_states=hidden_states,
            processes=hosts.count,
            clock=clock,
        )
        checkpoint, plans, recipe = admitted.checkpoint, admitted.plans, admitted.recipe
        asked, layout, calib = admitted.question, admitted.layout, admitted.calib
        assert calib is not None
        with clock.phase("fingerprint"):
            decided = {"recipe": dataclasses.asdict(recipe), "format": format, "batch": batch}
            decided |= {} if checkpoint.hf.table is None else {"table": checkpoint.hf.table}
            measured = fingerprint(checkpoint.path, calib, decided, str(layout), whole=resume != "never")
            inputs = {**measured, "budget": "none" if budget is None else f"{budget!r} bits"}
            inputs["hidden states"] = "whole" if hidden_states == "device" else "in chunks"  # which sum in other orders
            hosts.agree({**inputs, "resume": resume})
        batches, chosen = chunks_of(calib, batch), None
        with ExitStack() as opened:
            session, writer = Session(None, inputs), None
            if hosts.first:
                least = plans if asked is None else asked.version(asked.widths[0])
                on_disk = hidden_states == "disk"
                room = room_bytes(checkpoint, least, batches[0].size, resume != "never", on_disk=on_disk)
                unfinished = resuming(out, resume, inputs, overwrite=overwrite, expected_bytes=room)
                session = opened.enter_context(unfinished)
            if asked is not None:
                kept = None if resume == "never" else kept_beside(out)
                with clock.phase("measure sensitivities"), hosts.explained():
                    options = {"layout": layout, "hosts": hosts, "kept": kept, "inputs": measured}
                    chosen = choose(asked, batches, **options, measuring=measuring)
                plans, recipe = chosen.applied(plans), chosen.recorded(recipe)
            expected = expected_bytes(checkpoint, plans)
            if hosts.first:
                writer = _open_writer(format, checkpoint, out, plans, recipe, overwrite, expected)
            else:
                writer = open_follower(format, checkpoint, out)
            if writer:
                opened.enter_context(writer)
            opened.enter_context(hosts.explained())  # innermost: what another process breaks is not this one's input
            resumed = int(hosts.share("finished", str(session.finished)))
            alone = writer.share(hosts) if writer and hosts.count > 1 else ""
            states = (*batches[0].shape, checkpoint.config.hidden_size)
            waits = opened.enter_context(waiting(hidden_states, states, pathlib.Path(os.path.abspath(out)).parent))
            keep = resume != "never"
            job = Job(checkpoint, plans, layout, hosts, clock, progress, keep=keep, strict=strict, waiting=waits)
            layers = tuple(quantize_layers(job, batches, writer, session, resumed))
            written = writer.nbytes if writer and hosts.first else expected
            said = (*unread(format, checkpoint.family.name), *unsaved(format, specs_of(plans)))
            said = (*filter(None, (alone,)), *said)
            report = _report(job, layers, recipe, calib, inputs, resumed, written, said, chosen)
            if writer and hosts.first:
                writer.write_text("awq_jax_report.json", report.to_json())
                writer.write_text("awq_jax_report.csv", report.to_csv())
                writer.write_text("awq_jax_report.html", quantization_page(checkpoint.path.name, report.to_dict()))
                writer.write_text("README.md", model_card(checkpoint.path.name, checkpoint.family.name, report))
        if chosen is not None and hosts.first:
            kept_beside(out).unlink(missing_ok=True)
        return report


def _open_writer(
    format: str,
    checkpoint: HFCheckpoint,
    out: str | pathlib.Path,
    plans: tuple[LayerPlan, ...],
    recipe: Recipe,
    overwrite: bool,
    expected: int,
) -> ModelWriter:
    specs = specs_of(plans)
    return open_writer(
        format,
        checkpoint,
        out,
        group_size=next(iter(specs), recipe.quant).group_size,
        symmetric=bool(specs) and all(spec.symmetric for spec in specs),
        activations=next(iter(specs), recipe.quant).activations,
        recipe=dataclasses.asdict(recipe),
        overwrite=overwrite,
        expected_bytes=expected,
    )


def _report(
    job: Job,
    layers: tuple[LayerReport, ...],
    recipe: Recipe,
    calib: Samples,
    inputs: Mapping[str, str],
    resumed: int,
    written: int,
    said: tuple[str, ...],
    chosen: Chosen | None,
) -> Report:
    """Of a run whose layers are all there."""
    report = Report(
        layers=layers,
        outside=tuple(
            LinearReport(path=path, method="float", reason=reason, bits=16, group_size=0)
            for path, reason in job.checkpoint.outside
        ),
        recipe=dataclasses.asdict(recipe),
        calibration={
            "source": calib.source,
            "samples": len(calib.tokens),
            "tokens": calib.count,
            "sha256": calib.digest,
        },
        seconds=dict(job.clock.seconds),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        bytes_before=job.checkpoint.nbytes,
        bytes_after=written,
        warnings=(*calib.notes, *blocked(job.plans, kernel_shapes(job.checkpoint, job.plans)), *said),
        inputs=dict(inputs),
        resumed_layers=resumed,
        budget=None if chosen is None else chosen.to_dict(),
        peak_device_bytes=max((d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices()),
    )
    return dataclasses.replace(report, warnings=(*report.warnings, *report.starved))
