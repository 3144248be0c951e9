# SPDX-License-Identifier: Apache-2.0
"""The product with eight-bit codes against numpy in float64, in every form that XLA is given."""

import functools
import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from awq_jax_kernels import layout
from awq_jax_kernels.int4_matmul import int4_matmul, refusal
from awq_jax_kernels.int8_matmul import int8_matmul, reference, xla
from tests.kernels.cases import ALIGNED, ODD, Case
from tests.kernels.contract import SIGMAS, UNIT

FORMS = {"api": int8_matmul, "grouped": xla.grouped, "blockwise": xla.blockwise, "reference": reference.int8_matmul}
CASES = [ALIGNED[1], ALIGNED[4], *ODD, Case(3, 33, 6, 11)]  # eight bits take an odd number of rows


def problem(rng, case, dtype="float32", zeros=True):
    """(operands, x and the weight in float64, the scale of every weight)."""
    m, k, n, g = case
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    q = rng.integers(0, 256, (k, n)).astype(np.uint8)
    q[:2, 0] = 0, 255
    x = rng.standard_normal((m, k)).astype(kind)
    scale = rng.uniform(0.5, 2, (k // g, n)).astype(np.float32)
    zero = rng.integers(0, 256, (k // g, n)).astype(np.uint8) if zeros else None
    rows = scale.astype(np.float64).repeat(g, 0)
    w = (q - (128.0 if zero is None else zero.astype(np.float64).repeat(g, 0))) * rows
    operands = (x, layout.pack_numpy(q, 8), scale, zero)
    return jax.tree.map(jnp.asarray, operands), x.astype(np.float64), w, rows


def bound(x, w, rows, unit):
    """As `tests.kernels.contract.error_bound`, for codes up to 255: the walk of the sum, and the result's rounding."""
    walk = UNIT["float32"] * np.sqrt(x.shape[1] / 6) * np.sqrt(np.square(x) @ np.square(255 * rows))
    return unit * np.abs(x @ w) + (1 + unit) * SIGMAS * walk


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(rng, case, form, dtype, zeros):
    operands, x, w, rows = problem(rng, case, dtype, zeros)
    y = FORMS[form](*operands)
    assert y.dtype == operands[0].dtype and y.shape == (case.m, case.n)
    assert (np.abs(np.asarray(y, np.float64) - x @ w) <= bound(x, w, rows, UNIT[dtype])).all()


def test_blocks_of_rows_add_up(rng, monkeypatch):
    monkeypatch.setattr(xla, "_BLOCK_BYTES", 1 << 10)
    for case in (Case(5, 128, 40, 32), Case(5, 128, 40, 128)):
        operands, x, w, rows = problem(rng, case)
        y = xla.blockwise(*operands)
        assert (np.abs(np.asarray(y, np.float64) - x @ w) <= bound(x, w, rows, UNIT["float32"])).all()


def test_leading_axes_and_mapping(rng):
    many = [problem(rng, Case(4, 24, 6, 8))[0] for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
    each = jnp.stack([int8_matmul(*one) for one in many])
    np.testing.assert_allclose(int8_matmul(*stacked), each, rtol=1e-5, atol=1e-4)
    _, scanned = jax.lax.scan(lambda _, one: (None, int8_matmul(*one)), None, stacked)
    np.testing.assert_allclose(scanned, each, rtol=1e-5, atol=1e-4)
    x, *weight = many[0]
    np.testing.assert_allclose(jax.vmap(lambda row: int8_matmul(row, *weight))(x), each[0], rtol=1e-5, atol=1e-4)
    assert int8_matmul(x[0], *weight).shape == (6,) and int8_matmul(x[None, :0], *weight).shape == (1, 0, 6)


def test_gradients_reach_x_alone(rng):
    operands, _, w, _ = problem(rng, Case(3, 64, 16, 16))
    dy = rng.standard_normal((3, 16)).astype(np.float32)
    _, pull = jax.vjp(int8_matmul, *operands)
    dx, packed, scale, zero = pull(jnp.asarray(dy))
    limit = 6 * 2.0**-24 * 4 * np.sqrt(np.square(dy) @ np.square(255 * np.ones((16, 64)) * 2))
    assert (np.abs(np.asarray(dx, np.float64) - dy.astype(np.float64) @ w.T) <= limit).all()
    assert packed.dtype == zero.dtype == jax.dtypes.float0 and not scale.any()


def float_sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating))
        for sub in jaxprs_in_params(eqn.params):
            yield from float_sizes(sub)


@pytest.mark.parametrize("form", [xla.grouped, xla.blockwise, xla.input_cotangent])
def test_no_float_array_is_as_large_as_the_weight(form):
    k, n, g = 4096, 8192, 128
    shapes = [((4, k), "float32"), ((k, n), "int8"), ((k // g, n), "float32"), ((k // g, n), "uint8")]
    x, *weight = (jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes)
    if form is xla.input_cotangent:
        x = jax.ShapeDtypeStruct((4, n), jnp.float32)
    assert max(float_sizes(jax.make_jaxpr(form)(x, *weight).jaxpr)) < k * n // 2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, p, s, z: (x[:, :-2], p, s, z), "columns, one for each row"),
        (lambda x, p, s, z: (x, p, s[:, :-1], z), "scale must be"),
        (lambda x, p, s, z: (x, p, jnp.concatenate([s, s[:1]]), None), "divisor"),
        (lambda x, p, s, z: (x, p, s, z[:1]), "shape of scale"),
        (lambda x, p, s, z: (x, p[None], s[None], z[None]), "leading axes"),
    ],
)
def test_shapes_that_disagree(rng, change, message):
    operands = change(*problem(rng, Case(4, 64, 32, 32))[0])
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(int8_matmul)(*operands)


def test_int4_products_refuse_eight_bits_and_say_who_takes_them(rng):
    operands = problem(rng, Case(4, 256, 128, 128), zeros=False)[0]
    with pytest.raises(ValueError, match="a byte for each row of x, codes of eight bits; int8_matmul multiplies these"):
        int4_matmul(*operands)
    for implementation in ("tpu", "gpu", "xla", "reference"):
        assert "eight bits" in (refusal(implementation, *operands) or "")


def test_codes_come_back_from_either_layout(rng):
    for bits in (2, 3, 4, 8):
        codes = rng.integers(0, 2**bits, (3, 6, 4)).astype(np.uint8)
        packed = layout.pack_numpy(codes, bits)
        assert packed.shape == (3, 6 if bits == 8 else 3, 4)
        np.testing.assert_array_equal(layout.unpack_numpy(packed, bits), codes)
        np.testing.assert_array_equal(layout.pack(jnp.asarray(codes), bits), packed)
        unpack = functools.partial(layout.unpack, bits=bits)
        np.testing.assert_array_equal(jax.jit(unpack)(jnp.asarray(packed)), codes)
    np.testing.assert_array_equal(layout.pack_numpy(codes, 8).astype(int), codes.astype(int) - 128)
