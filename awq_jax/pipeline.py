# SPDX-License-Identifier: Apache-2.0
"""A checkpoint directory in, a quantized one out, one layer in memory at a time."""

import dataclasses
import json
import pathlib
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax._plan import LayerPlan, plan_layers
from awq_jax._qtensor import QTensor
from awq_jax._spec import QuantSpec, Recipe
from awq_jax._tie import Tie
from awq_jax._tree import leaves
from awq_jax.calibration import Samples, check_vocabulary, from_stream, read_calibration
from awq_jax.coverage import layer_report
from awq_jax.gram_memory import blocked, with_gram_limit
from awq_jax.hosts import Hosts, together
from awq_jax.layer_step import LayerOutcome, quantize_and_measure
from awq_jax.model_card import model_card
from awq_jax.models.functional import embed
from awq_jax.pages import quantization_page
from awq_jax.report import LayerReport, LinearReport, Report
from awq_jax.resume import Session, fingerprint, resuming
from awq_jax.resume.layers import report_of
from awq_jax.sharding import Layout, refuse_straddling
from awq_jax.stdlib_text import documentation
from awq_jax_convert.family_check import refuse_false_groups
from awq_jax_convert.fit import refuse_unwritable
from awq_jax_convert.formats import open_writer, refuse_misfit
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.hf_config import FamilyChoice
from awq_jax_convert.scheme import Scheme
from awq_jax_convert.sink import ModelWriter, refuse_overlap
from awq_jax_convert.tokenizer import Tokenizer

__all__ = [
    "kernel_shapes",
    "open_planned",
    "plans_of",
    "quantize_checkpoint",
    "read_samples",
    "refuse_below_one",
    "refuse_long",
]

MEASURED = 4096  # tokens that a finished layer is measured again on, against round to nearest

Progress = Callable[[LayerReport, int], None]


class _Clock:
    """Wall seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begun


def read_samples(
    checkpoint: HFCheckpoint, calib: pathlib.Path | None, *, samples: int = 128, seq_len: int = 512
) -> Samples:
    """Calibration samples from a file, or from the Python standard library's documentation without one.

    Args:
      checkpoint: whose tokenizer encodes text.
      calib: UTF-8 text or JSON lines; None takes the documentation, which is English and about Python.
      samples: how many.
      seq_len: tokens of each.

    Raises:
      ValueError: the text is too short, malformed, or has ids outside the vocabulary.
    """
    path = checkpoint.path / "tokenizer.json"
    encode = Tokenizer.from_file(path).encode if path.is_file() else None
    if calib is not None:
        found = read_calibration(calib, encode, samples=samples, seq_len=seq_len)
    elif encode is None:
        raise ValueError(f"{path} is missing, so text can't be encoded. Give pre-tokenized lines: --calib FILE.jsonl.")
    else:
        # No tokenizer makes fewer than one token of eight characters of prose; encoding the rest would take seconds.
        ids = encode(documentation("calibration")[: 8 * samples * seq_len])
        found = from_stream(ids, samples=samples, seq_len=seq_len, source="Python documentation")
        warning = (
            "no calibration text was given: the Python standard library's documentation was used. "
            "Give text like your users' (--calib FILE); another domain costs accuracy"
        )
        found = dataclasses.replace(found, notes=(warning, *found.notes))
    check_vocabulary(found, checkpoint.config.vocab_size)
    return found


def plans_of(checkpoint: HFCheckpoint, recipe: Recipe) -> tuple[LayerPlan, ...]:
    """What a recipe does to each layer of a checkpoint; see `plan_layers`."""
    config = checkpoint.config
    tie = Tie(kv_heads=config.num_kv_heads, repeats=config.num_heads // config.num_kv_heads)
    sinks = {path.removeprefix("layers/*/") for group in checkpoint.family.groups for path in group.sinks}
    widths = {path: checkpoint.shape(f"layers/0/{path}/kernel")[-2] for path in sinks}
    return plan_layers(checkpoint.family, recipe, config.num_layers, widths, tie)


def refuse_long(seq_len: int, positions: int) -> None:
    """Beyond its positions a model computes what it never does in use."""
    if seq_len > positions:
        raise ValueError(
            f"calibration samples of {seq_len} tokens are longer than the {positions} positions of the "
            f"model. Take at most {positions} (--seq-len)."
        )


def _refuse_quantized(checkpoint: HFCheckpoint) -> None:
    if checkpoint.format != "dense":
        raise ValueError(
            f"{checkpoint.path} is already quantized ({checkpoint.format}); quantizing what was rounded moves its "
            "codes again. Start from the dense checkpoint."
        )


def refuse_below_one(**values: int) -> None:
    """Refuse numbers of things of which there must be one."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1 (--{name.replace('_', '-')}).")


