# SPDX-License-Identifier: Apache-2.0
"""int8 by int8: the sum is exact, against whole numbers in numpy; what is no number stays none."""

import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from awq_jax_kernels.w8a8_matmul import reference, round_rows, w8a8_matmul
from awq_jax_kernels.w8a8_matmul.rounding import fake_round
from tests.kernels.cases import ALIGNED, ODD, Case
from tests.kernels.contract import UNIT

FORMS = {"api": w8a8_matmul, "reference": reference.w8a8_matmul}
CASES = [ALIGNED[1], ALIGNED[4], *ODD, Case(3, 33, 6, 33)]


def problem(rng, case, dtype="float32"):
    m, k, n, _ = case
    x = (rng.standard_normal((m, k)) * np.exp(rng.standard_normal(k))).astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    )
    codes = rng.integers(-128, 128, (k, n)).astype(np.int8)
    return x, codes, rng.uniform(0.5, 2, (1, n)).astype(np.float32)


def whole_numbers(x, step):
    """Codes of x, their steps, and which lie at a tie as far as float32 can tell: half a maximum always does."""
    wide = x.astype(np.float64)
    each = np.abs(wide).max(1, keepdims=True) / 127 if step is None else np.full((len(x), 1), np.float64(step))
    place = wide / each
    tied = np.abs(np.abs(place - np.rint(place)) - 0.5) < 4 * UNIT["float32"] * np.abs(place)
    return np.clip(np.rint(place), -128, 127).astype(np.int64), each, tied


@pytest.mark.parametrize("step", [None, np.float32(0.02)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(rng, case, form, dtype, step):
    x, codes, scale = problem(rng, case, dtype)
    operands = jax.tree.map(jnp.asarray, (x, codes, scale))
    y = FORMS[form](*operands, step=None if step is None else jnp.asarray(step))
    assert y.dtype == operands[0].dtype and y.shape == (case.m, case.n)
    rounded, each, tied = whole_numbers(x, step)
    exact = (rounded @ codes.astype(np.int64)) * each * scale.astype(np.float64)
    either = (tied.astype(float) @ np.abs(codes.astype(float))) * each * scale
    # The step twice (its division may be a product), the sum, its two products in float32, and the result.
    limit = (UNIT[dtype] + 5 * UNIT["float32"]) * 1.001 * (np.abs(exact) + either) + either
    assert tied.mean() < 0.1
    assert (np.abs(np.asarray(y, np.float64) - exact) <= limit).all()


def test_the_product_is_int8_by_int8_and_sums_in_int32(rng):
    x, codes, scale = jax.tree.map(jnp.asarray, problem(rng, Case(3, 32, 8, 32)))
    text = str(jax.make_jaxpr(w8a8_matmul)(x, codes, scale))
    (line,) = (line for line in text.splitlines() if "dot_general" in line)
    assert "i32[3,8]" in line and "preferred_element_type=int32" in text
    assert "f32[32,8]" not in text, "no float weight"


def test_a_code_is_within_half_a_step(rng):
    x = jnp.asarray(rng.standard_normal((50, 40)), jnp.float32) * 100
    codes, step = round_rows(x)
    assert codes.dtype == jnp.int8 and np.abs(np.asarray(codes)).max(1).min() == 127
    assert (np.abs(np.asarray(fake_round(x) - x)) <= np.asarray(step) * (0.5 + 1e-5)).all()
    cut = np.asarray(round_rows(x, jnp.float32(0.1))[0])
    assert cut.min() == -128 and cut.max() == 127, "a static step cuts off what is larger"


def test_tokens_of_zeros_and_tokens_that_are_no_numbers(rng):
    x, codes, scale = problem(rng, Case(6, 192, 8, 192))
    whole = np.array(w8a8_matmul(*jax.tree.map(jnp.asarray, (x, codes, scale))))
    x[1], x[2, 3], x[4, 7], x[5, 0] = 0, np.nan, np.inf, -np.inf
    for step in (None, jnp.float32(0.02)):
        y = np.asarray(jax.jit(w8a8_matmul)(*jax.tree.map(jnp.asarray, (x, codes, scale)), step))
        assert (y[1] == 0).all() and not np.isfinite(y[[2, 4, 5]]).any() and np.isfinite(y[[0, 3]]).all()
        if step is None:
            np.testing.assert_array_equal(y[[0, 3]], whole[[0, 3]], err_msg="a token is its own affair")


def test_leading_axes_and_mapping(rng):
    many = [jax.tree.map(jnp.asarray, problem(rng, Case(4, 24, 6, 24))) for _ in range(3)]
    steps = jnp.asarray([0.1, 0.2, 0.3], jnp.float32)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
    for given in (None, steps):
        each = jnp.stack([w8a8_matmul(*one, step=None if given is None else given[i]) for i, one in enumerate(many)])
        np.testing.assert_array_equal(w8a8_matmul(*stacked, step=given), each)
        scanned = jax.lax.scan(lambda _, one: (None, w8a8_matmul(*one[0], step=one[1])), None, (stacked, given))
        np.testing.assert_array_equal(scanned[1], each)
    x, *weight = many[0]
    whole = w8a8_matmul(x, *weight)
    np.testing.assert_array_equal(jax.vmap(lambda row: w8a8_matmul(row, *weight))(x), whole)
    np.testing.assert_array_equal(w8a8_matmul(x.reshape(2, 2, 24), *weight).reshape(4, 6), whole)
    assert w8a8_matmul(x[0], *weight).shape == (6,)


def test_the_gradient_passes_straight_through(rng):
    x, codes, scale = problem(rng, Case(3, 64, 16, 64))
    dy = rng.standard_normal((3, 16)).astype(np.float32)
    operands = (*jax.tree.map(jnp.asarray, (x, codes, scale)), jnp.float32(0.02))
    _, pull = jax.vjp(w8a8_matmul, *operands)
    dx, packed, scales, step = pull(jnp.asarray(dy))
    w = codes.astype(np.float64) * scale
    limit = 6 * 2.0**-24 * 4 * np.sqrt(np.square(dy.astype(np.float64)) @ np.square(w.T)) + 1e-30
    assert (np.abs(np.asarray(dx, np.float64) - dy.astype(np.float64) @ w.T) <= limit).all()
    assert packed.dtype == jax.dtypes.float0 and not scales.any() and not step.any()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, c, s: (x[:, :-2], c, s), "columns, one for each row"),
        (lambda x, c, s: (x, c, jnp.concatenate([s, s])), "int32 sums know no groups"),
        (lambda x, c, s: (x, c, s, jnp.ones(3)), "step must be"),
        (lambda x, c, s: (x, c[None], s[None]), "leading axes"),
        (lambda x, c, s: (jnp.zeros((1, 140_000)), jnp.zeros((140_000, 1), jnp.int8), s[:, :1]), "may leave int32"),
    ],
)
def test_what_is_refused(rng, change, message):
    operands = change(*jax.tree.map(jnp.asarray, problem(rng, Case(4, 64, 32, 64))))
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(w8a8_matmul)(*operands)
