# SPDX-License-Identifier: Apache-2.0
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from awq_jax import ActStats, SearchSpec, all_reduce, calibrate, merge, observe
from awq_jax._stats import percentile


def close(a: ActStats, b: ActStats) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5), a, b)


def test_against_float64(rng):
    x = rng.standard_normal((4, 7, 16)).astype(np.float32)
    s = observe(jnp.asarray(x), histogram=True)
    flat = x.reshape(-1, 16).astype(np.float64)
    assert s.count == 28
    np.testing.assert_allclose(s.abs_mean, np.abs(flat).mean(0), rtol=1e-6)
    np.testing.assert_array_equal(s.abs_max, np.abs(flat).max(0).astype(np.float32))
    np.testing.assert_allclose(s.gram, flat.T @ flat, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(s.histogram.sum(0), np.full(16, 28.0))


def test_masked_tokens_leave_no_trace(rng):
    x = rng.standard_normal((3, 5, 8)).astype(np.float32)
    mask = rng.random((3, 5)) < 0.6
    poisoned = np.where(mask[..., None], x, np.nan)
    masked = observe(jnp.asarray(poisoned), jnp.asarray(mask), histogram=True)
    close(masked, observe(jnp.asarray(x[mask]), histogram=True))


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 9), (5, 5), (12,)])
def test_any_split_of_the_tokens_gives_the_same_statistics(rng, cuts):
    x = jnp.asarray(rng.standard_normal((12, 8)), jnp.float32)
    parts = [observe(p, histogram=True) for p in jnp.split(x, cuts)]
    close(reduce(merge, parts), observe(x, histogram=True))
    close(reduce(merge, reversed(parts)), observe(x, histogram=True))


def test_calibrate_is_a_fold_of_merge(rng):
    batches = jnp.asarray(rng.standard_normal((4, 6, 8)), jnp.float32)
    taps, aux = calibrate(lambda p, x: ({"in": observe(x * p)}, x.sum()), jnp.float32(2), batches, has_aux=True)
    close(taps["in"], observe(2 * batches))
    assert aux.shape == (4,)


def test_outputs_take_the_place_of_inputs(rng):
    batches = jnp.asarray(rng.standard_normal((4, 6, 8)), jnp.float32)
    shifts = jnp.arange(4.0)
    observer = lambda p, batch: ({"in": observe(batch[0])}, p * batch[0] + batch[1])
    taps, aux = calibrate(observer, 2.0, (batches, shifts), has_aux=True)
    same, placed = calibrate(observer, 2.0, (batches, shifts), has_aux=True, in_place=True)
    np.testing.assert_array_equal(placed, aux)
    np.testing.assert_array_equal(placed, 2 * batches + shifts[:, None, None])
    jax.tree.map(np.testing.assert_array_equal, taps, same)


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_eight_devices_see_what_one_sees(rng, how):
    x = jnp.asarray(rng.standard_normal((8, 5, 16)), jnp.float32)
    seen = lambda part: all_reduce(observe(part, histogram=True), "data")
    if how == "pmap":
        total = jax.tree.map(lambda leaf: leaf[3], jax.pmap(seen, axis_name="data")(x))
    else:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        total = jax.jit(jax.shard_map(seen, mesh=mesh, in_specs=P("data"), out_specs=P()))(x)
    close(total, observe(x, histogram=True))


@pytest.mark.parametrize("q", [50.0, 99.0, 100.0])
def test_percentile_to_the_width_of_a_bin(rng, q):
    x = np.abs(rng.standard_t(3, (4096, 4))).astype(np.float32)
    got = np.asarray(percentile(observe(jnp.asarray(x), gram=False, histogram=True), q))
    exact = np.percentile(x, q, axis=0, method="inverted_cdf")
    assert np.all((got >= exact * (1 - 1e-6)) & (got <= exact * 2 ** (1 / 8) * (1 + 1e-6)))


def test_percentile_needs_a_histogram():
    with pytest.raises(ValueError, match="histogram=True"):
        percentile(observe(jnp.ones((2, 4))), 99.0)


def test_a_stride_estimates_the_gram_matrix_and_leaves_the_sums(rng):
    x = jnp.asarray(rng.standard_normal((4096, 8)).astype(np.float32))
    every, some = observe(x), observe(x, stride=4)
    np.testing.assert_array_equal(some.abs_sum, every.abs_sum)
    np.testing.assert_array_equal(some.abs_max, every.abs_max)
    assert some.count == every.count
    wide = np.asarray(x, np.float64)[::4]
    np.testing.assert_allclose(some.gram, 4 * wide.T @ wide, rtol=1e-5, atol=1e-2)
    # A sum of 1024 squares of standard normals has a standard deviation of 32 sqrt(2); six of four times that bound it.
    assert np.abs(np.asarray(some.gram - every.gram)).max() < 6 * 4 * 32 * 2**0.5


def test_short_texts_are_used_whole():
    assert SearchSpec().stride(16 * 128 - 1, 128) == 1
    assert SearchSpec().stride(16 * 128 * 3, 128) == 3
    assert SearchSpec(tokens_per_channel=None).stride(1 << 20, 128) == 1
    with pytest.raises(ValueError, match="tokens_per_channel is 0"):
        SearchSpec(tokens_per_channel=0)


def test_padding_does_not_take_the_place_of_tokens(rng):
    x = jnp.asarray(rng.standard_normal((8, 16, 4)).astype(np.float32))
    mask = jnp.arange(16) < jnp.asarray(rng.integers(1, 5, (8, 1)))  # documents of one to four tokens
    kept = np.asarray(x, np.float64)[np.asarray(mask)]
    np.testing.assert_allclose(observe(x, mask, stride=4).gram, 4 * kept[::4].T @ kept[::4], rtol=1e-5, atol=1e-5)


def test_calibrate_without_batches_is_refused():
    for batches in (jnp.zeros((0, 2, 4)), (), None):
        with pytest.raises(ValueError, match="no batches"):
            calibrate(lambda _, x: observe(x), None, batches)
