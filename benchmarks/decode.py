# SPDX-License-Identifier: Apache-2.0
"""One decode step of a whole model on a TPU that is not here, by its compiler, against the least bfloat16 needs.

    python benchmarks/decode.py --gen v5e,v6e --batch 1,16 --context 512 [--int4-head] [--int8-cache] [--memory]

The model is config only: Llama 3 8B's shapes, abstract weights. libtpu compiles the step that serving runs
(`awq_jax.serving.steps`), 1 and 2 layers deep; layers are alike, so ``t = t(1) + (layers - 1) * (t(2) - t(1))``. The
time of one depth is the sum over the operations of the compiled step, one after the other:

* the INT4 kernel by `awq_jax_kernels.bench.cost.kernel_cost`, which docs/kernels-tpu.md explains;
* every other operation by the larger of XLA's own estimate and the bytes it moves in HBM over the bandwidth;
* a scatter into the cache, of which XLA gives no estimate, by one latency of 600 cycles for each row.

The bound is a bfloat16 model's with a bfloat16 cache of the same context, which no program reaches: the bytes of
weights and cache over the bandwidth, or the products at the peak rate. ``--memory`` compiles decode of all layers,
eight tokens to a dispatch, and says what it holds in HBM.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1, "s4": 0.5, "f16": 2, "s16": 2}
SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
LATENCY = 600  # cycles, as in the kernel's model


@dataclasses.dataclass(frozen=True)
class Case:
    """One step: its TPU, its depth, and serving's options."""

    gen: str
    batch: int
    context: int
    int4_head: bool
    int8_cache: bool