def _specs_of(plans: tuple[LayerPlan, ...]) -> set[QuantSpec]:
    return {spec for plan in plans for group in plan.groups for _, spec, _ in group.quantized}


def _schemes(checkpoint: HFCheckpoint, plans: tuple[LayerPlan, ...]) -> dict[str, Scheme | None]:
    """What every linear of the layers is to be; None stays dense."""
    quantized = {
        f"layers/{index}/{path}/kernel": Scheme(spec.bits, spec.group_size, spec.symmetric)
        for index, plan in enumerate(plans)
        for group in plan.groups
        for path, spec, _ in group.quantized
    }
    linears = (path for path in checkpoint.paths() if path.startswith("layers/") and path.endswith("/kernel"))
    return {path: quantized.get(path) for path in linears}


def open_planned(
    src: pathlib.Path, recipe: Recipe, format: str, serve_tp: int = 1, family: FamilyChoice = None
) -> tuple[HFCheckpoint, tuple[LayerPlan, ...]]:
    """A dense checkpoint and what a recipe does to its layers; headers are read, no tensor is.

    Raises:
      FileNotFoundError, ValueError: whatever is wrong with either, named.
    """
    checkpoint = HFCheckpoint.open(src, family)
    _refuse_quantized(checkpoint)
    plans = plans_of(checkpoint, recipe)
    shapes = kernel_shapes(checkpoint, plans)
    fitted = with_gram_limit(recipe, plans, shapes)
    plans = plans if fitted == recipe else plans_of(checkpoint, fitted)
    if checkpoint.hf.table is not None:  # nobody has tested it
        for config, plan in {checkpoint.config.of_layer(i): plan for i, plan in enumerate(plans)}.items():
            refuse_false_groups(checkpoint.family.name, config, plan)
    refuse_misfit(format, _specs_of(plans))
    refuse_unwritable(format, checkpoint, _schemes(checkpoint, plans))
    refuse_straddling(plans, shapes, serve_tp)
    return checkpoint, plans


def kernel_shapes(checkpoint: HFCheckpoint, plans: Sequence[LayerPlan]) -> dict[str, tuple[int, ...]]:
    """Shapes of what is quantized, by path relative to a layer."""
    sinks = {path for plan in plans for group in plan.groups for path, _, _ in group.quantized}
    return {path: checkpoint.shape(f"layers/0/{path}/kernel") for path in sinks}


def _expected_bytes(checkpoint: HFCheckpoint, plans: tuple[LayerPlan, ...]) -> int:
    """Bytes of the tensors to be written: nibbles, a scale and a zero per group, and everything else as it was."""
    total = checkpoint.nbytes
    for index, plan in enumerate(plans):
        for path, spec, _ in (row for group in plan.groups for row in group.quantized):
            name = f"layers/{index}/{path}/kernel"
            total += spec.nbytes(*checkpoint.shape(name)) - checkpoint.stored_nbytes(name)
    return total


