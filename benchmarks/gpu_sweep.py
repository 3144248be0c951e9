# SPDX-License-Identifier: Apache-2.0
"""Time the Hopper kernel against dense bfloat16 over many shapes, and let candidates of block sizes compete.

    PYTHONPATH=kernels python benchmarks/gpu_sweep.py --out results        # an H100, about two minutes
    PYTHONPATH=kernels python benchmarks/gpu_sweep.py --out results --tuned kernels/.../tuned/nvidia_h100.json

Device time comes from the profiler: the sum of what the kernels of one product take, median over the calls. A program
multiplies by several separate weights in turn, more than the second-level cache holds, and each product waits for the
one before, so that XLA can't merge them. End-to-end time, gaps and dispatch included, is taken for a few long programs.
Every program's result is compared with the float32 reference.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import glob
import json
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax_kernels.int4_matmul import reference, xla
from awq_jax_kernels.int4_matmul.pallas_gpu import BlockConfig, derive, int4_matmul
from awq_jax_kernels.int4_matmul.pallas_gpu.config import tuned_key
from awq_jax_kernels.int4_matmul.tiles import prepare

SHAPES = {
    (4096, 14336): (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096),
    (8192, 8192): (1, 16, 32, 64, 128, 256, 1024, 4096),
    (4096, 6144): (1, 16, 64, 128),
    (14336, 4096): (1, 16, 64),
    (4096, 4096): (1, 16, 64),
    (4096, 28672): (1, 16, 64),
    (8192, 28672): (1, 16, 64),
    (4096, 128256): (1, 16, 64),
}
PEERS = {(4096, 14336): (16, 64, 1024)}  # also XLA's grouped product, and dequantizing first
LONG = {(4096, 14336): (1, 16, 64)}  # also end to end
CACHE = 130e6  # bytes that separate weights must exceed
BASES = {
    8: [
        BlockConfig(8),
        BlockConfig(8, deep=4, stages=8),
        BlockConfig(8, deep=2, stages=10),
        BlockConfig(8, wide=2, deep=2, stages=8),
    ],
    16: [
        BlockConfig(16),
        BlockConfig(16, deep=4, stages=8),
        BlockConfig(16, deep=2, stages=10),
        BlockConfig(16, wide=2, deep=2, stages=8),
    ],
    32: [BlockConfig(32), BlockConfig(32, deep=2, stages=8), BlockConfig(32, wide=2, deep=2, stages=6)],
    64: [
        BlockConfig(64, deep=2, stages=8, scale_weight=True),
        BlockConfig(64, deep=2, step=256, stages=4, scale_weight=True),
        BlockConfig(64, wide=2, deep=1, stages=5, scale_weight=True),
    ],
    128: [
        BlockConfig(128, deep=2, stages=5, scale_weight=True),
        BlockConfig(128, wide=2, deep=1, stages=4, scale_weight=True),
        BlockConfig(64, wide=2, deep=1, stages=6, scale_weight=True),
    ],
    256: [
        BlockConfig(128, wide=2, deep=1, stages=4, scale_weight=True),
        BlockConfig(128, deep=2, stages=5, scale_weight=True),
    ],
    1024: [
        BlockConfig(128, wide=2, deep=1, stages=4, scale_weight=True),
        BlockConfig(128, wide=2, deep=1, stages=4, scale_weight=True, persistent=True),
    ],
}


@dataclasses.dataclass
class Job:
    """One program to time."""

    k: int
    n: int
    m: int
    name: str
    operands: str
    program: Any
    config: BlockConfig | None = None
    result: dict[str, Any] = dataclasses.field(default_factory=dict)


def candidates(m: int, k: int, n: int) -> list[BlockConfig]:
    """Block sizes that compete for one product: each base with the splits that fill the chip best."""
    bases = BASES[next((size for size in BASES if m <= size), 1024)]
    found = [derive(m, k, n, 128, exact=False)]
    for base in bases:
        blocks = n // (128 * base.wide) * -(-m // base.tokens)
        fitting = [1] if base.persistent else [s for s in (1, 2, 3, 4) if s * blocks <= 132] or [1]
        found += [dataclasses.replace(base, split=s) for s in fitting[-2:] if s * blocks > 80 or s == fitting[-1]]
    unique = list(dict.fromkeys(found))
    return [c for c in unique if c.problem(k, n, 128) is None]


def chain(product: Any) -> Any:
    """A program of one product after the other, each with its own x and weight."""
    product = jax.jit(product)

    @jax.jit
    def run(xs: Any, weights: Any) -> Any:
        ys: list[Any] = []
        for i, x in enumerate(xs):
            if ys:
                x, ys[-1] = jax.lax.optimization_barrier((x, ys[-1]))
            ys.append(product(x, *weights[i % len(weights)]))
        return ys

    return run


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantized(key: Any, k: int, n: int) -> Any:
    """Random codes, scales and zeros, groups of 128 rows."""
    codes, scales, zeros = jax.random.split(key, 3)
    packed = jax.lax.bitcast_convert_type(jax.random.bits(codes, (k // 2, n), jnp.uint8), jnp.int8)
    scale = jax.random.uniform(scales, (k // 128, n), jnp.float32, 0.005, 0.015).astype(jnp.bfloat16)
    return packed, scale, jax.random.randint(zeros, (k // 128, n), 0, 16, jnp.int32).astype(jnp.int8)


def operands(k: int, n: int, m: int) -> dict[str, Any]:
    """Separate weights in each form, rows of x for the largest m, and the reference for the first rows."""
    count = max(3, -(-int(CACHE) // (k * n // 2)))
    keys = [jax.random.key(i) for i in range(count)]
    packed = [quantized(key, k, n) for key in keys]
    xs = [jax.random.normal(key, (m, k), jnp.bfloat16) for key in keys]
    first = xs[0][:128].astype(jnp.float32)
    return {
        "bytes": packed,
        "tiles": [(jax.jit(prepare)(p), s, z) for p, s, z in packed],
        "dense": [(jax.random.normal(key, (k, n), jnp.bfloat16),) for key in keys],
        "x": xs,
        "expected": np.asarray(jax.jit(reference.int4_matmul)(first, *packed[0])),
    }


def jobs_of(k: int, n: int, m: int) -> list[Job]:
    """Everything that is timed at one point."""
    jobs = [Job(k, n, m, "bf16", "dense", chain(jnp.matmul))]
    for config in candidates(m, k, n):
        program = functools.partial(int4_matmul, config=config)
        jobs += [Job(k, n, m, "fused", order, chain(program), config) for order in ("tiles", "bytes")]
    if m in PEERS.get((k, n), ()):
        jobs.append(Job(k, n, m, "xla", "bytes", chain(xla.int4_matmul)))
        dense = lambda x, *w: x @ reference.dequantize(*w).astype(x.dtype)
        jobs.append(Job(k, n, m, "dequantize", "bytes", chain(dense)))
    return jobs


def arguments(job: Job, data: dict[str, Any], length: int | None = None) -> Any:
    """The program's x's and weights."""
    xs = [x[: job.m] for x in data["x"]]
    if length:
        xs = [xs[i % len(xs)] + jnp.bfloat16(i) for i in range(length)]
    return xs, data[job.operands]


def device_times(jobs: list[Job], calls: int = 4) -> None:
    """Run compiled programs under the profiler, with pauses between them that tell their kernels apart."""
    folder = tempfile.mkdtemp()
    with jax.profiler.trace(folder):
        for job in jobs:
            args = job.result.pop("args")
            time.sleep(0.012)
            for _ in range(calls):
                jax.block_until_ready(job.program(*args))
            job.result["products"] = calls * len(args[0])
    (file,) = glob.glob(folder + "/**/*.xplane.pb", recursive=True)
    planes = [plane for plane in jax.profiler.ProfileData.from_file(file).planes if "GPU" in plane.name]
    lines = [line for plane in planes for line in plane.lines]
    events = sorted((e.start_ns, e.duration_ns, e.name) for line in lines if "Stream" in line.name for e in line.events)
    bursts: list[list[Any]] = []
    for event in events:
        if not bursts or event[0] - bursts[-1][-1][0] > 7e6:
            bursts.append([])
        bursts[-1].append(event)
    if len(bursts) != len(jobs):
        print(f"warning: {len(bursts)} bursts of kernels for {len(jobs)} programs", flush=True)
    for job, burst in zip(jobs, bursts, strict=False):
        by_name: dict[str, list[float]] = {}
        for _, duration, name in burst:
            by_name.setdefault(name, []).append(duration)
        total = sum(len(v) * float(np.median(v)) for v in by_name.values())
        job.result["us"] = total / job.result["products"] / 1e3


def copy_rate() -> float:
    """Bytes read and written per second by a large addition, in TB/s."""
    a = jnp.ones((1 << 28,), jnp.float32)
    job = Job(0, 0, 0, "copy", "", chain(lambda x: x + 1))
    job.result["args"] = ([a], [()])
    jax.block_until_ready(job.program([a], [()]))
    device_times([job])
    return 2 * a.nbytes / job.result["us"] / 1e6


def end_to_end(job: Job, data: Any, length: int = 48) -> float:
    """Wall time of one product in a long program."""
    args = arguments(job, data, length)
    jax.block_until_ready(job.program(*args))
    times = []
    for _ in range(9):
        start = time.perf_counter()
        jax.block_until_ready(job.program(*args))
        times.append((time.perf_counter() - start) / length * 1e6)
    return float(np.median(times))


def main() -> None:
    """Shape by shape: compile, compare with the reference, time, print and write what there is so far."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for gpu_sweep.json")
    parser.add_argument("--tuned", type=pathlib.Path, help="write the winners here")
    parser.add_argument("--shapes", nargs="+", help="some of them, such as 4096x14336")
    a = parser.parse_args()
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "copy_TB_s": copy_rate(),
        "rows": [],
        "end_to_end": [],
    }
    print(report, flush=True)
    for (k, n), ms in SHAPES.items():
        if a.shapes is None or f"{k}x{n}" in a.shapes:
            data = operands(k, n, max(ms))
            jobs = compiled([job for m in ms for job in jobs_of(k, n, m)], data)
            device_times(jobs)
            report["rows"] += table(jobs)
            report["end_to_end"] += long_programs(k, n, data)
            save(report, a.out, a.tuned)


