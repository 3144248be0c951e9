# SPDX-License-Identifier: Apache-2.0
"""What the assembler makes of the Hopper kernel, for a GPU that is not here.

A warpgroup's loop turns ``step`` rows of 128 columns into operands: `step` weights for each of its threads. So
instructions of the loop over `step` are instructions per weight, and what a processor can issue bounds the rate.
"""

import argparse
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp

from awq_jax_kernels.aot.gpu import GPUS, Compiled, Kernel, compile_program
from awq_jax_kernels.aot.program import Program
from awq_jax_kernels.int4_matmul import pallas_gpu

__all__ = ["KINDS", "counts", "main", "program", "report"]

KINDS = {  # machine instructions by what they are for; the rest is control
    "unpack": ("LOP3", "PRMT", "SHF"),
    "subtract zero": ("HADD2",),
    "scale": ("HMUL2", "FFMA", "F2FP"),
    "multiply": ("HGMMA", "WARPGROUP"),
    "load": ("LDS.32", "LDS.64", "LDS.128"),
}
ROWS = (1, 16, 32, 64, 128, 256, 1024)


def product(
    m: int, k: int, n: int, g: int = 128, *, tiles: bool, zeros: bool = True, dtype: str = "bfloat16",
    scale_dtype: str = "bfloat16", config: dict[str, Any] | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """The kernel and the shapes of its operands, on packed bytes or on what `prepare` makes of them."""
    of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    chosen = None if config is None else pallas_gpu.BlockConfig(**config)
    weight = of((n // 128, k // 64, 4, 256), "int32") if tiles else of((k // 2, n), "int8")
    shapes = (of((m, k), dtype), weight, of((k // g, n), scale_dtype), of((k // g, n), "int8") if zeros else None)
    return lambda *operands: pallas_gpu.int4_matmul(*operands, config=chosen), shapes


def program(
    m: int, k: int, n: int, *, tiles: bool, config: pallas_gpu.BlockConfig | None = None, **more: Any
) -> Program:
    """`product` as data."""
    arguments = {"m": m, "k": k, "n": n, "tiles": tiles, **more}
    if config is not None:
        arguments["config"] = dataclasses.asdict(config)
    return Program("awq_jax_kernels.bench.gpu_static:product", arguments)


def between(m: int, k: int, n: int, g: int = 128, *, parts: int = 128, **ends: Any) -> tuple[Any, Any]:
    """The kernel with other ends, on tiles, and the shapes of its operands."""
    around = pallas_gpu.Ends(**ends)
    _, shapes = product(m, k, n, g, tiles=True)
    of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    beside = [of((m, parts), "float32")] if around.eps is not None else []
    beside += [of((m, n), "bfloat16"), of((n,), "float32")] if around.adds else []
    return lambda *all: pallas_gpu.int4_matmul_between(*all[:4], ends=around, beside=all[4:]), (*shapes, *beside)


def counts(kernel: Kernel, step: int) -> dict[str, float]:
    """Instructions per weight by kind; "uniform" ones run on a warp's scalar unit, and take issue slots too.

    The sum is the whole loop.
    """
    kinds = {name: sum(kernel.loop.get(op, 0) for op in ops) for name, ops in KINDS.items()}
    uniform = sum(count for op, count in kernel.loop.items() if op.startswith("U"))
    rest = sum(kernel.loop.values()) - sum(kinds.values()) - uniform
    return {name: value / step for name, value in {**kinds, "uniform": uniform, "control": rest}.items()}


def report(gpu: str, k: int = 4096, n: int = 14336, rows: tuple[int, ...] = ROWS) -> list[dict[str, Any]]:
    """Compile the kernel for some numbers of rows, on both orders of the bytes; one record each."""
    records = []
    for m in rows:
        for tiles in (False, True):
            config = pallas_gpu.choose(m, k, n, 128, exact=False, device=GPUS[gpu].device_kind)
            compiled = compile_program(program(m, k, n, tiles=tiles, config=config), gpu)
            records.append({"m": m, "bytes": "tiles" if tiles else "packed", **_record(compiled, config.step)})
    return records


def _record(compiled: Compiled, step: int) -> dict[str, Any]:
    if compiled.error:
        return {"error": compiled.error}
    (kernel,) = compiled.kernels
    by_kind = counts(kernel, step)
    return {
        "temp_bytes": compiled.temp_bytes,
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "wgmma": kernel.loop.get("HGMMA", 0),
        "loads": {op: count for op, count in kernel.loop.items() if op.startswith("LDS")},
        "per_weight": {name: round(value, 2) for name, value in by_kind.items()},
        "total": round(sum(by_kind.values()), 2),
    }


def main(argv: list[str] | None = None) -> int:
    """Print the report as a table, or as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    for record in report(arguments.gpu):
        if arguments.json or "error" in record:
            print(json.dumps(record))
            continue
        kinds = " ".join(f"{name} {value}" for name, value in record["per_weight"].items())
        loads = " ".join(f"{count} {op}" for op, count in record["loads"].items())
        print(
            f"m={record['m']:<4} {record['bytes']:6} {record['registers']} registers, {record['spill_bytes']} B spills,"
            f" {record['wgmma']} wgmma, {loads}; a weight: {record['total']} ({kinds})"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
