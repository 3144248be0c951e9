# SPDX-License-Identifier: Apache-2.0
"""What a quantization will produce and cost, from shapes alone: no weight is read, nothing is computed.

Bytes come from the headers, operations from the plan, memory from the compiler: the step that quantizes a layer is
compiled as it will be, and asked what it holds.
"""

import dataclasses
import functools
import math
import pathlib
import resource
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from awq_jax._plan import GroupPlan, LayerPlan
from awq_jax._spec import QuantSpec, Recipe
from awq_jax._tree import nested
from awq_jax.admit import admit
from awq_jax.budget import choose
from awq_jax.gram_memory import blocked, gram_bytes
from awq_jax.hosts import Hosts
from awq_jax.layer_step import no_statistics, observe_chunk, quantize_and_measure, quantize_observed
from awq_jax.prepare import chunks_of, kernel_shapes, room_bytes, specs_of
from awq_jax.resume import refuse_output
from awq_jax.sharding import Layout
from awq_jax.streams import MEASURED
from awq_jax_convert.formats import unsaved
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.hf_config import FamilyChoice
from awq_jax_convert.writer import SHARDS_BEHIND

__all__ = ["DryRun", "LayerCost", "dry_run", "dry_run_directory", "layer_bytes", "layer_flops"]

_SHARD = 256 << 20  # bytes that a writer gathers before it writes them


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer.

    Attributes:
      index: of the layer.
      bytes_before: of its tensors in the source.
      bytes_after: of what will be written.
      flops: floating-point operations to observe, search, round and measure it.
    """

    index: int
    bytes_before: int
    bytes_after: int
    flops: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRun:
    """A whole quantization that was not done.

    Attributes:
      layers: one entry per layer.
      bytes_before: of the source's tensors.
      bytes_after: of those that will be written.
      disk_bytes: free space that is needed: the output, and what is kept to resume from.
      device_bytes: of the largest layer's step: arguments, results and temporaries.
      host_bytes: beside them: layers as read and as written, and this process itself.
      gram_bytes: of the Gram matrices of a layer, which ``device_bytes`` includes.
      tokens: of calibration, padding included.
      notes: of which inputs less than the whole Gram matrix is kept, and which bits save nothing.
      budget: what `awq_jax.budget` chose, as plain data; None where the recipe says all widths.
    """

    layers: tuple[LayerCost, ...]
    bytes_before: int
    bytes_after: int
    disk_bytes: int
    device_bytes: int
    host_bytes: int
    gram_bytes: int
    tokens: int
    notes: tuple[str, ...] = ()
    budget: dict[str, Any] | None = None

    @property
    def peak_memory_bytes(self) -> int:
        """Of the process where the device is the CPU: its memory is the host's."""
        return self.device_bytes + self.host_bytes

    @property
    def flops(self) -> int:
        """Of all layers."""
        return sum(layer.flops for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**dataclasses.asdict(self), "peak_memory_bytes": self.peak_memory_bytes, "flops": self.flops}


def layer_bytes(checkpoint: HFCheckpoint, index: int, plan: LayerPlan) -> tuple[int, int]:
    """Bytes of a layer's tensors as they are, and as they will be."""
    prefix = f"layers/{index}/"
    before = sum(checkpoint.stored_nbytes(path) for path in checkpoint.paths() if path.startswith(prefix))
    after = before
    for path, spec, _ in (row for group in plan.groups for row in group.quantized):
        name = f"{prefix}{path}/kernel"
        after += spec.nbytes(*checkpoint.shape(name)) - checkpoint.stored_nbytes(name)
    return before, after


