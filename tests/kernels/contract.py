# SPDX-License-Identifier: Apache-2.0
"""What every implementation of the INT4 product must do, stated once: agree with numpy in float64 within a bound.

Error model. Products of bfloat16 activations and codes are exact in float32, so three roundings remain:

* the result, once: ``u_y * |y|``;
* the running sum: for terms of mean zero its partial sums walk, so k roundings of unit ``u32`` add up to about
  ``u32 * sqrt(k) * |x * v|_2 / sqrt(6)``, where v holds the largest operand that an implementation may accumulate
  before it subtracts the zero point: ``(code + offset) * scale``;
* the weight, if it is rounded to the dtype of x before the product: ``u_x * |x * w|_2 / sqrt(3)``, where w is the
  weight, or ``(code - 8) * scale`` for an implementation that rounds before it knows the zero point.

The last two are standard deviations of sums of independent roundings; six of them are allowed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from awq_jax_kernels.nibbles import pack_numpy
from tests.kernels.cases import Case

__all__ = ["CODES", "Problem", "check", "error_bound", "make_problem"]

Codes = Literal["random", "all 0", "all 15", "one hot"]
CODES: tuple[Codes, ...] = ("random", "all 0", "all 15", "one hot")

SIGMAS = 6
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class Problem:
    """Operands for the device, and the same numbers in float64."""

    x: Any
    packed: Any
    scale: Any
    zero: Any
    x64: np.ndarray
    w64: np.ndarray
    scale_rows: np.ndarray  # the scale of each weight
    codes: np.ndarray

    @property
    def operands(self) -> tuple[Any, Any, Any, Any]:
        return self.x, self.packed, self.scale, self.zero


def make_problem(
    rng: np.random.Generator,
    case: Case,
    *,
    dtype: str = "bfloat16",
    scale_dtype: str = "bfloat16",
    zeros: bool = True,
    codes: Codes = "random",
) -> Problem:
    """Fresh operands. "one hot" makes rows of x unit vectors, so that every result is one weight."""
    m, k, n, g = case
    q = rng.integers(0, 16, (k, n))
    if codes in ("all 0", "all 15"):
        q[:] = 0 if codes == "all 0" else 15
    x = rng.standard_normal((m, k))
    if codes == "one hot":
        x = np.eye(k)[rng.integers(0, k, m)]
    x = x.astype(_numpy_dtype(dtype))
    scale = (rng.uniform(0.5, 2, (k // g, n)) * 2.0 ** rng.integers(-8, -2, (k // g, n))).astype(
        _numpy_dtype(scale_dtype)
    )
    zero = rng.integers(0, 16, (k // g, n)).astype(np.int8) if zeros else None
    rows = lambda a: np.repeat(a.astype(np.float64), g, axis=0)
    offset = 8 if zero is None else rows(zero)
    return Problem(
        jnp.asarray(x),
        jnp.asarray(pack_numpy(q.astype(np.uint8))),
        jnp.asarray(scale),
        None if zero is None else jnp.asarray(zero),
        x.astype(np.float64),
        (q - offset) * rows(scale),
        rows(scale),
        q,
    )


def error_bound(
    problem: Problem, *, largest_operand: float = 15, weight_unit: float | None = None, rounds_around_8: bool = False
) -> np.ndarray:
    """The bound of the module's docstring, per element of the result.

    Args:
      problem: the operands.
      largest_operand: of ``code + offset`` in a sum that the implementation accumulates.
      weight_unit: roundoff of a weight before the product; None is that of x.
      rounds_around_8: what is rounded is ``(code - 8) * scale``, not the weight.
    """
    unit = UNIT[str(problem.x.dtype)]
    k = problem.x64.shape[1]
    norm = lambda w: np.sqrt(np.square(problem.x64) @ np.square(w))
    rounded = (problem.codes - 8) * problem.scale_rows if rounds_around_8 else problem.w64
    walk = UNIT["float32"] * np.sqrt(k / 6) * norm(largest_operand * problem.scale_rows)
    weight = (unit if weight_unit is None else weight_unit) / np.sqrt(3) * norm(rounded)
    # (1 + unit): the rounding of the result sees the errors below it.
    return unit * np.abs(problem.x64 @ problem.w64) + (1 + unit) * SIGMAS * (walk + weight)


def check(product: Callable[..., Any], problem: Problem, **bound: Any) -> None:
    """Hold ``product(x, packed, scale, zero)`` to shape, dtype and error bound."""
    y = product(*problem.operands)
    expected = problem.x64 @ problem.w64
    assert y.shape == expected.shape and y.dtype == problem.x.dtype
    error = np.abs(np.asarray(y, np.float64) - expected)
    limit = error_bound(problem, **bound)
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error - limit)), error.shape)
    assert np.all(error <= limit), f"at {worst}: off by {error[worst]:.3g}, allowed {limit[worst]:.3g}"


def _numpy_dtype(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
