# SPDX-License-Identifier: Apache-2.0
"""Quantize a Hugging Face checkpoint to INT4, or to INT8 with int8 activations.

Reads SRC layer by layer, measures its activations on the calibration text, searches the scales that protect the
weights that matter, folds them into the model and writes OUT, which vLLM, transformers and awq-jax load. OUT appears
only when it is complete; SRC is never changed. A run that was killed goes on where it was when it is started again.

  awq-jax quantize Llama-3.2-1B Llama-3.2-1B-int4 --calib my_text.txt
  awq-jax quantize SRC OUT --bits 3 --override 'layers/0/*=float'
  awq-jax quantize SRC OUT --method smoothquant
"""

import argparse
import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from awq_jax.cli import joining, out_of_memory
from awq_jax.cli.family_option import add_family
from awq_jax.cli.recipe_options import activations_of, recipe_of

if TYPE_CHECKING:
    from awq_jax._spec import Recipe
    from awq_jax.report import LayerReport, Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add(
        "src", type=pathlib.Path, metavar="SRC", help="Hugging Face directory: config.json, safetensors, tokenizer.json"
    )
    add("out", type=pathlib.Path, metavar="OUT", help="directory to write; must not exist")
    add(
        "--calib",
        type=pathlib.Path,
        metavar="FILE",
        help='text, or .jsonl with "text" or "input_ids" (default: Python\'s documentation, with a warning)',
    )
    add("--samples", type=int, default=128, metavar="N", help="calibration samples (%(default)s)")
    add("--seq-len", type=int, default=512, metavar="T", help="tokens of a sample (%(default)s)")
    add("--batch", type=int, default=8, metavar="B", help="samples that go through a layer together (%(default)s)")
    add(
        "--bits",
        type=int,
        choices=(2, 3, 4, 8),
        help="width of a code; 2 and 3 take the room of 4, but for 2 in compressed-tensors (4; 8 with smoothquant)",
    )
    add(
        "--budget",
        type=float,
        metavar="BITS",
        help="instead of --bits: mean bits of a weight at most, scales and zeros included; each group of each layer "
        "gets the width that costs the model least",
    )
    add(
        "--group-size",
        type=int,
        metavar="G",
        help="rows that share a scale; -1 whole columns (128; -1 with smoothquant)",
    )
    add("--symmetric", action="store_true", help="no zero points (always so with smoothquant)")
    add(
        "--scale-dtype",
        choices=("float16", "bfloat16", "float32"),
        help="of the stored scales (float16; for compressed-tensors the model's own, in which its loaders keep them)",
    )
    add(
        "--method",
        choices=("minmax", "awq", "gptq", "awq+gptq", "smoothquant"),
        default="awq",
        help="minmax: round to nearest; awq: searched scales and thresholds; gptq: rounding with error feedback; "
        "awq+gptq: both, a quarter less KL divergence than awq for 1.3 times its time on CPUs, twice on GPUs; "
        "smoothquant: 8-bit weights and int8 activations, scales searched for both (%(default)s)",
    )
    add(
        "--activations",
        choices=("float", "token", "tensor"),
        help="what multiplies weights: activations as they come, or rounded to int8 with a step for each token, or "
        "with one from the calibration text (float; token with smoothquant)",
    )
    add("--alpha", type=float, metavar="A", help="of smoothquant, 0 to 1: this exponent alone (searched in each group)")
    add(
        "--rules",
        metavar="R,…",
        help="scale rules of awq that compete with identity: paper, duo, smoothquant, article, article-literal; "
        "identity alone rounds to nearest (paper,duo)",
    )
    add("--grid", type=int, metavar="N", help="candidates of each rule (20)")
    add(
        "--objective",
        choices=("gram", "block"),
        help="gram: exact output error of the linears; block: of the attention or MLP (gram)",
    )
    add(
        "--propagate",
        choices=("dense", "quantized"),
        default="dense",
        help="what a layer is calibrated on: the float model's activations, or those that have passed through the "
        "quantized layers before it (%(default)s)",
    )
    add(
        "--refine",
        type=int,
        default=0,
        metavar="STEPS",
        help="then train codes and scales on each layer's output, 200 steps or so; takes longer than all the rest "
        "(%(default)s: off)",
    )
    add("--no-clip", action="store_true", help="awq does not search clipping thresholds")
    add(
        "--gram-limit",
        type=float,
        metavar="GB",
        help="memory of one input's Gram matrix; of a larger one only diagonal blocks are kept, and the report says so "
        "(an eighth of a device's memory)",
    )
    add(
        "--override",
        action="append",
        default=[],
        metavar="GLOB=WHAT",
        help="'layers/0/*=float' leaves weights alone, '*/mlp/down=bits:3' or '=group:64' changes them; the first wins",
    )
    add(
        "--format",
        choices=("auto", "autoawq", "compressed-tensors", "native"),
        default="auto",
        help="auto: autoawq for --bits 4, compressed-tensors for int8 activations, else native",
    )
    add_family(parser)
    add(
        "--strict",
        action="store_true",
        help="stop where activations are not finite; without it the weights that read them are rounded to nearest and "
        "the report says so",
    )
    add("--overwrite", action="store_true", help="replace OUT if awq-jax wrote it")
    add(
        "--resume",
        choices=("auto", "required", "never"),
        default="auto",
        help="auto: go on from a run that was killed, if its inputs were the same; never: discard it and keep nothing "
        "(%(default)s)",
    )
    add(
        "--hidden-states",
        choices=("device", "host", "disk"),
        default="device",
        help="where those of the calibration set wait between two layers; from host or disk they pass through a layer "
        "batch by batch, and the device's memory does not depend on --samples (%(default)s)",
    )
    add("--mesh", metavar="AXIS=N,…", help="spread over devices: data=2,model=4 (also fsdp)")
    add("--serve-tp", type=int, default=1, metavar="N", help="refuse groups that N serving devices would cut in two")
    add("--dry-run", action="store_true", help="print what would be written and what it would cost; write nothing")
    add("--json", action="store_true", help="print the report as JSON on stdout")
    add("--quiet", action="store_true", help="no progress and no summary")
    joining.add_arguments(parser)


