# SPDX-License-Identifier: Apache-2.0
"""Heads and widths cut over fake devices: the same answers, and no device with more than its share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from awq_jax import QTensor, QuantSpec, quantize
from awq_jax._qtensor import in_rows
from awq_jax._tree import leaves
from awq_jax.serving import Engine, Request, load
from awq_jax.serving.arrange import arranged
from awq_jax.serving.sharding import cut, load_sharded, local_config, sharded_programs, sharded_slots


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:2]), ("tp",))


@pytest.fixture(scope="module")
def sharded(native, mesh):
    return load_sharded(native, mesh)


@pytest.mark.parametrize("int4_head", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_devices_answer_as_one(native, mesh, prompts, int4_head):
    requests = [Request(prompt=prompt, max_new_tokens=24) for prompt in prompts]
    options: dict[str, Any] = {"slots": 4, "max_len": 96}
    alone = load(native, int4_head=int4_head)
    wanted = Engine(alone.config, alone.params, **options).generate(requests)
    shared = load_sharded(native, mesh, int4_head=int4_head)
    made = Engine(
        shared.config,
        shared.params,
        programs=sharded_programs(shared.config, mesh),
        make_slots=lambda config, *a, **k: sharded_slots(config, mesh, *a, **k),
        **options,
    ).generate(requests)
    assert made == wanted


def test_shares_in_tile_order_are_the_same_weights(native, mesh, sharded, monkeypatch):
    monkeypatch.setattr("awq_jax.serving.sharding.arranged", functools.partial(arranged, platform="gpu"))
    tiled = load_sharded(native, mesh, dtype=jnp.bfloat16).params["layers"]["1"]
    for name in (("attn", "qkv"), ("attn", "o"), ("mlp", "gate_up"), ("mlp", "down")):
        weight, rows = (layer[name[0]][name[1]]["kernel"] for layer in (tiled, sharded.params["layers"]["1"]))
        assert weight.packed.dtype == jnp.int32 and weight.shape == rows.shape
        assert {shard.data.size for shard in weight.packed.addressable_shards} == {weight.packed.size // 2}
        np.testing.assert_array_equal(in_rows(weight).packed, rows.packed)


def test_every_device_holds_its_share(sharded, native):
    whole = load(native)
    for (path, leaf), (same, full) in zip(leaves(sharded.params), leaves(whole.params), strict=True):
        assert path == same and leaf.shape == full.shape
        if isinstance(leaf, QTensor):
            for part in jax.tree.leaves(leaf):
                assert {shard.data.size for shard in part.addressable_shards} == {part.size // 2}, path


def test_a_row_cut_weight_is_the_weight(sharded, native):
    """o and down are cut along k: put together they are what one device has."""
    whole = load(native)
    for name in (("attn", "o"), ("mlp", "down")):
        find = lambda tree, name=name: tree["layers"]["1"][name[0]][name[1]]["kernel"]
        for placed, full in zip(
            jax.tree.leaves(find(sharded.params)), jax.tree.leaves(find(whole.params)), strict=True
        ):
            np.testing.assert_array_equal(placed, full)


def test_what_does_not_divide_is_refused(shipped, native):
    with pytest.raises(ValueError, match="num_heads=4 can't be cut into 3"):
        local_config(shipped.config, 3)
    with pytest.raises(ValueError, match="num_kv_heads=2 can't be cut into 4"):
        load_sharded(native, Mesh(np.array(jax.devices()[:4]), ("tp",)))


def test_groups_that_straddle_devices_are_refused(rng):
    weight = quantize(jnp.asarray(rng.normal(size=(96, 8)), jnp.float32), QuantSpec(group_size=32))
    with pytest.raises(ValueError, match="mlp/down/kernel has 3 groups, which 2 devices can't share evenly"):
        cut("mlp/down/kernel", weight, 0, 2)


def test_slots_are_cut_along_heads(sharded, mesh):
    make = functools.partial(sharded_slots, sharded.config, mesh, 2, 32, dtype=jnp.float32)
    for held in make().cache.k:
        assert {shard.data.shape[1] for shard in held.data.addressable_shards} == {32}