def main() -> int:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gen", default="v5e,v6e")
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--int4-head", action="store_true")
    parser.add_argument("--int8-cache", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        compile_here(**json.loads(args.child))
        return 0
    for gen in args.gen.split(","):
        for batch in map(int, args.batch.split(",")):
            case = Case(gen, batch, args.context, args.int4_head, args.int8_cache)
            print(json.dumps(memory(case) if args.memory else speed(case)), flush=True)
    return 0


def speed(case: Case) -> dict[str, Any]:
    """Milliseconds of a step and its parts."""
    from awq_jax.serving.abstract import LLAMA_8B

    depth = LLAMA_8B.num_layers
    one, two = (compiled(case, layers, steps=0) for layers in (1, 2))
    sizes = kernels(case)
    each, head = sum(us for _, us in sizes[:4]), sum(us for _, us in sizes[4:])
    wanted = 8 + case.int4_head
    if two["kernels"] != wanted:
        raise RuntimeError(f"{case}: two layers have {two['kernels']} kernels, not {wanted}.")
    us = lambda key: one[key] + (depth - 1) * (two[key] - one[key])
    total = depth * each + head + us("xla_us")
    least = bound_us(case)
    return {
        **dataclasses.asdict(case),
        "int4_ms": round(total / 1e3, 3),
        "kernels_ms": round((depth * each + head) / 1e3, 3),
        "xla_ms": round(us("xla_us") / 1e3, 3),
        "bf16_bound_ms": round(least / 1e3, 3),
        "speedup": round(least / total, 2),
        "speedup_without_launches": round(least / (total - us("floor_us")), 2),
        "xla_operations_of_a_layer": two["operations"] - one["operations"],
        "temp_mb": round(two["temp_bytes"] / 1e6, 1),
    }


def memory(case: Case) -> dict[str, Any]:
    """What decode of the whole depth holds in HBM."""
    from awq_jax.serving.abstract import LLAMA_8B

    held = compiled(case, LLAMA_8B.num_layers, steps=8)
    return {**dataclasses.asdict(case), **{key: held[key] for key in ("argument_bytes", "temp_bytes", "kernels")}}


def bound_us(case: Case) -> float:
    """The least that a bfloat16 step can take."""
    from awq_jax.models import param_shapes
    from awq_jax.serving.abstract import LLAMA_8B
    from awq_jax_kernels.chips import TPUS

    c, tpu = LLAMA_8B, TPUS[case.gen]
    weights = sum(math.prod(s) for path, s in param_shapes(c).items() if path.endswith("kernel"))
    cache = 2 * c.num_layers * case.batch * case.context * c.num_kv_heads * c.head_dim
    return max(2 * (weights + cache) / tpu.hbm_gb_s, 2 * case.batch * weights / tpu.bf16_tflop_s / 1e3) / 1e3


def kernels(case: Case) -> list[tuple[tuple[int, int], float]]:
    """(k, n) and microseconds of a layer's four products, and of the head where it is INT4."""
    from awq_jax.serving.abstract import LLAMA_8B as C
    from awq_jax_kernels.bench.report import static_rows

    wide, narrow = C.num_heads * C.head_dim, C.num_kv_heads * C.head_dim
    shapes = [(C.hidden_size, wide + 2 * narrow), (wide, C.hidden_size)]
    shapes += [(C.hidden_size, 2 * C.intermediate_size), (C.intermediate_size, C.hidden_size)]
    shapes += [(C.hidden_size, C.vocab_size)] * case.int4_head
    rows = static_rows(case.gen, shapes, [case.batch], others=False)
    return [((row.k, row.n), float(row.us[0] or 0)) for row in rows]


def compiled(case: Case, layers: int, steps: int) -> dict[str, Any]:
    """What libtpu says, from a child: it reads its flags once, when it loads."""
    from awq_jax_kernels.aot.tpu import _environment

    with tempfile.TemporaryDirectory(prefix="awq_jax_decode_") as folder:
        out = Path(folder, "out.json")
        request = {"case": dataclasses.asdict(case), "layers": layers, "steps": steps, "out": str(out)}
        env = {**os.environ, **_environment(Path(folder), False), "LIBTPU_INIT_ARGS": ""}
        done = subprocess.run([sys.executable, __file__, "--child", json.dumps(request)], env=env, capture_output=True)
        if done.returncode:
            raise RuntimeError(done.stderr.decode(errors="replace")[-2000:])
        return json.loads(out.read_text())


def compile_here(case: dict[str, Any], layers: int, steps: int, out: str) -> None:
    """The child."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from awq_jax.serving.abstract import decode_program
    from awq_jax_kernels.aot.schedule import kernel_names
    from awq_jax_kernels.chips import TPUS

    gen, tpu = case["gen"], TPUS[case["gen"]]
    narrow = {"chips_per_host_bounds": [1, 1, 1]} if tpu.single_chip else {}
    device = topologies.get_topology_desc(tpu.topology, platform="tpu", **narrow).devices[0]
    options = {key: case[key] for key in ("int4_head", "int8_cache")}
    step, shapes = decode_program(gen, layers, case["batch"], case["context"], steps=steps, **options)
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device))
    program = step.trace(*jax.tree.map(place, shapes)).lower(lowering_platforms=("tpu",)).compile()
    held: Any = program.memory_analysis()
    hlo = program.as_text() or ""
    xla_us, floor_us, operations = xla_time(hlo, tpu, case["batch"])
    found = {
        "temp_bytes": held.temp_size_in_bytes,
        "argument_bytes": held.argument_size_in_bytes,
        "kernels": len(kernel_names(hlo)),
        "xla_us": xla_us,
        "floor_us": floor_us,
        "operations": operations,
    }
    Path(out).write_text(json.dumps(found))


def xla_time(hlo: str, tpu: Any, batch: int) -> tuple[float, float, int]:
    """Microseconds of all operations but kernels; XLA's charge of 2,100 cycles for starting each; how many there are.

    Bytes are those of operands and results outside VMEM. Of the copies into it that run beside other work, those of the
    cache count in full.
    """
    shapes: dict[str, float] = {}
    total = floor = 0.0
    count = 0
    for line in hlo[hlo.find("ENTRY ") :].splitlines():
        match = re.match(r"\s*(?:ROOT )?(%[\w.\-]+) = (.*?) ([\w\-]+)\((.*)", line)
        if not match:
            continue
        name, result, kind, rest = match.groups()
        shapes[name] = in_hbm(result)
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        if kind in ("parameter", "tuple", "get-tuple-element", "bitcast") or "tpu_custom_call" in line:
            continue
        cycles = int(estimate[1]) if estimate else 0
        if "scatter" in name and not cycles:
            cycles = LATENCY * batch
            hbm = 0.0
        else:
            operands = re.findall(r"%[\w.\-]+", rest.split("), ")[0])
            hbm = shapes[name] + sum(shapes.get(operand, 0.0) for operand in operands)
        if kind.endswith("-start"):  # weights on their way to a kernel are in the kernel's own figure
            hbm = in_hbm(result) if re.search(r"\[\d+,\d+,\d+,\d+\]", result) else 0.0
        elif not cycles and kind != "copy":
            continue
        total += max(cycles / tpu.clock_ghz, hbm / tpu.hbm_gb_s) / 1e3
        if estimate and cycles >= 2100:
            count += 1
            floor += 2100 / tpu.clock_ghz / 1e3
    return total, floor, count


def in_hbm(result: str) -> float:
    """Bytes of a result, or of a tuple's parts, that lie in HBM."""
    total = 0.0
    for kind, dims, layout in SHAPE.findall(result):
        if kind in BYTES and "S(1)" not in layout:
            total += BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d)
    return total


if __name__ == "__main__":
    sys.exit(main())
