# SPDX-License-Identifier: Apache-2.0
"""GPTQ: rounding with error feedback. What one row's rounding spoils, the rows after it make up for.

The grids are fixed before the first row is rounded, so the order of the rows is free (`GPTQSpec.order`) and the result
is an ordinary group-quantized weight: no index of groups goes into a file.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax._operands import refuse_gram, refuse_weight
from awq_jax._qtensor import QTensor
from awq_jax._round import Ends, Grid, fit_grid, packed_on
from awq_jax._spec import GPTQSpec, QuantSpec
from awq_jax.methods._rows import RowGrid, block_of, column_loss, spread, to_codes, to_values

__all__ = ["gptq", "gptq_codes", "inverse_factor"]


def _together() -> int:
    """Rows to a turn of the loop: on a GPU starting a turn costs as much as a row, on a CPU unrolling only costs."""
    return 4 if jax.default_backend() == "gpu" else 1


def inverse_factor(gram: Float[Array, "k k"], damping: float) -> Float[Array, "k k"]:
    """Upper ``U`` with ``U'U = H^-1``, ``H = G + damping * mean(diag G) * I``.

    With the rows and columns of H reversed its lower Cholesky factor is an upper factor ``H = R R'``; ``U = R^-1`` then
    is one triangular solve, and the inverse of H is never formed.
    """
    diagonal = jnp.diagonal(gram)
    # Rows that saw nothing must not couple to others, and G = 0 must not divide by zero.
    extra = jnp.where(diagonal > 0, damping * jnp.mean(diagonal), 1.0)
    upper = jnp.linalg.cholesky((gram + jnp.diag(extra))[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(gram), dtype=gram.dtype), lower=False)


def _feedback(weight: Array, factor: Array, grid: RowGrid, spec: QuantSpec) -> Float[Array, "k n"]:
    """Codes of the rows from first to last; every row's error is passed on to the rows below it."""
    k, n = weight.shape
    size = block_of(k)

    def block(rest: Array, start: Array) -> tuple[Array, Array]:
        strip = jax.lax.dynamic_slice_in_dim(factor, start, size)  # [size, k]
        square = jax.lax.dynamic_slice_in_dim(strip, start, size, axis=1)
        here = RowGrid(*(jax.lax.dynamic_slice_in_dim(leaf, start, size) for leaf in grid))

        def row(rows: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
            on = RowGrid(here.scale[i], here.zero[i])
            codes = to_codes(rows[i], on, spec)
            error = (rows[i] - to_values(codes, on)) / square[i, i]
            return rows - square[i][:, None] * error, (codes, error)

        rows = jax.lax.dynamic_slice_in_dim(rest, start, size)
        _, (codes, errors) = jax.lax.scan(row, rows, jnp.arange(size), unroll=_together())
        return rest - jnp.matmul(strip.T, errors, precision="highest"), codes

    _, codes = jax.lax.scan(block, weight, jnp.arange(0, k, size))
    return codes.reshape(k, n)


def _descend(weight: Array, gram: Array, grid: RowGrid, codes: Array, spec: QuantSpec) -> Float[Array, "k n"]:
    """One sweep over the rows, each set to its best codes while the others are held: no output's error can grow."""
    k, n = weight.shape
    size = block_of(k)
    slope = jnp.matmul(gram, weight - to_values(codes, grid), precision="highest")  # G D

    def block(slope: Array, start: Array) -> tuple[Array, Array]:
        strip = jax.lax.dynamic_slice_in_dim(gram, start, size)
        square = jax.lax.dynamic_slice_in_dim(strip, start, size, axis=1)
        here = RowGrid(*(jax.lax.dynamic_slice_in_dim(leaf, start, size) for leaf in grid))
        old = jax.lax.dynamic_slice_in_dim(codes, start, size)

        def row(slopes: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
            on = RowGrid(here.scale[i], here.zero[i])
            value, curvature = to_values(old[i], on), square[i, i]
            wanted = value + slopes[i] / jnp.where(curvature > 0, curvature, 1.0)
            new = jnp.where(curvature > 0, to_codes(wanted, on, spec), old[i])
            step = to_values(new, on) - value
            return slopes - square[:, i][:, None] * step, (new, step)

        slopes = jax.lax.dynamic_slice_in_dim(slope, start, size)
        _, (new, steps) = jax.lax.scan(row, slopes, jnp.arange(size), unroll=_together())
        return slope - jnp.matmul(strip.T, steps, precision="highest"), new

    _, new = jax.lax.scan(block, slope, jnp.arange(0, k, size))
    return new.reshape(k, n)


def gptq_codes(
    weight: Float[Array, "k n"], gram: Float[Array, "k k"], grid: Grid, spec: QuantSpec, how: GPTQSpec
) -> Float[Array, "k n"]:
    """Codes on a fixed grid with a small ``tr(D' G D)``; of each output the better of these and the nearest.

    Args:
      weight: ``[k, n]`` float32.
      gram: ``X'X`` of its input.
      grid: of every (group, output).
      spec: the number format.
      how: damping, order and sweeps.

    Returns:
      Codes as float32; the nearest ones where the Gram matrix is not finite.
    """
    rows = spread(grid, weight.shape[0])
    gram = gram.astype(jnp.float32)
    order = jnp.argsort(-jnp.diagonal(gram), stable=True) if how.order else jnp.arange(weight.shape[0])
    back = jnp.argsort(order)
    mixed = RowGrid(*(leaf[order] for leaf in rows))
    square = gram[order][:, order]
    found = _feedback(weight[order], inverse_factor(square, how.damping), mixed, spec)
    for _ in range(how.sweeps):
        found = _descend(weight[order], square, mixed, found, spec)
    found = found[back]
    nearest = to_codes(weight, rows, spec)
    loss, bound = (column_loss(weight - to_values(codes, rows), gram) for codes in (found, nearest))
    return jnp.where(loss < bound, found, nearest)  # also where a loss is NaN


def gptq(
    weight: Float[Array, "k n"],
    gram: Float[Array, "..."],
    spec: QuantSpec = QuantSpec(),  # noqa: B008 - frozen
    how: GPTQSpec = GPTQSpec(),  # noqa: B008 - frozen
    ratio: Float[Array, "groups n"] | Ends | None = None,
) -> QTensor:
    """Round a weight so that its *output* moves least: `quantize` with error feedback.

    Args:
      weight: ``[k, n]``, any float dtype; computed in float32.
      gram: ``X'X`` of the weight's input, `ActStats.gram`; of a blocked one each block is a problem of its own.
      spec: the number format.
      how: damping, order, sweeps.
      ratio: clipping thresholds from `search_clip` or `settle_clip`.

    Returns:
      The packed weight, in the same form as `quantize` gives. Of every output the error ``d' G d`` is at most that of
      nearest rounding on the same grid: where feedback does not help, the nearest codes are kept.

    Raises:
      TypeError, ValueError: an operand of another shape or kind.

    >>> both_equal = jnp.ones((2, 2))  # only the sum of a column reaches the output
    >>> gptq(jnp.array([[0.3], [0.4]]), both_equal, QuantSpec(group_size=2)).shape
    (2, 1)
    """
    refuse_weight(weight, leading=False)
    refuse_gram(gram, len(weight), spec.rows_per_group(len(weight)))
    weight = weight.astype(jnp.float32)
    grid = fit_grid(weight, spec, ratio)
    if gram.ndim == 2:
        codes = gptq_codes(weight, gram, grid, spec, how)
    else:  # rows of different blocks do not make up for each other
        parts = jax.tree.map(lambda leaf: leaf.reshape(len(gram), -1, leaf.shape[-1]), (weight, grid))
        codes = jax.lax.map(lambda part: gptq_codes(part[0], part[2], part[1], spec, how), (*parts, gram))
        codes = codes.reshape(weight.shape)
    return packed_on(codes.astype(jnp.uint8), grid, spec)
