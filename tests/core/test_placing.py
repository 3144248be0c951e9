# SPDX-License-Identifier: Apache-2.0
"""Where weights lie while they are searched."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from awq_jax.placing import ALONE, axes_of_weight
from awq_jax.sharding import Layout


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 128), P(None, ("model", "data", "fsdp"))),  # an output with all its inputs
        ((3, 64, 128), P(None, None, ("model", "data", "fsdp"))),
        ((64, 6), P("fsdp", ("model", "data"))),  # six outputs for four devices: two parts, and inputs in two
        ((64, 5), P("fsdp", ("model",))),
        ((128,), P()),
    ],
)
def test_an_output_is_searched_with_all_its_inputs(shape: tuple[int, ...], expected: P):
    placing = Layout({"data": 2, "fsdp": 2}).placing
    assert placing.mesh is not None
    placed = jax.jit(placing.by_outputs)({"w": jnp.ones(shape)})["w"]
    assert placed.sharding.is_equivalent_to(jax.sharding.NamedSharding(placing.mesh, expected), len(shape))


def test_between_two_layers_inputs_are_over_fsdp():
    sizes = {"data": 2, "fsdp": 2, "model": 1}
    assert axes_of_weight((64, 128), sizes, ("model", "data")) == ("fsdp", ("model", "data"))


def test_without_a_mesh_nothing_is_said():
    tree = {"w": jnp.ones((4, 4))}
    assert ALONE.by_outputs(tree) is tree
