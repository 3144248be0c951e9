# SPDX-License-Identifier: Apache-2.0
"""One decode step of a whole model on TPUs that are not here, by their compiler, against the least bfloat16 needs.

    python benchmarks/decode.py --json benchmarks/results/decode.json
    python benchmarks/decode.py --slices v6e-1,v5e-4 --batch 1,4,16 --context 512,2048 --cache bfloat16,int8

The model is config only: Llama 3 8B's shapes, abstract weights, groups of 128 with zero points, an INT4 head. A slice
of several chips shares heads and widths. libtpu compiles the step that serving runs (`awq_jax.serving.steps`), 1 and 2
layers deep; layers are alike, so ``t = t(1) + (layers - 1) * (t(2) - t(1))``. The time of one depth is the sum over the
operations of the compiled step, one after the other:

* the kernels by the models of `awq_jax_kernels.bench.cost`, `.decode_attention.cost` and `.add_norm.cost`, all of 16
  rows, so that small batches are not flattered, their activations in VMEM; where the compiled step has them in HBM,
  each of them costs a latency and its bytes (under "rest");
* every other operation by the larger of XLA's own estimate and the bytes it moves in HBM over the bandwidth;
* XLA gives no estimate of gathers and scatters (600 cycles a row of HBM are taken, elsewhere a launch) and none of
  collectives: an all-reduce is taken for ``HOP_US (chips - 1) + 2 bytes / ICI``, which is an assumption and not the
  compiler's.

The bound is a bfloat16 model's with a bfloat16 cache of the same context, which no program reaches: the bytes of
weights and cache over the bandwidth of all chips, or the products at their peak rate, and no communication.

``--whole SLICE`` compiles decode of all layers, eight tokens to a dispatch, and says what a chip holds; minutes.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from awq_jax.models import param_shapes
from awq_jax.serving.abstract import LLAMA_8B as C
from awq_jax_kernels.add_norm import cost as norm_cost
from awq_jax_kernels.aot.schedule import LATENCY_CYCLES
from awq_jax_kernels.aot.tpu import compile_programs, environment
from awq_jax_kernels.bench.cost import kernel_cost, program
from awq_jax_kernels.chips import TPUS
from awq_jax_kernels.decode_attention import cost as attention_cost
from awq_jax_kernels.decode_attention.form import Form
from awq_jax_kernels.int4_matmul.config import for_tpu, resident

BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1, "s4": 0.5, "f16": 2, "s16": 2}
SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
LAUNCH = 2100  # cycles that XLA charges an operation for being started
TOPOLOGIES = {("v5e", 4): "v5e:2x2", ("v5e", 8): "v5e:2x4", ("v6e", 4): "v6e:2x2", ("v6e", 8): "v6e:2x4"}
TOPOLOGIES |= {("v5p", 4): "v5p:2x2x1"}
ICI_GB_S = {"v5e": 200.0, "v6e": 448.0, "v5p": 600.0}  # of a chip, the vendor's figure
HOP_US = 1.0
ROWS = 16


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of one generation that share a model."""

    gen: str
    chips: int

    @classmethod
    def of(cls, name: str) -> "Slice":
        """From a name such as "v6e-4"."""
        gen, _, chips = name.partition("-")
        return cls(gen, int(chips))


def main() -> int:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", default="v5e-1,v6e-1,v5e-4,v6e-4,v5p-4,v5e-8,v6e-8")
    parser.add_argument("--batch", default="1,4,16")
    parser.add_argument("--context", default="512,2048")
    parser.add_argument("--cache", default="bfloat16,int8")
    parser.add_argument("--json", type=Path, help="write the rows there too; those of other slices stay")
    parser.add_argument("--whole", metavar="SLICE")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        compile_here(**json.loads(args.child))
        return 0
    if args.whole:
        held = compiled(Slice.of(args.whole), C.num_layers, steps=8)
        held = {key: held[key] for key in ("kernels", "argument_bytes", "alias_bytes", "temp_bytes")}
        print(args.whole, json.dumps(held))
        if args.json:
            keep(args.json, [], {args.whole: held})
        return 0
    numbers = lambda text: [int(n) for n in text.split(",")]
    contexts, caches = numbers(args.context), args.cache.split(",")
    columns = [f"{context}, {cache}" for context in contexts for cache in caches]
    print(f"| slice | batch | products | rest | chips talk | {' | '.join(columns)} | GB a chip |")
    print("|---" * (len(columns) + 6) + "|")
    rows: list[dict[str, Any]] = []
    for name in args.slices.split(","):
        for batch in numbers(args.batch):
            found = list(cases(Slice.of(name), batch, contexts, caches))
            print(line(name, found), flush=True)
            rows += [{"slice": name, **row} for row in found]
        if args.json:
            keep(args.json, rows)
    return 0


