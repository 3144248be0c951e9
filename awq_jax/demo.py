# SPDX-License-Identifier: Apache-2.0
"""The whole method on the model that ships with the package: round to nearest against AWQ, plain and with outliers."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from awq_jax import stdlib_text
from awq_jax._outliers import plant_outliers
from awq_jax._publish import published, write_bytes, write_manifest
from awq_jax._spec import QuantSpec, Recipe, SearchSpec, rule
from awq_jax.evaluate import with_error
from awq_jax.pipeline import quantize_checkpoint
from awq_jax.prepare import plans_of, read_samples
from awq_jax.run import continue_prompt, evaluate_checkpoint, load_model
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.hf_writer import HFWriter

__all__ = ["MODEL", "DemoRow", "plant_checkpoint", "run_demo"]

MODEL = Path(__file__).with_name("tiny_lm")
METHODS = {
    "round to nearest": Recipe(search=SearchSpec(rules=(rule("identity"),), clip_ratios=())),
    "AWQ": Recipe(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One model of the comparison.

    Attributes:
      model: "plain", or "planted outliers": the same function with a few large channels, as large models have.
      method: "dense" (bfloat16), "round to nearest" or "AWQ" (both INT4).
      perplexity: on held-out documentation.
      perplexity_stderr: its standard error; None where the text is a single window.
      kl: divergence from the dense model, nats a token.
      top1: share of tokens on which both agree.
      nbytes: of the tensors.
      seconds: of quantizing, compilation included.
      sample: what it continues the prompt with.
    """

    model: str
    method: str
    perplexity: float
    perplexity_stderr: float | None
    kl: float
    top1: float
    nbytes: int
    seconds: float
    sample: str


def plant_checkpoint(src: str | os.PathLike[str], out: str | os.PathLike[str], *, factor: float = 32.0) -> None:
    """Write a dense checkpoint with planted outliers: the same function, exactly, as the source's.

    Args:
      src: dense Hugging Face directory.
      out: directory to create.
      factor: how far the outlier channels stick out; a power of two changes no mantissa.
    """
    source = HFCheckpoint.open(src)
    with HFWriter(source, out) as writer:
        writer.write_stem(source.stem())
        for index, plan in enumerate(plans_of(source, Recipe(quant=QuantSpec(group_size=-1)))):
            writer.write_layer(index, plant_outliers(source.layer(index), plan, factor=factor, seed=index))


def _measure(
    name: str, method: str, path: Path, dense: Path, text: Path, *, tokens: int, prompt: str, seconds: float
) -> DemoRow:
    found = evaluate_checkpoint(path, text, base=dense, tokens=tokens)
    assert found.kl is not None and found.top1 is not None  # there is a base
    model = load_model(path)
    return DemoRow(
        model=name,
        method=method,
        perplexity=found.perplexity,
        perplexity_stderr=found.perplexity_stderr,
        kl=found.kl,
        top1=found.top1,
        nbytes=model.checkpoint.nbytes,
        seconds=seconds,
        sample=continue_prompt(model, prompt, max_new_tokens=24)["text"],
    )


def run_demo(
    out: str | os.PathLike[str],
    *,
    quick: bool = False,
    prompt: str = "Return a list of",
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> tuple[DemoRow, ...]:
    """Quantize the shipped model with round to nearest and with AWQ, plain and with planted outliers, and compare.

    Args:
      out: directory to create: the dense models, the quantized ones, ``report.md`` and ``report.json``.
      quick: less text; half the time, and noisier numbers.
      prompt: what each model continues.
      overwrite: replace ``out`` if awq-jax wrote it.
      progress: called with what begins.

    Raises:
      FileExistsError: ``out`` exists.
      FileNotFoundError: this Python has no source of its standard library, whose documentation is the text.
    """
    samples, tokens = (16, 4_000) if quick else (64, 20_000)
    rows: list[DemoRow] = []
    with published(out, overwrite=overwrite) as work:
        progress("reading the standard library's documentation")
        text, calib = work / "heldout.txt", work / "calibration.txt"
        text.write_text(stdlib_text.documentation("heldout"), encoding="utf-8")
        calib.write_text(stdlib_text.documentation("calibration"), encoding="utf-8")
        plant_checkpoint(MODEL, work / "planted-dense")
        chosen = read_samples(HFCheckpoint.open(MODEL), calib, samples=samples)
        for name, dense in (("plain", MODEL), ("planted outliers", work / "planted-dense")):
            measured: dict[str, Any] = {"dense": dense, "text": text, "tokens": tokens, "prompt": prompt}
            progress(f"{name}: measuring the dense model")
            rows.append(_measure(name, "dense", dense, seconds=0.0, **measured))
            for method, recipe in METHODS.items():
                progress(f"{name}: {method}")
                target = work / f"{name.split()[0]}-{'awq' if method == 'AWQ' else 'rtn'}-int4"
                begun = time.perf_counter()
                quantize_checkpoint(dense, target, recipe=recipe, calib=chosen)
                rows.append(_measure(name, method, target, seconds=time.perf_counter() - begun, **measured))
        write_bytes(work / "report.json", json.dumps([dataclasses.asdict(row) for row in rows], indent=1).encode())
        write_bytes(work / "report.md", to_markdown(rows, prompt).encode())
        write_manifest(work, format="demo")
    return tuple(rows)


def to_markdown(rows: list[DemoRow], prompt: str) -> str:
    """The comparison as Markdown."""
    lines = [
        "# awq-jax demo",
        "",
        f"Shipped model, INT4 in groups of 128, jax {jax.__version__} on {jnp.zeros(1).device}.",
        "",
        "| model | weights | perplexity | KL to dense | same top-1 | MB | quantized in |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r.model} | {r.method} | {with_error(r.perplexity, r.perplexity_stderr)} | {r.kl:.4f} | "
            f"{100 * r.top1:.1f} % | {r.nbytes / 1e6:.1f} | {f'{r.seconds:.1f} s' if r.seconds else ''} |"
            for r in rows
        ),
        "",
        f"Continuing “{prompt}”:",
        "",
        *(f"* {r.model}, {r.method}: {json.dumps(r.sample, ensure_ascii=False)}" for r in rows),
        "",
    ]
    return "\n".join(lines)
