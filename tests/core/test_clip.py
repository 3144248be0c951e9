# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import QuantSpec, observe, search_clip
from awq_jax._round import fake_quantize

RATIOS = (0.9, 0.8, 0.7, 0.6)


def group_errors(x, w, spec, ratio):
    """Output error of every (group, output) in float64, from the definition."""
    k, n = w.shape
    g = spec.rows_per_group(k)
    d = (w - np.asarray(fake_quantize(jnp.asarray(w), spec, jnp.asarray(ratio, jnp.float32)))).astype(np.float64)
    rows = x.astype(np.float64).reshape(len(x), k // g, g)
    return np.square(np.einsum("tgi,gin->tgn", rows, d.reshape(k // g, g, n))).sum(0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_every_threshold_is_the_best_of_those_tried(rng, bits, symmetric):
    spec = QuantSpec(bits=bits, group_size=32, symmetric=symmetric)
    x = rng.standard_normal((256, 64)).astype(np.float32) @ rng.standard_normal((64, 64)).astype(np.float32)
    w = rng.standard_t(3, (64, 12)).astype(np.float32)
    ratio = np.asarray(search_clip(observe(jnp.asarray(x)).gram, jnp.asarray(w), spec, RATIOS))
    tried = np.stack([group_errors(x, w, spec, np.full((2, 12), r)) for r in (1.0, *RATIOS)])
    np.testing.assert_allclose(group_errors(x, w, spec, ratio), tried.min(0), rtol=1e-3)
    assert (ratio < 1).any(), "heavy tails: somewhere clipping must pay"


def test_statistics_that_are_not_finite_clip_nothing(rng):
    gram = jnp.full((32, 32), jnp.nan)
    ratio = search_clip(gram, jnp.asarray(rng.standard_normal((32, 4)), jnp.float32), QuantSpec(group_size=32), RATIOS)
    np.testing.assert_array_equal(ratio, np.ones((1, 4)))
