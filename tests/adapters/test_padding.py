# SPDX-License-Identifier: Apache-2.0
"""Statistics of padded batches are those of the tokens alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from awq_jax import adapt, linen
from awq_jax import nnx as modules
from awq_jax.adapt import merge_tree
from awq_jax.adapt.padding import mask_rows
from tests.adapters.models import Scanned, some_tokens

PAD = 0
LENGTHS = (24, 9)


def padded(tokens):
    """Right padding, which causal attention never looks at from a token."""
    tokens = jnp.maximum(tokens, 1)
    return jnp.where(jnp.arange(tokens.shape[1]) < jnp.array(LENGTHS)[:, None], tokens, PAD)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for path, stats in want.items():
        np.testing.assert_array_equal(got[path].count, stats.count)
        for name in ("abs_sum", "abs_max", "gram"):
            a, b = getattr(got[path], name), getattr(stats, name)
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def alone(observe, batch):
    """Every sample by itself, cut to its tokens."""
    total = None
    for row, length in zip(batch, LENGTHS, strict=True):
        total = merge_tree(total, observe(row[None, :length]))
    return total


def test_a_module_of_rows():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 24, 8))
    tokens = jnp.arange(24) < jnp.array(LENGTHS)[:, None]
    table = modules.propose(model, x)
    got = modules.observe(model, [x], table, token_mask=lambda x: tokens)
    assert_same(got, modules.observe(model, [x[tokens]], table))


@pytest.mark.slow
def test_scanned_and_rematerialized_layers_with_experts():
    module, batch = Scanned(), padded(some_tokens(shape=(2, 24)))
    variables = module.init(jax.random.key(0), batch)
    table = linen.propose(module, variables, some_tokens())
    got = linen.observe(module, variables, [batch], table, token_mask=lambda ids: ids != PAD)
    assert_same(got, alone(lambda ids: linen.observe(module, variables, [ids], table), batch))


def test_rows_that_were_rearranged_are_refused_by_name():
    def time_major(params, x):
        return x.swapaxes(0, 1) @ params["w"]

    params, x = {"w": jnp.ones((8, 4))}, jnp.ones((2, 6, 8))
    table = adapt.propose(time_major, params, x)
    with pytest.raises(ValueError, match=r"'w' reads are \(6, 2\), which do not begin with the mask's axes \(2, 6\)"):
        adapt.observe(time_major, params, [x], table, token_mask=lambda x: jnp.ones((2, 6), bool))


@pytest.mark.parametrize("free", [(2, 3), (6,), (1, 2, 3), (2, 1, 3), (2, 3, 1), (2, 3, 5)])
def test_rows_of_a_token_share_its_mask(free):
    mask = np.array([[True, False, True], [False, False, True]])
    many = int(np.prod(free)) // 6
    np.testing.assert_array_equal(mask_rows(jnp.asarray(mask), free, "w"), np.repeat(mask.reshape(-1), many))


@pytest.mark.parametrize("free", [(3, 2), (2, 4), (5,), (12,), ()])
def test_other_rows_are_refused(free):
    with pytest.raises(ValueError, match="begin with the mask's axes"):
        mask_rows(jnp.ones((2, 3), bool), free, "w")