def _chunks(samples: Samples, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask as ``[chunks, b, t]``; the last chunk is filled with masked samples."""
    count = len(samples.tokens)
    batch = min(batch, count)
    fill = ((0, -count % batch), (0, 0))
    tokens, mask = np.pad(samples.tokens, fill), np.pad(samples.mask, fill)
    return tokens.reshape(-1, batch, tokens.shape[1]), mask.reshape(-1, batch, mask.shape[1])


def _read_ahead(checkpoint: HFCheckpoint, start: int) -> Iterator[Any]:
    """The layers in order; the next one is read while the current one is worked on."""
    wanted = range(start, checkpoint.config.num_layers)
    with ThreadPoolExecutor(1) as reader:
        pending = [reader.submit(checkpoint.layer, index) for index in wanted[:1]]
        for index in wanted:
            layer = pending.pop().result()
            if index + 1 in wanted:
                pending.append(reader.submit(checkpoint.layer, index + 1))
            yield layer


def _refuse_unusable(index: int, params: Any, outcome: LayerOutcome) -> None:
    """Stop at what would be silently wrong: taps that saw nothing, scales outside their dtype's range."""
    for tap, tokens in outcome.tokens.items():
        if not np.sum(tokens):
            raise ValueError(f"zero tokens were seen at layers/{index}/{tap}; nothing was measured there.")
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


def quantize_checkpoint(
    src: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
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
    host_timeout: float = 600.0,
    progress: Progress | None = None,
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
      host_timeout: seconds that a process may keep the others waiting between two layers.
      progress: called with each `LayerReport` and the number of layers.

    Returns:
      The report, also written to ``out/awq_jax_report.json``.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: bad input, named.
      ProcessLost: another process failed, is gone or is late.
    """
    clock = _Clock()
    with together(host_timeout) as hosts:
        refuse_below_one(samples=samples, seq_len=seq_len, batch=batch)
        layout = Layout(mesh)
        with clock.phase("open"):
            checkpoint, plans = open_planned(pathlib.Path(src), recipe, format, serve_tp, family)
            refuse_overlap(checkpoint.path, pathlib.Path(out))
            recipe = with_gram_limit(recipe, plans, kernel_shapes(checkpoint, plans))
        with clock.phase("calibration text"):
            if not isinstance(calib, Samples):
                path = None if calib is None else pathlib.Path(calib)
                calib = read_samples(checkpoint, path, samples=samples, seq_len=seq_len)
            check_vocabulary(calib, checkpoint.config.vocab_size)
            refuse_long(calib.tokens.shape[1], checkpoint.config.max_position_embeddings)
            layout.refuse_batch(min(batch, len(calib.tokens)))
        with clock.phase("fingerprint"):
            decided = {"recipe": dataclasses.asdict(recipe), "format": format, "batch": batch}
            decided |= {} if checkpoint.hf.table is None else {"table": checkpoint.hf.table}
            inputs = fingerprint(checkpoint.path, calib, decided, str(layout), whole=resume != "never")
            hosts.agree({**inputs, "resume": resume})
        expected = _expected_bytes(checkpoint, plans)
        with ExitStack() as opened:
            session, writer = Session(None, inputs), None
            if hosts.first:
                kept = 0 if resume == "never" else expected + 3 * 4 * calib.tokens.size * checkpoint.config.hidden_size
                writer = _open_writer(format, checkpoint, out, plans, recipe, overwrite, expected)
                unfinished = resuming(out, resume, inputs, overwrite=overwrite, expected_bytes=expected + kept)
                session = opened.enter_context(unfinished)
                opened.enter_context(writer)
            opened.enter_context(hosts.explained())  # innermost: what another process breaks is not this one's input
            resumed = int(hosts.share("finished", str(session.finished)))
            job = _Job(checkpoint, plans, layout, hosts, clock, progress, keep=resume != "never")
            layers = tuple(_layers(job, _chunks(calib, batch), writer, session, resumed))
            report = _report(job, layers, recipe, calib, inputs, resumed, writer.nbytes if writer else expected)
            if writer:
                writer.write_text("awq_jax_report.json", report.to_json())
                writer.write_text("awq_jax_report.html", quantization_page(checkpoint.path.name, report.to_dict()))
                writer.write_text("README.md", model_card(checkpoint.path.name, checkpoint.family.name, report))
        return report


@dataclasses.dataclass(frozen=True)
class _Job:
    """What stays the same from layer to layer."""

    checkpoint: HFCheckpoint
    plans: tuple[LayerPlan, ...]
    layout: Layout
    hosts: Hosts
    clock: _Clock
    progress: Progress | None
    keep: bool  # finished layers, to resume from


def _open_writer(
    format: str,
    checkpoint: HFCheckpoint,
    out: str | pathlib.Path,
    plans: tuple[LayerPlan, ...],
    recipe: Recipe,
    overwrite: bool,
    expected: int,
) -> ModelWriter:
    specs = _specs_of(plans)
    return open_writer(
        format,
        checkpoint,
        out,
        group_size=next(iter(specs), recipe.quant).group_size,
        symmetric=bool(specs) and all(spec.symmetric for spec in specs),
        recipe=dataclasses.asdict(recipe),
        overwrite=overwrite,
        expected_bytes=expected,
    )


def _report(
    job: _Job,
    layers: tuple[LayerReport, ...],
    recipe: Recipe,
    calib: Samples,
    inputs: Mapping[str, str],
    resumed: int,
    written: int,
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
        warnings=(*calib.notes, *blocked(job.plans, kernel_shapes(job.checkpoint, job.plans))),
        inputs=dict(inputs),
        resumed_layers=resumed,
    )
    return dataclasses.replace(report, warnings=(*report.warnings, *report.starved))


def _finished(job: _Job, writer: ModelWriter | None, session: Session, resumed: int) -> Iterator[LayerReport]:
    """Write the layers that an earlier run finished; process 0 has them, the others hear of them."""
    kept = session.layers()
    for index in range(resumed):
        text = None
        if writer:
            report, params = next(kept)
            writer.write_layer(index, params)
            text = json.dumps(dataclasses.asdict(report), allow_nan=False)
        report = report_of(json.loads(job.hosts.share(f"finished layer {index}", text)))
        if job.progress:
            job.progress(report, len(job.plans))
        yield report


def _layers(
    job: _Job, batches: tuple[np.ndarray, np.ndarray], writer: ModelWriter | None, session: Session, resumed: int
) -> Iterator[LayerReport]:
    """Write the layers that are finished, quantize and write the others, one after the other."""
    checkpoint, layout, clock = job.checkpoint, job.layout, job.clock
    config, (tokens, mask) = checkpoint.config, map(layout.activations, batches)
    with clock.phase("read and write"):
        stem = checkpoint.stem()
        if writer:
            writer.write_stem(stem)
        yield from _finished(job, writer, session, resumed)
        kept = session.state() if session.finished else {}
    propagate, shape = job.plans[0].propagate, (*batches[0].shape, config.hidden_size)
    if resumed:
        hidden = layout.from_first(kept.get("hidden"), shape)
        stream = layout.from_first(kept.get("stream"), shape) if propagate else None
    else:
        hidden = layout.hidden(jax.jit(embed, static_argnums=0)(config, layout.whole(stem), tokens))
        stream = jnp.copy(hidden) if propagate else None  # the two part at the first quantized layer
    del stem, kept
    measured = max(1, round(MEASURED / batches[0][0].size))
    counted = int(batches[1].sum())
    for index, params in enumerate(_read_ahead(checkpoint, resumed), resumed):
        plan = job.plans[index]
        job.hosts.meet(f"layer {index}")
        with clock.phase("quantize"):
            params = layout.layer(params)
            at = config.of_layer(index)
            outcome = quantize_and_measure(
                params, hidden, mask, stream, config=at, plan=plan, measured=measured, tokens=counted
            )
            hidden = layout.hidden(outcome.hidden)
            stream = None if outcome.stream is None else layout.hidden(outcome.stream)
            outcome = layout.fetch(dataclasses.replace(outcome, hidden=None, stream=None))
        _refuse_unusable(index, outcome.layer.params, outcome)
        if writer:
            with clock.phase("read and write"):
                writer.write_layer(index, outcome.layer.params)
        report = layer_report(index, plan, outcome)
        if job.keep:
            with clock.phase("keep for resuming"):
                streams = {"hidden": hidden} | ({} if stream is None else {"stream": stream})
                fetched = {name: layout.fetch_chunks(array) for name, array in streams.items()}
                session.commit(report, outcome.layer.params, fetched)
        if job.progress:
            job.progress(report, len(job.plans))
        yield report