def _group_flops(group: GroupPlan, plan: LayerPlan, widths: Mapping[str, tuple[int, ...]], tokens: int) -> int:
    """Gram matrix, candidate scales and clipping thresholds of one group."""
    shapes = [widths[path] for path, _, _ in group.quantized]
    if not shapes:
        return 0
    k, n = shapes[0][0], sum(columns for _, columns in shapes)
    block = group.gram_block(k, plan.search.gram_limit)
    gram = 2 * k * block * (tokens // plan.search.stride(tokens, k))
    candidates = len(plan.search.candidates) if group.group.producer is not None else 1
    clip = sum(
        2 * k * widths[path][1] * _flops_a_weight_to_clip(spec, plan, k, block)
        for path, spec, may_clip in group.quantized
        if may_clip and plan.search.clip_ratios
    )
    sampled = sum(widths[path][1] for path, spec, _ in group.quantized if spec.activations != "float")
    return gram + candidates * 2 * k * (block * n + 2 * min(tokens, MEASURED) * sampled) + clip


def _flops_a_weight_to_clip(spec: QuantSpec, plan: LayerPlan, k: int, block: int) -> int:
    """Multiplications of one weight with a Gram matrix: with its group's block, and in `settle_clip` with all of it."""
    sweeps = 0 if plan.feedback is not None else 1 if spec.symmetric else 2
    tried, g = 1 + len(plan.search.clip_ratios), spec.rows_per_group(k)
    return g * tried + sweeps * (block + g * (tried + 2))


def layer_flops(
    plan: LayerPlan, widths: Mapping[str, tuple[int, ...]], tokens: int, measured: int, seq_len: int
) -> int:
    """Floating-point operations to observe, search, round and measure one layer.

    Args:
      plan: of the layer.
      widths: (inputs, outputs) of each linear, by path.
      tokens: of calibration.
      measured: tokens that the finished layer is measured on.
      seq_len: tokens of a sample.
    """
    forward = 2 * sum(k * n for k, n in widths.values())
    # Backward costs twice as much as forward.
    refined = 3 * plan.refine.steps * plan.refine.samples * seq_len if plan.refine else 0
    passes = tokens + 2 * measured + refined
    return forward * passes + sum(_group_flops(g, plan, widths, tokens) for g in plan.groups)


def _abstract_layer(checkpoint: HFCheckpoint, index: int, *, stored: bool = False) -> dict[str, Any]:
    """A layer's parameter tree with shapes for arrays, of float32 or as they are stored."""
    prefix = f"layers/{index}/"
    dtype = lambda path: checkpoint.stored_dtype(path) if stored else jnp.float32
    return nested(
        (path.removeprefix(prefix), jax.ShapeDtypeStruct(checkpoint.shape(path), dtype(path)))
        for path in checkpoint.paths()
        if path.startswith(prefix)
    )


def _coming_bytes(checkpoint: HFCheckpoint, index: int, layout: Layout) -> int:
    """What a layer that waits for its turn takes of one device; a CPU's memory has it among the layers as read."""
    if jax.default_backend() == "cpu":
        return 0
    arrays = jax.tree.leaves(layout.layer(_abstract_layer(checkpoint, index, stored=True)))
    part = lambda array: array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)
    return sum(array.dtype.itemsize * math.prod(part(array)) for array in arrays)


def _step_bytes(
    checkpoint: HFCheckpoint,
    index: int,
    plan: LayerPlan,
    chunks: tuple[int, int, int],
    layout: Layout,
    in_chunks: bool,
) -> int:
    """What the compiled step of a layer, or its two where states come in chunks, holds on one device."""
    config, (count, b, t) = checkpoint.config, chunks
    states = lambda n: layout.hidden(jax.ShapeDtypeStruct((n, b, t, config.hidden_size), jnp.float32))
    mask = lambda n: layout.activations(jax.ShapeDtypeStruct((n, b, t), jnp.bool_))
    params, tokens = layout.layer(_abstract_layer(checkpoint, index)), count * b * t
    measured = min(count, max(1, round(MEASURED / (b * t))))
    step: dict[str, Any] = {"config": config.of_layer(index), "plan": plan, "placing": layout.placing}
    if not in_chunks:
        stream = states(count) if plan.propagate else None
        whole = quantize_and_measure.lower(
            params, states(count), mask(count), stream, measured=measured, tokens=tokens, **step
        )
        return _held(whole)
    shapes = functools.partial(no_statistics, config=step["config"], plan=plan, tokens=tokens)
    total = jax.eval_shape(shapes, params, states(1), mask(1))
    sample = states(measured)
    ahead = 4 * b * t * config.hidden_size  # a chunk that is on its way
    observed = _held(observe_chunk.lower(params, total, states(1), mask(1), tokens=tokens, **step)) + ahead
    searched = _held(quantize_observed.lower(params, total, sample, sample, mask(measured), **step))
    # malloc gives back little of what the first step held, an accelerator's allocator all.
    return observed + searched if jax.default_backend() == "cpu" else max(observed, searched)


def _held(lowered: Any) -> int:
    memory: Any = lowered.compile().memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return held - memory.alias_size_in_bytes


