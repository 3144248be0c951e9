# SPDX-License-Identifier: Apache-2.0
"""What is opened, planned and refused before a quantization begins: headers and calibration text, no tensor."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from awq_jax._plan import LayerPlan, plan_layers
from awq_jax._spec import QuantSpec, Recipe
from awq_jax._tie import Tie
from awq_jax.calibration import Samples, check_vocabulary, from_stream, read_calibration
from awq_jax.gram_memory import with_gram_limit
from awq_jax.sharding import refuse_straddling
from awq_jax.stdlib_text import documentation
from awq_jax_convert.family_check import refuse_false_groups
from awq_jax_convert.fit import refuse_unwritable
from awq_jax_convert.formats import refuse_misfit
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.hf_config import FamilyChoice
from awq_jax_convert.scheme import Scheme
from awq_jax_convert.tokenizer import Tokenizer

__all__ = [
    "chunks_of",
    "expected_bytes",
    "kernel_shapes",
    "open_planned",
    "plans_of",
    "read_samples",
    "refuse_below_one",
    "refuse_long",
    "room_bytes",
    "specs_of",
]


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


def specs_of(plans: Sequence[LayerPlan]) -> set[QuantSpec]:
    """The formats that plans quantize to."""
    return {spec for plan in plans for group in plan.groups for _, spec, _ in group.quantized}


def _schemes(checkpoint: HFCheckpoint, plans: tuple[LayerPlan, ...]) -> dict[str, Scheme | None]:
    """What every linear of the layers is to be; None stays dense."""
    quantized = {
        f"layers/{index}/{path}/kernel": Scheme(spec.bits, spec.group_size, spec.symmetric, spec.activations)
        for index, plan in enumerate(plans)
        for group in plan.groups
        for path, spec, _ in group.quantized
    }
    linears = (path for path in checkpoint.paths() if path.startswith("layers/") and path.endswith("/kernel"))
    return {path: quantized.get(path) for path in linears}


def open_planned(
    src: pathlib.Path, recipe: Recipe, format: str, serve_tp: int = 1, family: FamilyChoice = None
) -> tuple[HFCheckpoint, tuple[LayerPlan, ...], Recipe]:
    """A dense checkpoint and what a recipe does to its layers; headers are read, no tensor is.

    Returns:
      The checkpoint, its plans, and the recipe with the limit of Gram matrices that this machine sets.

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
    refuse_unwritable(format, checkpoint, _schemes(checkpoint, plans))
    refuse_misfit(format, specs_of(plans))
    refuse_straddling(plans, shapes, serve_tp)
    return checkpoint, plans, fitted


def kernel_shapes(checkpoint: HFCheckpoint, plans: Sequence[LayerPlan]) -> dict[str, tuple[int, ...]]:
    """Shapes of what is quantized, by path relative to a layer."""
    sinks = {path for plan in plans for group in plan.groups for path, _, _ in group.quantized}
    return {path: checkpoint.shape(f"layers/0/{path}/kernel") for path in sinks}


def expected_bytes(checkpoint: HFCheckpoint, plans: tuple[LayerPlan, ...]) -> int:
    """Bytes of the tensors to be written: nibbles, a scale and a zero per group, and everything else as it was."""
    total = checkpoint.nbytes
    for index, plan in enumerate(plans):
        for path, spec, _ in (row for group in plan.groups for row in group.quantized):
            name = f"layers/{index}/{path}/kernel"
            total += spec.nbytes(*checkpoint.shape(name)) - checkpoint.stored_nbytes(name)
    return total


def room_bytes(
    checkpoint: HFCheckpoint, plans: Sequence[LayerPlan], tokens: int, keep: bool, *, on_disk: bool = False
) -> int:
    """Free space that a run needs: the output and, where layers are kept to resume from, these and three states.

    Args:
      checkpoint: opened.
      plans: of its layers.
      tokens: of calibration, padding included.
      keep: finished layers are kept.
      on_disk: hidden states wait on the disk.
    """
    expected = expected_bytes(checkpoint, tuple(plans))
    streams = 2 if any(plan.propagate for plan in plans) else 1
    state = 4 * tokens * checkpoint.config.hidden_size * streams
    return expected + (expected + 3 * state if keep else 0) + (state if on_disk else 0)


def chunks_of(samples: Samples, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask as ``[chunks, b, t]``; the last chunk is filled with masked samples."""
    count = len(samples.tokens)
    batch = min(batch, count)
    fill = ((0, -count % batch), (0, 0))
    tokens, mask = np.pad(samples.tokens, fill), np.pad(samples.mask, fill)
    return tokens.reshape(-1, batch, tokens.shape[1]), mask.reshape(-1, batch, mask.shape[1])