def compiled(jobs: list[Job], data: dict[str, Any]) -> list[Job]:
    """The jobs that compile, with their error against the reference; in threads, since each takes a second or two."""
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        waiting = []
        for job in jobs:
            args = arguments(job, data)
            waiting.append((job, args, pool.submit(lambda run=job.program, args=args: run.lower(*args).compile())))
        done = []
        for job, args, future in waiting:
            try:
                job.program = future.result()
                rows = np.asarray(job.program(*args)[0][:128].astype(jnp.float32))
            except Exception as e:  # a candidate that does not fit is out of the race
                print(f"{job.k}x{job.n} m={job.m} {job.name} {job.config}: {e!r:.200}", flush=True)
                continue
            expected = data["expected"][: len(rows)]
            job.result["error"] = float(np.linalg.norm(rows - expected) / np.linalg.norm(expected))
            job.result["args"] = args
            done.append(job)
    return done


def table(jobs: list[Job]) -> list[dict[str, Any]]:
    """Print and return a row per program, with its ratio to dense bfloat16 at the same point."""
    base = {(j.k, j.n, j.m): j.result.get("us", float("nan")) for j in jobs if j.name == "bf16"}
    rows = []
    for j in jobs:
        us = j.result.get("us", float("nan"))
        ratio = base.get((j.k, j.n, j.m), float("nan")) / us
        moved = j.k * j.n * (2 if j.name == "bf16" else 0.5 + 3 / 128) + 2 * j.m * (j.k + j.n)
        row = {"k": j.k, "n": j.n, "m": j.m, "what": j.name, "operands": j.operands, "us": us, "ratio": ratio,
               "TB_s": moved / us / 1e6, "error": j.result.get("error")}  # fmt: skip
        if j.config is not None:
            row["config"] = dataclasses.asdict(j.config)
        rows.append(row)
        c = j.config
        short = "" if c is None else f"t{c.tokens} w{c.wide} d{c.deep} s{c.split} {c.step}x{c.stages}"
        short += " persistent" if c is not None and c.persistent else ""
        short += f" {row['error']:.4f}" if j.name != "bf16" else ""
        print(f"{j.k}x{j.n} {j.m:4} {j.name[:5]:5} {j.operands:5} {us:8.2f} {ratio:5.2f} {row['TB_s']:.2f} {short}")
    return rows


