# SPDX-License-Identifier: Apache-2.0
"""What a run and its dry run both refuse, in one order: options, checkpoint, recipe, calibration text."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

from awq_jax._plan import LayerPlan
from awq_jax._spec import Recipe
from awq_jax.budget import Question
from awq_jax.calibration import Samples, check_vocabulary, few_tokens
from awq_jax.hidden_states import refuse_whole
from awq_jax.layer_loop import Clock
from awq_jax.prepare import kernel_shapes, open_planned, read_samples, refuse_below_one, refuse_long
from awq_jax.sharding import Layout
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.hf_config import FamilyChoice
from awq_jax_convert.sink import refuse_overlap

__all__ = ["Admitted", "admit"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Admitted:
    """A quantization that nothing speaks against so far; headers and text were read, no weight.

    Attributes:
      checkpoint: the source.
      plans: of its layers.
      recipe: with the limit of Gram matrices that this machine sets.
      question: what a budget asks; None where the recipe says all widths.
      layout: of the mesh.
      calib: samples to calibrate on; None where a dry run does without.
      samples, seq_len: shape of these, or as they were asked for.
    """

    checkpoint: HFCheckpoint
    plans: tuple[LayerPlan, ...]
    recipe: Recipe
    question: Question | None
    layout: Layout
    calib: Samples | None
    samples: int
    seq_len: int


def admit(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    recipe: Recipe,
    format: str,
    budget: float | None,
    calib: str | os.PathLike[str] | Samples | None,
    samples: int,
    seq_len: int,
    batch: int,
    mesh: Mapping[str, int] | None,
    serve_tp: int,
    family: FamilyChoice,
    hidden_states: str,
    processes: int,
    clock: Clock | None = None,
    dry: bool = False,
) -> Admitted:
    """Open, plan and refuse.

    Args:
      src, out, recipe, format, budget, calib, samples, seq_len, batch, mesh, serve_tp, family, hidden_states: as for
        `quantize_checkpoint`; of the output only that it does not overlap the source is looked at here.
      processes: that work together.
      clock: times it.
      dry: without calibration text or a budget none is read.

    Raises:
      FileNotFoundError, ValueError: bad input, named.
    """
    clock = clock or Clock()
    refuse_below_one(samples=samples, seq_len=seq_len, batch=batch)
    layout = Layout(mesh)
    with clock.phase("open"):
        checkpoint, plans, recipe = open_planned(pathlib.Path(src), recipe, format, serve_tp, family)
        if out is not None:
            refuse_overlap(checkpoint.path, pathlib.Path(out))
        refuse_whole(hidden_states, plans, budget, processes)
        question = None if budget is None else Question.of(checkpoint, plans, recipe, format, budget)
    with clock.phase("calibration text"):
        if not isinstance(calib, Samples) and not (dry and calib is None and budget is None):
            path = None if calib is None else pathlib.Path(calib)
            calib = read_samples(checkpoint, path, samples=samples, seq_len=seq_len)
        if calib is not None:
            calib = _usable(calib, checkpoint, plans)
            samples, seq_len = calib.tokens.shape
    refuse_long(seq_len, checkpoint.config.max_position_embeddings)
    if samples * seq_len >= 2**31:
        raise ValueError(f"{samples} samples of {seq_len} tokens are more than 2**31 tokens; take fewer (--samples).")
    layout.refuse_batch(min(batch, samples))
    return Admitted(
        checkpoint=checkpoint,
        plans=plans,
        recipe=recipe,
        question=question,
        layout=layout,
        calib=calib,
        samples=samples,
        seq_len=seq_len,
    )


def _usable(calib: Samples, checkpoint: HFCheckpoint, plans: tuple[LayerPlan, ...]) -> Samples:
    """Samples whose ids the model has; a note where they are few for its widest input."""
    check_vocabulary(calib, checkpoint.config.vocab_size)
    widest = max((shape[-2] for shape in kernel_shapes(checkpoint, plans).values()), default=0)
    return dataclasses.replace(calib, notes=(*calib.notes, *few_tokens(calib, widest)))
