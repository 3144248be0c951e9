# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import QTensor, QuantSpec, dequantize, quantize
from awq_jax._round import Ends, fake_quantize

GROUPS = [
    pytest.param(np.zeros((8, 1)), id="all zero"),
    pytest.param(np.full((8, 1), 5.0), id="constant"),
    pytest.param(np.linspace(5.0, 5.3, 8)[:, None], id="one sign, far from zero"),
    pytest.param(np.linspace(-5.3, -5.0, 8)[:, None], id="negative, far from zero"),
    pytest.param(np.array([1.0, 0, 0, 0, 0, 0, 0, 1e4])[:, None], id="outlier"),
    pytest.param(np.linspace(-1e-8, 1e-8, 8)[:, None], id="below the scale's range"),
    pytest.param(np.linspace(-1e30, 1e30, 8)[:, None], id="huge"),
]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_error_is_at_most_half_a_step(rng, bits, group_size, symmetric):
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype="float32")
    w = rng.standard_normal((256, 24)).astype(np.float32)
    q = quantize(jnp.asarray(w), spec)
    steps = np.repeat(np.asarray(q.scale, np.float64), 256 // q.scale.shape[0], axis=0)
    # One ulp of the division may move a weight across a tie, and a symmetric maximum is half a step past the last code.
    assert np.all(np.abs(np.asarray(dequantize(q), np.float64) - w) <= steps * (0.5 + 1e-5))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_hard_groups(group, symmetric, scale_dtype):
    spec = QuantSpec(group_size=8, symmetric=symmetric, scale_dtype=scale_dtype)
    w = group.astype(np.float32)
    q = jax.jit(quantize, static_argnums=1)(jnp.asarray(w), spec)
    scale = np.asarray(q.scale.astype(jnp.float32))
    if np.abs(w).max() > 1e5 and scale_dtype == "float16":
        assert np.isinf(scale).all(), "the range does not fit float16 and must show as infinite, not as a wrong number"
        with pytest.raises(ValueError, match=r"up to 1e\+30.*leave the range of float16.*bfloat16"):
            quantize(jnp.asarray(w), spec)
        return
    assert np.isfinite(scale).all() and (scale > 0).all()
    back = np.asarray(dequantize(q))
    assert np.all(back[w == 0] == 0)
    slack = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-23}[scale_dtype] * 15
    assert np.all(np.abs(back - w) <= scale * (0.5 + slack))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("with_ratio", [False, True])
def test_what_is_no_number_never_becomes_one(rng, bad, symmetric, with_ratio):
    spec = QuantSpec(symmetric=symmetric)
    w = rng.standard_normal((256, 192)).astype(np.float32)  # wide enough for vector instructions
    clean = np.asarray(dequantize(quantize(jnp.asarray(w), spec)))
    w[3, 2] = bad
    ratio = jnp.full((2, 192), 1.0) if with_ratio else None
    back = np.array(dequantize(jax.jit(quantize, static_argnums=1)(jnp.asarray(w), spec, ratio)))
    assert not np.isfinite(back[:128, 2]).any(), "its whole group"
    back[:128, 2] = clean[:128, 2]
    np.testing.assert_array_equal(back, clean, err_msg="and nothing else")
    with pytest.raises(ValueError, match=r"1 of 49152 values of a weight \[256, 192\] are NaN or infinite"):
        quantize(jnp.asarray(w), spec, ratio)