def _describe(layer: "LayerReport") -> str:
    if layer.error is None:
        return f"layer {layer.index}: output error is not finite; round to nearest was written"
    said = f"layer {layer.index}: output error {layer.error:.2e}"
    if layer.gain is not None:
        said += f", {layer.gain:.2f}x round to nearest"
    return said + (" (fell back)" if layer.fell_back else "")


def _summary(report: "Report", out: pathlib.Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(stderr=True, soft_wrap=True, emoji=False)  # a log keeps its lines whole
    table = Table(title=f"{escape(str(out))}: output error over round to nearest's", title_justify="left")
    bits = {linear.path: str(linear.bits) for layer in report.layers for linear in layer.linears}
    shown = lambda ratio: "-" if ratio is None else f"{ratio:.3f}"
    for column in ("layer", "group", "bits", "rule", "scaled", "as written"):
        table.add_column(column)
    for layer in report.layers:
        for group in layer.groups:
            names = ", ".join(path.split("/", 2)[2] for path in group.sinks)
            chosen = f"{group.rule} {group.power:.2f}" if group.rule != "identity" else "identity"
            widths = ", ".join(dict.fromkeys(bits[path] for path in group.sinks))
            gains = shown(group.gain), shown(group.written_gain(report.recipe["search"]["objective"]))
            table.add_row(str(layer.index), names, widths, chosen, *gains)
    console.print(table)
    for layer in report.layers:
        if layer.fell_back:
            console.print(
                f"layer {layer.index} was written as round to nearest: the search did not lower its output error"
            )
    seen = {reason: path for path, reason in ((w.path, w.reason) for la in report.layers for w in la.linears) if reason}
    for reason, path in seen.items():
        console.print(f"{path} and like it: {escape(reason)}")
    for weight in report.outside:
        console.print(f"{weight.path}: {weight.reason}")
    for warning in report.warnings:
        console.print(f"[bold yellow]warning[/]: {escape(warning)}")
    if report.resumed_layers:
        console.print(f"{report.resumed_layers} layers were finished by an earlier run")
    size = f"{report.bytes_before / 1e6:.1f} MB -> {report.bytes_after / 1e6:.1f} MB"
    took = ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items())
    device = f", on the device {report.peak_device_bytes / 1e9:.2f} GB" if report.peak_device_bytes else ""
    console.print(f"{size}; {took}; peak memory {report.peak_memory_bytes / 1e9:.2f} GB{device}")
    console.print(f"weights: {report.covered}")
    if report.budget is not None:
        from awq_jax.pages.bits import bits_in_words

        console.print(f"bits: {bits_in_words(report.budget)}")
    if report.recipe["method"] == "awq":
        console.print("--method awq+gptq leaves a quarter less KL divergence, for 1.3 (CPU) to 2 (GPU) times the time")