def keep(file: Path, rows: list[dict[str, Any]], whole: dict[str, Any] | None = None) -> None:
    """Write rows, and what whole models hold, to a file in the place of what it has of the same slices."""
    mine = {row["slice"] for row in rows}
    before = json.loads(file.read_text()) if file.exists() else {"whole": {}, "rows": []}
    every = [*(row for row in before["rows"] if row["slice"] not in mine), *rows]
    head = {"versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}}
    head["whole"] = {**before["whole"], **(whole or {})}
    lines = ",\n".join("  " + json.dumps(row) for row in every)
    file.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')


def line(name: str, rows: list[dict[str, Any]]) -> str:
    """A line of the table: what all contexts share, and of each the whole and its speed-up."""
    first, last = rows[0], rows[-1]
    shared = [first[key] for key in ("batch", "products_ms", "rest_ms", "collectives_ms")]
    each = [f"{row['int4_ms']} ({row['speedup']})" for row in rows]
    return f"| {' | '.join(map(str, [name, *shared, *each, last['chip_gb']]))} |"


def cases(where: Slice, batch: int, contexts: list[int], caches: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each context and cache of one slice."""
    one, two = step_of(where)
    cores = {dtype: core_of(where, dtype) for dtype in caches}
    norms = (2 * C.num_layers + 1) * norm_us(where.gen)
    all_layers = lambda key: one[key] + (C.num_layers - 1) * (two[key] - one[key])
    *layer, head = [product(batch) for product in products(where)]
    matmuls, rest, talk = C.num_layers * sum(layer) + head, norms + all_layers("xla_us"), talk_us(where, batch)
    for context in contexts:
        for dtype in caches:
            shape = form(where, batch, context, dtype)
            attention = C.num_layers * attention_cost.microseconds(where.gen, shape, cores[dtype], inside=True)
            total, least = matmuls + attention + rest + talk, bound_us(where, batch, context)
            ms = lambda us: round(us / 1e3, 2)
            yield {
                "batch": batch,
                "context": context,
                "cache": dtype,
                "products_ms": ms(matmuls),
                "attention_ms": ms(attention),
                "rest_ms": ms(rest),
                "collectives_ms": ms(talk),
                "int4_ms": ms(total),
                "bf16_bound_ms": ms(least),
                "speedup": f"{least / total:.2f}x",
                "speedup_without_launches": round(least / (total - all_layers("launch_us")), 2),
                "head_ms": ms(head),
                "temp_mb": round(two["temp_bytes"] / 1e6, 1),
                "chip_gb": round(held_bytes(where, batch, context, dtype) / 1e9, 2),
            }


@functools.cache
def step_of(where: Slice) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the compiler says of steps one and two layers deep."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda layers: compiled(where, layers, steps=0), (1, 2))
    if two["kernels"] - one["kernels"] != 7:  # four products, attention, two norms
        raise RuntimeError(f"{where}: one layer has {one['kernels']} kernels and two have {two['kernels']}.")
    return one, two


@functools.cache
def core_of(where: Slice, dtype: str) -> attention_cost.Core:
    """What attention costs a chip's core."""
    return attention_cost.core_of(where.gen, form(where, ROWS, 512, dtype))


@functools.cache
def norm_us(gen: str) -> float:
    """Of one sum and norm."""
    return norm_cost.microseconds(gen, ROWS, C.hidden_size)


def talk_us(where: Slice, batch: int) -> float:
    """Two sums over the chips in a layer, and two small exchanges for the token; an assumption."""
    if where.chips == 1:
        return 0.0
    moved = 4 * batch * C.hidden_size / ICI_GB_S[where.gen] / 1e3
    return (2 * C.num_layers + 2) * HOP_US * (where.chips - 1) + 2 * C.num_layers * moved


def form(where: Slice, batch: int, context: int, dtype: str) -> Form:
    """The attention of one chip."""
    heads, kv = C.num_heads // where.chips, C.num_kv_heads // where.chips
    return Form(batch, heads, kv, C.head_dim, context, context, dtype, C.head_dim**-0.5, None, None)


@functools.cache
def products(where: Slice) -> list[Callable[[int], float]]:
    """Microseconds by batch of a layer's four products on one chip, and of the head's."""
    kv, n = C.num_kv_heads * C.head_dim, where.chips
    wide, inner, d = C.num_heads * C.head_dim, C.intermediate_size, C.hidden_size
    vocab = C.vocab_size if n == 1 else (C.vocab_size + -C.vocab_size % (512 * n)) // n
    shapes = [(d, (wide + 2 * kv) // n), (wide // n, d), (d, 2 * inner // n), (inner // n, d), (d, vocab)]
    configs = [for_tpu(TPUS[where.gen], ROWS, *shape, 128, zeros=True, exact=False) for shape in shapes]
    # The product behind the gate makes its own x, where that lies in VMEM.
    down = resident(configs[3], ROWS, 2 * shapes[3][0], shapes[3][1])
    gates = [None, None, None, "silu" if down else None, None]
    programs = [
        program("ours", still=True, inside=True, gate=gate, config=vars(config), m=ROWS, k=k, n=n, g=128)
        for config, (k, n), gate in zip(configs, shapes, gates, strict=True)
    ]
    stills = compile_programs(programs, where.gen)
    if errors := [still.error for still in stills if still.error]:
        raise RuntimeError(f"{where}: {errors[0]}")

    def cost(config: Any, still: Any, k: int, n: int, batch: int) -> float:
        return kernel_cost(where.gen, config, still, batch, k, n, 128, zeros=True, inside=True).us

    return [functools.partial(cost, c, still, *shape) for c, still, shape in zip(configs, stills, shapes, strict=True)]


def bound_us(where: Slice, batch: int, context: int) -> float:
    """The least that a bfloat16 step can take."""
    tpu = TPUS[where.gen]
    weights = sum(math.prod(s) for path, s in param_shapes(C).items() if path.endswith("kernel"))
    cache = 2 * C.num_layers * batch * context * C.num_kv_heads * C.head_dim
    both = max(2 * (weights + cache) / tpu.hbm_gb_s, 2 * batch * weights / tpu.bf16_tflop_s / 1e3)
    return both / 1e3 / where.chips


def held_bytes(where: Slice, batch: int, context: int, dtype: str) -> float:
    """What a chip holds beside temporaries: its share of INT4 weights and cache, and all of the embedding."""
    weights = (0.5 + 3 / 128) * sum(math.prod(s) for path, s in param_shapes(C).items() if path.endswith("kernel"))
    width = 1 + 4 / C.head_dim if dtype == "int8" else 2
    cache = 2 * C.num_layers * batch * context * C.num_kv_heads * C.head_dim * width
    return (weights + cache) / where.chips + 2 * C.vocab_size * C.hidden_size


def compiled(where: Slice, layers: int, steps: int) -> dict[str, Any]:
    """What libtpu says, from a child: it reads its flags once, when it loads."""
    with tempfile.TemporaryDirectory(prefix="awq_jax_decode_") as folder:
        out = Path(folder, "out.json")
        request = {"gen": where.gen, "chips": where.chips, "layers": layers, "steps": steps, "out": str(out)}
        env = {**os.environ, **environment(Path(folder), profile=False), "LIBTPU_INIT_ARGS": ""}
        done = subprocess.run([sys.executable, __file__, "--child", json.dumps(request)], env=env, capture_output=True)
        if done.returncode:
            raise RuntimeError(done.stderr.decode(errors="replace")[-2000:])
        return json.loads(out.read_text())


def compile_here(gen: str, chips: int, layers: int, steps: int, out: str) -> None:
    """The child: 16 sequences over a bfloat16 cache of 512 positions."""
    from jax.experimental import topologies

    from awq_jax.serving.abstract import decode_program
    from awq_jax_kernels.aot.schedule import kernel_names

    tpu = TPUS[gen]
    narrow = {"chips_per_host_bounds": [1, 1, 1]} if chips == 1 and tpu.single_chip else {}
    name = TOPOLOGIES[gen, chips] if chips > 1 else tpu.topology
    devices = topologies.get_topology_desc(name, platform="tpu", **narrow).devices[:chips]
    step, shapes = decode_program(gen, devices, layers, ROWS, 512, steps=steps, int4_head=True, int8_cache=False)
    program = step.trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
    held: Any = program.memory_analysis()
    hlo = program.as_text() or ""
    xla_us, launch_us = xla_time(hlo, tpu)
    outside = activations_in_hbm(hlo, results=tpu.cores == 1)  # two cores write to HBM, by the kernel's own model
    xla_us += sum(LATENCY_CYCLES / tpu.clock_ghz + size / tpu.hbm_gb_s for size in outside) / 1e3
    found = {
        "temp_bytes": held.temp_size_in_bytes,
        "argument_bytes": held.argument_size_in_bytes,
        "alias_bytes": held.alias_size_in_bytes,
        "kernels": len(kernel_names(hlo)),
        "activations_in_hbm": len(outside),
        "xla_us": xla_us,
        "launch_us": launch_us,
    }
    Path(out).write_text(json.dumps(found))


def xla_time(hlo: str, tpu: Any) -> tuple[float, float]:
    """Microseconds of all operations but kernels and collectives, and what of it XLA charges for starting them.

    Bytes are those of operands and results outside VMEM. Copies that run beside other work bring weights to a kernel,
    and are in its own figure.
    """
    shapes: dict[str, float] = {}
    total = launches = 0.0
    for line in hlo[hlo.find("ENTRY ") :].splitlines():
        match = re.match(r"\s*(?:ROOT )?(%[\w.\-]+) = (.*?) ([\w\-]+)\((.*)", line)
        if not match:
            continue
        name, result, kind, rest = match.groups()
        shapes[name] = in_hbm(result)
        if kind.endswith(("-start", "-done")) or "custom-call" in kind:
            continue
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        cycles, hbm = int(estimate[1]) if estimate else 0, 0.0
        moved = shapes[name] + sum(shapes.get(operand, 0.0) for operand in operands_of(rest))
        if not cycles and re.search("gather|scatter|dynamic", name) and "all-" not in name:
            cycles = LATENCY_CYCLES * ROWS if moved else LAUNCH
        elif cycles or kind == "copy":
            hbm = moved
        total += max(cycles / tpu.clock_ghz, hbm / tpu.hbm_gb_s) / 1e3
        launches += LAUNCH / tpu.clock_ghz / 1e3 if estimate and cycles >= LAUNCH else 0.0
    return total, launches


def operands_of(rest: str) -> list[str]:
    """Names of an operation's operands, from what stands behind its opening bracket."""
    return re.findall(r"%[\w.\-]+", rest.split("), ")[0])


def activations_in_hbm(hlo: str, *, results: bool) -> list[float]:
    """Bytes of each operand of a kernel, or result, that is one of ROWS activations and does not lie in VMEM."""
    held: dict[str, str] = {}
    found = []
    for line in hlo[hlo.find("ENTRY ") :].splitlines():
        match = re.match(r"\s*(?:ROOT )?(%[\w.\-]+) = (.*?) ([\w\-]+)\((.*)", line)
        if not match:
            continue
        name, result, _, rest = match.groups()
        held[name] = result
        if '"tpu_custom_call"' in line:
            read = operands_of(rest)[:1] if "int4_matmul" in name else operands_of(rest)
            texts = [held.get(operand, "") for operand in read] + [result] * results
            for kind, dims, layout in SHAPE.findall(" ".join(texts)):
                sizes = [int(d) for d in dims.split(",") if d]
                if kind == "bf16" and math.prod(sizes[:-1]) == ROWS and "S(1)" not in layout:
                    found.append(2.0 * math.prod(sizes))
    return found


def in_hbm(result: str) -> float:
    """Bytes of a result, or of a tuple's parts, that lie in HBM."""
    total = 0.0
    for kind, dims, layout in SHAPE.findall(result):
        if kind in BYTES and "S(1)" not in layout:
            total += BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d)
    return total


if __name__ == "__main__":
    sys.exit(main())
