# SPDX-License-Identifier: Apache-2.0
"""Products that read a stream's norm or add to it: definition and kernel against numpy in float64.

Roundings of a half place `HALF`, each independent: of a normed row by who rounds one, of every product, of what is
returned. Of sums over k six standard deviations are allowed.
"""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax_kernels import stream
from awq_jax_kernels.add_norm import add_norm
from awq_jax_kernels.gated import gated
from awq_jax_kernels.int4_matmul.tiles import prepare
from tests.kernels.cases import Case
from tests.kernels.contract import make_problem

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU; AWQ_JAX_TEST_PLATFORM=cuda uses one"),
]
WAYS = [("reference", False), pytest.param("gpu", False, marks=GPU), pytest.param("gpu", True, marks=GPU)]
HALF = float(jnp.finfo(jnp.bfloat16).eps) / 2
EPS = 1e-5


def wide(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def made(rng, m, k, n, tiles, **more):
    """x, the weight, and the weight in float64."""
    p = make_problem(rng, Case(m, k, n, 128), **more)
    return p.x, (prepare(p.packed) if tiles else p.packed, p.scale, p.zero), p.w64


def streaming(rng, m, d, way):
    """A stream as the products of this way make it: by adding nothing."""
    total = jnp.asarray(rng.standard_normal((m, d)) * rng.uniform(0.1, 10, (m, 1)), jnp.bfloat16)
    gain = jnp.asarray(rng.uniform(0.5, 2, d), jnp.float32)
    begun = stream.start(total, gain)
    if way == "reference":
        return begun
    x, weight, _ = made(rng, m, 128, d, False)
    return stream.add_product(begun, jnp.zeros_like(x), *weight, weight=gain, implementation=way)


def normed(read):
    """Its rows after the norm, in float64, from the stream and not from its squares."""
    total = wide(read.total)
    return wide(read.weighted) / np.sqrt(np.mean(total**2, axis=1, keepdims=True) + EPS)


def bound(x, w, y):
    """Of a product: rows that are rounded, and the result."""
    return 6 * HALF * np.sqrt((x**2) @ (w**2)) / math.sqrt(3) + 1.01 * HALF * np.abs(y) + 1e-6


@pytest.mark.parametrize("way, tiles", WAYS)
@pytest.mark.parametrize("m, d, n", [(1, 4096, 6144), (5, 384, 256), (12, 1024, 384), (32, 512, 512)])
@pytest.mark.parametrize("zeros", [True, False])
def test_a_product_of_the_norm(rng, way, tiles, m, d, n, zeros):
    read = streaming(rng, m, d, way)
    _, weight, w = made(rng, m, d, n, tiles, zeros=zeros)
    y = stream.product(read, *weight, eps=EPS, implementation=way)
    x = normed(read)
    assert y.dtype == jnp.bfloat16 and y.shape == (m, n)
    assert np.all(np.abs(wide(y) - x @ w) <= bound(x, w, x @ w))


@pytest.mark.parametrize("way, tiles", WAYS)
@pytest.mark.parametrize("m, d, n", [(1, 4096, 28672), (3, 256, 512), (16, 512, 256), (31, 384, 768)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gated_product_of_the_norm(rng, way, tiles, m, d, n, activation):
    read = streaming(rng, m, d, way)
    _, weight, w = made(rng, m, d, n, tiles)
    w, weight = w / 4, (weight[0], weight[1] / 4, weight[2])  # gates of a few units
    y = stream.product(read, *weight, eps=EPS, activation=activation, implementation=way)
    x = normed(read)
    gate, up = np.split(x @ w, 2, axis=1)
    of_gate, of_up = np.split(bound(x, w, x @ w), 2, axis=1)
    z = gate if activation == "silu" else 2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    activated = gate * 0.5 * (1 + np.tanh(z / 2))
    assert y.shape == (m, n // 2)
    slope = 1.13  # of either activation, at most
    allowed = slope * of_gate * (np.abs(up) + of_up) + of_up * np.abs(activated) + 1.01 * HALF * np.abs(activated * up)
    assert np.all(np.abs(wide(y) - activated * up) <= allowed + 1e-4 * np.abs(up))


@pytest.mark.parametrize("way, tiles", WAYS)
@pytest.mark.parametrize("m, k, d", [(1, 14336, 4096), (5, 256, 384), (9, 4096, 1024), (32, 512, 512)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_adding_to_the_stream(rng, way, tiles, m, k, d, offset):
    x, weight, w = made(rng, m, k, d, tiles)
    total = jnp.asarray(rng.standard_normal((m, d)) * 4, jnp.bfloat16)
    gain = jnp.asarray(rng.uniform(-1, 1, d), jnp.float32)
    before = stream.start(total, gain)
    after = stream.add_product(before, x, *weight, weight=gain, offset=offset, implementation=way)
    y = wide(x) @ w
    summed = wide(total) + y
    noise = 6 * 2.0**-24 * math.sqrt(k / 6) * np.sqrt((wide(x) ** 2) @ (31 * np.abs(w)) ** 2)
    assert np.all(np.abs(wide(after.total) - summed) <= 1.01 * HALF * (np.abs(y) + np.abs(summed)) + noise)
    np.testing.assert_allclose(
        wide(after.weighted), wide(after.total) * (offset + wide(gain)), rtol=1.01 * HALF, atol=1e-30
    )
    np.testing.assert_allclose(wide(after.squares).sum(1), (wide(after.total) ** 2).sum(1), rtol=1e-5)


@pytest.mark.parametrize("way, tiles", WAYS)
def test_the_same_answer_every_time(rng, way, tiles):
    """A race moves from run to run; the order of sums is fixed."""
    x, down, _ = made(rng, 16, 1536, 1024, tiles)
    _, gate_up, _ = made(rng, 16, 1024, 2048, tiles)
    gain = jnp.ones(1024)
    begun = stream.start(jnp.asarray(rng.standard_normal((16, 1024)), jnp.bfloat16), gain)

    @jax.jit
    def both(x):
        after = stream.add_product(begun, x, *down, weight=gain, implementation=way)
        return after, stream.product(after, *gate_up, eps=EPS, activation="silu", implementation=way)

    first = jax.tree.map(wide, both(x))
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(wide, both(x)), first)


def test_mapped_over_an_axis_it_is_the_same(rng):
    x, weight, _ = made(rng, 4, 256, 384, False)
    gain = jnp.ones(384)
    begun = stream.start(jnp.asarray(rng.standard_normal((4, 384)), jnp.bfloat16), gain)
    add = functools.partial(stream.add_product, weight=gain)
    alone = add(begun, x, *weight)
    one = lambda begun, x: add(jax.tree.map(lambda leaf: leaf[None], begun), x[None], *weight)
    mapped = jax.vmap(one)(begun, x)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(wide(a[:, 0]), wide(b)), mapped, alone)


@pytest.fixture
def gpu_process(monkeypatch):
    """A process with a GPU as far as staging goes: kernels are traced, and this platform's lowering leaves them out."""
    for name in ("add_norm", "gated", "stream"):
        monkeypatch.setattr(importlib.import_module(f"awq_jax_kernels.{name}.api"), "cuda", lambda: "cuda")


@pytest.mark.parametrize("activation", [None, "silu"])
def test_where_there_is_a_gpu_it_can_be_mapped_too(rng, gpu_process, activation):
    """What a kernel becomes, its definition, has kernels in turn."""
    _, weight, _ = made(rng, 1, 384, 512, True)
    rows = jnp.asarray(rng.standard_normal((5, 3, 384)), jnp.bfloat16)
    begun = lambda rows: stream.start(rows, jnp.ones(384))
    read = lambda rows, **way: stream.product(begun(rows), *weight, eps=EPS, activation=activation, **way)
    alone = wide(read(rows.reshape(15, 384), implementation="reference"))
    np.testing.assert_allclose(wide(jax.jit(jax.vmap(read))(rows)).reshape(alone.shape), alone, rtol=1.01 * HALF)


@pytest.mark.parametrize("delta", [True, False])
def test_what_lies_between_products_can_be_mapped_too(rng, gpu_process, delta):
    rows = jnp.asarray(rng.standard_normal((5, 3, 512)), jnp.bfloat16)
    added = functools.partial(add_norm, weight=jnp.ones(512), eps=EPS)
    between = lambda h, **way: (gated(h, activation="silu", **way), *added(h, h if delta else None, **way))
    mapped, alone = jax.jit(jax.vmap(between))(rows), between(rows.reshape(15, 512), implementation="reference")
    close = lambda a, b: np.testing.assert_allclose(wide(a).reshape(b.shape), wide(b), rtol=2.01 * HALF, atol=1e-30)
    jax.tree.map(close, mapped, alone)


def test_refusals_are_named(rng):
    x, weight, _ = made(rng, 3, 256, 384, False)
    gain = jnp.ones(384)
    begun = stream.start(jnp.zeros((3, 384), jnp.bfloat16), gain)
    with pytest.raises(ValueError, match=r"stream must be \(m, n\)"):
        stream.add_product(stream.start(x, jnp.ones(256)), x, *weight, weight=gain)
    with pytest.raises(ValueError, match="x must have 256 columns"):
        stream.product(begun, *weight, eps=EPS)
    with pytest.raises(ValueError, match="'relu'"):
        stream.product(stream.start(x, jnp.ones(256)), *weight, eps=EPS, activation="relu")
    with pytest.raises(ValueError, match="squares of 1 parts are not in fours"):
        read = stream.start(x, jnp.ones(256))._replace(squares=jnp.ones((3, 1)))
        stream.product(read, *weight, eps=EPS, implementation="gpu")
    with pytest.raises(ValueError, match="40 rows of x are more than 32"):
        many, weight, _ = made(rng, 40, 256, 384, False)
        begun = stream.start(jnp.zeros((40, 384), jnp.bfloat16), gain)
        stream.add_product(begun, many, *weight, weight=gain, implementation="gpu")
    with pytest.raises(ValueError, match="float32; rows that are not divided yet"):
        wide_x, begun = x.astype(jnp.float32), stream.start(jnp.zeros((3, 384)), gain)
        stream.add_product(begun, wide_x, *made(rng, 3, 256, 384, False)[1], weight=gain, implementation="gpu")