@contextlib.contextmanager
def _kept(store: pathlib.Path) -> Iterator[None]:
    """Say where an interrupted run goes on from."""
    try:
        yield
    except KeyboardInterrupt:
        if store.is_dir():
            said = f"interrupted; the finished layers are kept in {store}, and the same command goes on from there."
            raise KeyboardInterrupt(said) from None
        raise


def _dry_run(args: argparse.Namespace, recipe: "Recipe", fmt: str, about: dict[str, str]) -> None:
    """Say what it would cost, then whether the disk has the room."""
    from awq_jax.cli.dry_run_output import show
    from awq_jax.dry_run import dry_run_directory
    from awq_jax.resume import refuse_output
    from awq_jax.sharding import parse_mesh

    if joining.asked(args):
        raise ValueError(
            "--dry-run counts for one process; leave out --distributed, --coordinator and what goes with it."
        )
    found = dry_run_directory(
        args.src,
        args.out,
        recipe=recipe,
        format=fmt,
        calib=args.calib,
        samples=args.samples,
        seq_len=args.seq_len,
        batch=args.batch,
        serve_tp=args.serve_tp,
        family=args.family,
        overwrite=args.overwrite,
        resume=args.resume,
        mesh=parse_mesh(args.mesh) if args.mesh else None,
        budget=args.budget,
        hidden_states=args.hidden_states,
    )
    show(found, about, as_json=args.json)
    refuse_output(args.out, args.resume, overwrite=args.overwrite, expected_bytes=found.disk_bytes)


def run(args: argparse.Namespace) -> int:
    """Quantize."""
    from awq_jax.resume import store_of

    if args.budget is not None and args.bits is not None:
        raise ValueError("--budget chooses the widths, so it does not go with --bits. Leave one of them out.")
    plain = args.budget is None and args.bits in (None, 4)
    fmt = args.format
    if fmt == "auto":
        fmt = "compressed-tensors" if activations_of(args) != "float" else "autoawq" if plain else "native"
    recipe = recipe_of(args, fmt)
    about = {"src": str(args.src), "out": str(args.out), "format": fmt}
    if args.dry_run:
        with out_of_memory.explained(args, store_of(args.out)):
            _dry_run(args, recipe, fmt, about)
        return 0

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from awq_jax.cli.stopping import stoppable
    from awq_jax.pipeline import quantize_checkpoint
    from awq_jax.sharding import parse_mesh

    mesh = parse_mesh(args.mesh) if args.mesh else None
    several, speaks = joining.join(args)
    if not speaks:  # another process says what there is to say
        args.quiet, args.json = True, False
    console = Console(stderr=True, quiet=args.quiet)
    columns = (
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    bars = Progress(*columns, console=console, disable=args.quiet or not sys.stderr.isatty())
    store = store_of(args.out)
    explained = out_of_memory.explained(args, store)
    with explained, _kept(store), stoppable() as stop, bars as bar, joining.stdout_kept(several):
        task = bar.add_task("reading and compiling", total=None)

        def advance(layer: "LayerReport", layers: int) -> None:
            bar.update(task, total=layers, completed=layer.index + 1, description=_describe(layer))
            if not sys.stderr.isatty():
                console.print(f"{layer.index + 1}/{layers} {_describe(layer)}")
            if layer.index + 1 < layers:  # the last one only needs its name
                stop.between()

        def tried(done: int, layers: int) -> None:
            said = f"layer {done - 1}: every width was tried"
            bar.update(task, total=layers, completed=done, description=said)
            if not sys.stderr.isatty():
                console.print(f"{done}/{layers} {said}")
            stop.between()

        report = quantize_checkpoint(
            args.src,
            args.out,
            recipe=recipe,
            budget=args.budget,
            calib=args.calib,
            samples=args.samples,
            seq_len=args.seq_len,
            batch=args.batch,
            format=fmt,
            overwrite=args.overwrite,
            resume=args.resume,
            mesh=mesh,
            serve_tp=args.serve_tp,
            family=args.family,
            hidden_states=args.hidden_states,
            strict=args.strict,
            host_timeout=args.host_timeout,
            progress=advance,
            measuring=tried,
        )
    if not args.quiet:
        _summary(report, args.out)
    if args.json:
        print(json.dumps({**about, **report.to_dict()}, allow_nan=False))
    return 0