def long_programs(k: int, n: int, data: dict[str, Any]) -> list[dict[str, Any]]:
    """End-to-end times of dense bfloat16 and of the kernel on tiles."""
    rows = []
    for m in LONG.get((k, n), ()):
        dense, fused, *_ = jobs_of(k, n, m)  # with the derived blocks
        times = {job.name: end_to_end(job, data) for job in (dense, fused)}
        rows.append({"k": k, "n": n, "m": m, **times})
        print(f"end to end {k}x{n} m={m}: bf16 {times['bf16']:.2f} us, fused {times['fused']:.2f} us", flush=True)
    return rows


def save(report: dict[str, Any], out: pathlib.Path, tuned: pathlib.Path | None) -> None:
    """Write the report, and the winners on tiles, which are what serves, as a tuned table."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_sweep.json").write_text(json.dumps(report, indent=1))
    best: dict[str, dict[str, Any]] = {}
    for row in report["rows"]:
        key = tuned_key(row["m"], row["k"], row["n"])
        if "config" in row and row["operands"] == "tiles" and row["us"] < best.get(key, {"us": np.inf})["us"]:
            best[key] = row
    if tuned is not None:
        configs = {key: row["config"] for key, row in best.items()}
        tuned.write_text(json.dumps({"device": report["device"], "jax": report["jax"], "configs": configs}, indent=1))


if __name__ == "__main__":
    main()