def test_fake_quantize_is_dequantize_of_quantize(rng):
    w = jnp.asarray(rng.standard_normal((128, 16)), jnp.float32)
    three, eight = QuantSpec(bits=3, group_size=32), QuantSpec(bits=8, symmetric=True)
    for spec in (QuantSpec(), QuantSpec(symmetric=True), three, eight, QuantSpec(bits=8)):
        ratio = jnp.asarray(rng.uniform(0.5, 1, (128 // spec.rows_per_group(128), 16)), jnp.float32)
        np.testing.assert_array_equal(fake_quantize(w, spec, ratio), dequantize(quantize(w, spec, ratio)))


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_against_numpy_in_float64(rng, bits):
    """An independent statement of the asymmetric formula, away from ties."""
    w, top = rng.standard_normal((64, 8)).astype(np.float32), 2**bits - 1
    q = quantize(jnp.asarray(w), QuantSpec(bits=bits, group_size=32))
    scale = np.asarray(q.scale, np.float64)
    groups = w.astype(np.float64).reshape(2, 32, 8)
    low = np.minimum(groups.min(1), 0)
    np.testing.assert_allclose(scale, (np.maximum(groups.max(1), 0) - low) / top, rtol=2**-10)
    zero = np.clip(-np.round(low / scale), 0, top)
    np.testing.assert_array_equal(q.zero, zero)
    exact = groups / scale[:, None] + zero[:, None]
    expected = (np.clip(np.round(exact), 0, top) - zero[:, None]) * scale[:, None]
    off_tie = np.abs(exact - np.floor(exact) - 0.5) > 1e-4
    got = np.asarray(dequantize(q)).reshape(2, 32, 8)
    np.testing.assert_allclose(got[off_tie], expected[off_tie], rtol=1e-6, atol=1e-7)


def test_symmetric_has_no_zero_and_spans_all_codes(rng):
    q = quantize(jnp.asarray(rng.standard_normal((128, 4)), jnp.float32), QuantSpec(symmetric=True))
    assert q.zero is None and q.shape == (128, 4) and q.group_size == 128


def test_leading_axes_are_free(rng):
    w = jnp.asarray(rng.standard_normal((3, 2, 64, 8)), jnp.float32)
    spec = QuantSpec(group_size=32)
    whole = quantize(w, spec)
    parts = jax.vmap(jax.vmap(lambda m: quantize(m, spec)))(w)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    jax.tree.map(np.testing.assert_array_equal, whole[1], quantize(w[1], spec))


def test_group_size_must_divide():
    with pytest.raises(
        ValueError, match=r"dimension 96 is not a multiple of group_size=64. Use one that divides it \(32"
    ):
        quantize(jnp.zeros((96, 4)), QuantSpec(group_size=64))


@pytest.mark.parametrize("fields", [{"bits": 5}, {"group_size": 0}, {"group_size": 33}, {"scale_dtype": "int8"}])
def test_spec_refuses(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        QuantSpec(**fields)


def test_either_end_of_a_range_has_a_threshold_of_its_own(rng):
    spec = QuantSpec(group_size=32, scale_dtype="float32")
    w = rng.standard_normal((64, 12)).astype(np.float32)
    low, high = rng.uniform(0.5, 1, (2, 2, 12)).astype(np.float32)
    groups = w.reshape(2, 32, 12).astype(np.float64)
    bottom, top = low * groups.min(1), high * groups.max(1)
    step = ((top - bottom) / spec.levels)[:, None]
    zero = np.round(-bottom[:, None] / step)
    wanted = (np.clip(np.round(groups / step) + zero, 0, spec.levels) - zero) * step
    ends = Ends(jnp.asarray(low), jnp.asarray(high))
    got = dequantize(quantize(jnp.asarray(w), spec, ends))
    np.testing.assert_allclose(got, wanted.reshape(w.shape), atol=1e-5)
    np.testing.assert_array_equal(got, fake_quantize(jnp.asarray(w), spec, ends))
    with pytest.raises(ValueError, match="one for each group and output"):
        quantize(jnp.asarray(w), spec, Ends(jnp.asarray(low), jnp.asarray(high[:1])))


def test_tree_operations_accept_any_leaf():
    q = quantize(jnp.ones((32, 4)), QuantSpec(group_size=32))
    shapes = jax.eval_shape(lambda: quantize(jnp.ones((32, 4)), QuantSpec(group_size=32)))
    assert isinstance(shapes, QTensor) and shapes.shape == q.shape and shapes.nbytes == q.nbytes
    assert jax.tree.map(lambda _: None, q).packed is None
    assert jax.tree.structure(q) != jax.tree.structure(quantize(jnp.ones((32, 4)), QuantSpec(group_size=32, bits=3)))