def dry_run(
    checkpoint: HFCheckpoint,
    plans: Sequence[LayerPlan],
    *,
    samples: int,
    seq_len: int,
    batch: int,
    keep: bool = True,
    mesh: Mapping[str, int] | None = None,
    hidden_states: str = "device",
) -> DryRun:
    """Estimate a quantization.

    Args:
      checkpoint: opened: its headers were read.
      plans: of its layers.
      samples: of calibration.
      seq_len: tokens of each.
      batch: samples that go through a layer together.
      keep: finished layers are kept to resume from.
      mesh: devices to spread over; memory is then that of one.
      hidden_states: where they wait between two layers.

    Raises:
      RuntimeError: the compiler can't make a step fit the device; it says what it needs.
    """
    config, batch = checkpoint.config, min(batch, samples)
    chunks = (-(-samples // batch), batch, seq_len)
    tokens = chunks[0] * batch * seq_len
    layers, float_bytes = [], 0
    for index, plan in enumerate(plans):
        shapes = {path: checkpoint.shape(path) for path in checkpoint.paths() if path.startswith(f"layers/{index}/")}
        kernels = {
            path.removeprefix(f"layers/{index}/").removesuffix("/kernel"): (shape[-2], math.prod(shape) // shape[-2])
            for path, shape in shapes.items()  # of experts all, as if every token reached each: at most so much
            if path.endswith("/kernel") and len(shape) > 1
        }
        before, after = layer_bytes(checkpoint, index, plan)
        flops = layer_flops(plan, kernels, tokens, min(tokens, MEASURED), seq_len)
        layers.append(LayerCost(index=index, bytes_before=before, bytes_after=after, flops=flops))
        float_bytes = max(float_bytes, 4 * sum(math.prod(shape) for shape in shapes.values()))
    in_chunks = hidden_states != "device"
    steps = {(config.of_layer(index), plan): index for index, plan in enumerate(plans)}
    layout = Layout(mesh)
    layout.refuse_batch(batch)
    device = max(_step_bytes(checkpoint, index, plan, chunks, layout, in_chunks) for (_, plan), index in steps.items())
    device += max(_coming_bytes(checkpoint, index, layout) for index in range(1, len(plans))) if plans[1:] else 0
    quantized = kernel_shapes(checkpoint, plans)
    saved = sum(layer.bytes_before - layer.bytes_after for layer in layers)
    after = checkpoint.nbytes - saved
    hidden = 4 * tokens * config.hidden_size * (2 if any(plan.propagate for plan in plans) else 1)
    stem = sum(checkpoint.stored_nbytes(path) for path in checkpoint.paths() if not path.startswith("layers/"))
    embed = [path for path in checkpoint.paths() if path.startswith("embed/")]  # crosses as stored, and grows there
    looked_up = sum(checkpoint.stored_nbytes(path) + 4 * math.prod(checkpoint.shape(path)) for path in embed)
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # with the compiler's, which the run has too
    # A layer as it is read ahead, one as it is worked on, and as much again that matrix products on a CPU pack, more
    # with more threads: of layers 2,048 wide the estimate is 3 % low with 8 and 11 % with 16.
    shards = (1 + SHARDS_BEHIND) * (_SHARD + max(layer.bytes_after for layer in layers))
    beside = 3 * float_bytes + min(after, shards + stem)
    on_host = hidden_states == "host" or (hidden_states == "disk" and keep)  # the file is mapped while it is kept
    return DryRun(
        layers=tuple(layers),
        bytes_before=checkpoint.nbytes,
        bytes_after=after,
        disk_bytes=room_bytes(checkpoint, plans, tokens, keep, on_disk=hidden_states == "disk"),
        device_bytes=max(device, looked_up + (hidden // chunks[0] if in_chunks else hidden)),
        host_bytes=process + beside + (hidden if on_host else 0),
        gram_bytes=max(gram_bytes(plan, quantized) for plan in set(plans)),
        tokens=tokens,
        notes=blocked(plans, quantized),
    )


def dry_run_directory(
    src: str | pathlib.Path,
    out: str | pathlib.Path | None = None,
    *,
    recipe: Recipe,
    format: str,
    calib: str | pathlib.Path | None = None,
    samples: int,
    seq_len: int,
    batch: int,
    serve_tp: int = 1,
    family: FamilyChoice = None,
    overwrite: bool = False,
    resume: str = "auto",
    mesh: Mapping[str, int] | None = None,
    budget: float | None = None,
    hidden_states: str = "device",
) -> DryRun:
    """`dry_run` of a checkpoint directory; refuses what `quantize_checkpoint` would refuse before it reads a weight.

    Args:
      src, recipe, format, serve_tp, family, resume, mesh, hidden_states: as for `quantize_checkpoint`.
      out: the output, whose name and place are checked; None is not. Whether the disk has ``disk_bytes`` free is left
        to `awq_jax.resume.refuse_output`, so that who has not enough still learns how much it takes.
      calib: calibration text, which then says how many samples there are; None counts with as many as asked for.
      samples: of calibration at most.
      seq_len: tokens of each at most.
      batch: samples that go through a layer together.
      overwrite: the output may exist.
      budget: as for `quantize_checkpoint`. To tell which widths it would choose, weights and text are read and every
        width is tried: a good part of the work itself. The estimate is that of the rest.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: bad input, named.
      OSError: the output can't be made where it is to be.
    """
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
        processes=1,
        dry=True,
    )
    if out is not None:
        refuse_output(out, resume, overwrite=overwrite)
    plans, chosen = admitted.plans, None
    if admitted.question is not None and admitted.calib is not None:
        batches = chunks_of(admitted.calib, batch)
        chosen = choose(admitted.question, batches, layout=admitted.layout, hosts=Hosts())
        plans = chosen.applied(plans)
    sizes = {"samples": admitted.samples, "seq_len": admitted.seq_len, "batch": batch}
    keep = resume != "never"
    made = dry_run(admitted.checkpoint, plans, **sizes, keep=keep, mesh=mesh, hidden_states=hidden_states)
    notes = (*made.notes, *unsaved(format, specs_of(plans)))
    return dataclasses.replace(made, budget=None if chosen is None else chosen.to_dict(), notes=notes)
