# SPDX-License-Identifier: Apache-2.0
"""Gram matrices over the limit are kept in blocks, which hold whole groups, and the report says so."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import QuantSpec, SearchSpec, adapt
from tests.adapters.models import INNER, D, mlp, mlp_params
from tests.adapters.served import RECIPE, dense, distance

LIMIT = 4 * D * D  # the whole matrix of the inputs of gate and up, a quarter of that of down
LIMITED = dataclasses.replace(RECIPE, search=SearchSpec(gram_limit=LIMIT), quant=QuantSpec(group_size=16))


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(1).standard_normal((2, 40, D)), jnp.float32)


@pytest.fixture(scope="module")
def table(x):
    return adapt.propose(mlp, mlp_params(), x)


def test_blocks_are_those_of_the_whole(x, table):
    whole = adapt.observe(mlp, mlp_params(), [x], table)
    stats = adapt.observe(mlp, mlp_params(), [x], table, LIMITED)
    assert stats["gate/w"].gram.shape == (D, D)
    assert stats["down/w"].gram.shape == (INNER // 16, 16, 16)
    for i, block in enumerate(stats["down/w"].gram):
        rows = slice(16 * i, 16 * (i + 1))
        np.testing.assert_allclose(block, whole["down/w"].gram[rows, rows], rtol=1e-4, atol=1e-4)


def test_a_quantization_from_blocks_is_served_and_named(x, table):
    stats = adapt.observe(mlp, mlp_params(), [x], table, LIMITED)
    for method in ("awq", "awq+gptq"):
        recipe = dataclasses.replace(LIMITED, method=method)
        qparams, coverage = adapt.quantize(mlp_params(), stats, table, recipe)
        assert distance(adapt.serve(mlp)(qparams, x), mlp(dense(qparams), x)) < 1e-5
        reasons = {linear.path: linear.reason for linear in coverage.linears}
        assert reasons["down/w"] == "of the Gram matrix of its 64 inputs blocks of 16 rows were kept (gram_limit)"
        assert reasons["gate/w"] == ""


def test_blocks_that_split_a_group_are_refused(x, table):
    stats = adapt.observe(mlp, mlp_params(), [x], table, LIMITED)
    with pytest.raises(ValueError, match=r"blocks of 16 rows .*'down/w'.*groups of 32: observe with"):
        adapt.quantize(mlp_params(), stats, table, RECIPE)


def test_without_a_limit_it_is_the_devices(x, table, monkeypatch):
    """As in `quantize_checkpoint`: an eighth of the memory there is."""
    monkeypatch.setattr("awq_jax.adapt.blocks.device_memory", lambda: 8 * LIMIT)
    stats = adapt.observe(mlp, mlp_params(), [x], table, dataclasses.replace(LIMITED, search=SearchSpec()))
    assert stats["gate/w"].gram.ndim == 2 and stats["down/w"].gram.ndim == 3
