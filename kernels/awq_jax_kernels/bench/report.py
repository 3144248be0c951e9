# SPDX-License-Identifier: Apache-2.0
"""The static table: for each TPU, shape and m, the speed-up over the bound of a bfloat16 product."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from awq_jax_kernels.aot.tpu import compile_programs
from awq_jax_kernels.bench.cost import bf16_bound_us, kernel_cost, program, xla_cost
from awq_jax_kernels.chips import TPUS
from awq_jax_kernels.int4_matmul.config import for_tpu

__all__ = ["COLUMNS", "Row", "format_row", "static_rows"]

COLUMNS = ("ours", "grouped", "dequantize_then_dot", "dense")


@dataclass(frozen=True)
class Row:
    """One product on one TPU.

    Attributes:
      generation, m, k, n: what.
      bound_us: the least a bfloat16 product can take.
      us: of each program of `COLUMNS`; None where the compiler gives no figure.
      core_us, hbm_us, fill_us, source, temp_bytes: of ours, see `awq_jax_kernels.bench.cost.Cost`.
    """

    generation: str
    m: int
    k: int
    n: int
    bound_us: float
    us: tuple[float | None, ...]
    core_us: float
    hbm_us: float
    fill_us: float
    source: str
    temp_bytes: int


def static_rows(
    generation: str, shapes: Sequence[tuple[int, int]], ms: Sequence[int], *, others: bool = True, g: int = 128
) -> Iterator[Row]:
    """Compile and cost every product.

    Raises:
      RuntimeError: the kernel does not compile.
    """
    for k, n in shapes:
        for m in ms:
            shape = {"m": m, "k": k, "n": n, "g": g}
            config = for_tpu(TPUS[generation], m, k, n, g, zeros=True, exact=False)
            fields = vars(config)
            names = COLUMNS[1:] if others else ()
            still, moving, *rest = compile_programs(
                [
                    program("ours", still=True, config=fields, **shape),
                    program("ours", config=fields, **shape),
                    *(program(name, **shape) for name in names),
                ],
                generation,
            )
            if error := still.error or moving.error:
                raise RuntimeError(f"{generation} {shape}: {error}")
            cost = kernel_cost(generation, config, still, m, k, n, g, zeros=True)
            costs = [xla_cost(generation, c, m, k, n) for c in rest]
            us = (cost.us, *(c and c.us for c in costs))
            bound = bf16_bound_us(generation, m, k, n)
            yield Row(
                generation, m, k, n, bound, us, cost.core_us, cost.hbm_us, cost.fill_us, cost.source, moving.temp_bytes
            )


def format_row(row: Row) -> str:
    """One line: microseconds and, in brackets, the speed-up over the bound."""
    cells = [f"{us:8.1f} ({row.bound_us / us:4.2f}x)" if us else f"{'-':>16}" for us in row.us]
    detail = f"core {row.core_us:6.1f}  hbm {row.hbm_us:6.1f}  fill {row.fill_us:4.1f}  {row.source}"
    head = f"{row.generation:4} {row.m:4} x {row.k:5} x {row.n:5}  bound {row.bound_us:6.1f}"
    return f"{head} {' '.join(cells)}  {detail}  temp {row.temp_bytes}"
