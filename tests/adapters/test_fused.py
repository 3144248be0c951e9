# SPDX-License-Identifier: Apache-2.0
"""v inside a fused qkv, and up inside a fused gate and up, absorb a scale as they do alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import adapt
from awq_jax.adapt import Columns
from tests.adapters.models import D
from tests.adapters.served import RECIPE, dense, distance, quantized

HEADS, HEAD = 4, 8
heads = lambda y: y.reshape(*y.shape[:-1], -1, HEAD)


def attend(params, x, q, k, v):
    """What stands around every one of these projections."""
    return x + jax.nn.dot_product_attention(q, k, v).reshape(*x.shape[:-1], -1) @ params["o"]["kernel"]


def contiguous(params, x):
    """GPT-2's: all of q, all of k, all of v."""
    y = (x * params["gain"]) @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    return attend(params, x, *map(heads, jnp.split(y, 3, axis=-1)))


def grouped(params, x):
    """Grouped queries: k and v are narrower."""
    y = (x * params["gain"]) @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    return attend(params, x, heads(y[..., :D]), heads(y[..., D : D + 16]), heads(y[..., D + 16 :]))


def by_head(params, x):
    """GPT-NeoX's: q, k and v of each head together."""
    y = (x * params["gain"]) @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    return attend(params, x, *jnp.split(y.reshape(*y.shape[:-1], HEADS, 3 * HEAD), 3, axis=-1))


def indexed(params, x):
    """An axis of three in a kernel of four axes."""
    y = jnp.einsum("btd,dcnh->btcnh", x * params["gain"], params["qkv"]["kernel"]) + params["qkv"]["bias"]
    return attend(params, x, y[:, :, 0], y[:, :, 1], y[:, :, 2])


def unpacked(params, x):
    """Gemma's: an axis of two in front, taken apart by iterating over it."""
    h = x * params["gain"]
    k, v = jnp.einsum("btd,cndh->cbtnh", h, params["kv"]["kernel"])
    return attend(params, x, heads(h @ params["q"]["kernel"]), k, v)


def gated(params, x):
    """Phi-3's MLP."""
    gate, up = jnp.split((x * params["gain"]) @ params["both"]["kernel"], 2, axis=-1)
    return x + (jax.nn.silu(gate) * up) @ params["down"]["kernel"]


def scanned(params, x):
    """Two layers stacked."""
    return jax.lax.scan(lambda x, layer: (contiguous(layer, x), None), x, params)[0]


FUSED = {
    contiguous: ({"qkv": (D, 96)}, 96, "qkv", "o", Columns(period=96, start=64, stop=96)),
    grouped: ({"qkv": (D, 64)}, 64, "qkv", "o", Columns(period=64, start=48, stop=64)),
    by_head: ({"qkv": (D, 96)}, 96, "qkv", "o", Columns(period=24, start=16, stop=24)),
    indexed: ({"qkv": (D, 3, HEADS, HEAD)}, (3, HEADS, HEAD), "qkv", "o", Columns(period=96, start=64, stop=96)),
    unpacked: ({"q": (D, D), "kv": (2, 2, D, HEAD)}, None, "kv", "o", Columns(period=32, start=16, stop=32)),
    gated: ({"both": (D, 128), "down": (64, D)}, None, "both", "down", Columns(period=128, start=64, stop=128)),
    scanned: ({"qkv": (2, D, 96)}, (2, 96), "qkv", "o", Columns(period=96, start=64, stop=96)),
}


def make(program):
    rng = np.random.default_rng(0)
    shapes, bias, *_ = FUSED[program]
    lead = (2,) if program is scanned else ()
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape) * D**-0.5, jnp.float32)
    params = {name: {"kernel": normal(*shape)} for name, shape in shapes.items()}
    if bias:
        params["qkv"]["bias"] = normal(*(bias if isinstance(bias, tuple) else (bias,)))
    if program is not gated:
        params["o"] = {"kernel": normal(*lead, D, D)}
    return params | {"gain": jnp.asarray(np.exp(rng.standard_normal((*lead, D))), jnp.float32)}


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(1).standard_normal((2, 20, D)), jnp.float32)


@pytest.mark.parametrize("program", FUSED, ids=lambda program: program.__name__)
def test_the_columns_that_absorb_a_scale_are_found(program, x):
    params = make(program)
    *_, fused, sink, columns = FUSED[program]
    table = adapt.propose(program, params, x)
    (group,) = (group for group in table.groups if group.sinks == (f"{sink}/kernel",))
    assert (group.producer, group.columns) == (f"{fused}/kernel", columns)
    assert group.bias == ("qkv/bias" if "bias" in params.get(fused, {}) else None)
    assert adapt.verify(program, params, (x,), table) == 0.0


def test_fused_is_what_three_kernels_are(x):
    """Oracle: the same model with q, k and v in kernels of their own gets the same codes."""
    params = make(contiguous)
    parts = dict(
        zip("qkv", zip(*(jnp.split(params["qkv"][n], 3, -1) for n in ("kernel", "bias")), strict=True), strict=True)
    )
    apart = {n: params[n] for n in ("gain", "o")} | {n: {"kernel": w, "bias": b} for n, (w, b) in parts.items()}

    def three(params, x):
        h = x * params["gain"]
        return attend(params, x, *(heads(h @ params[n]["kernel"] + params[n]["bias"]) for n in "qkv"))

    _, fused, coverage = quantized(contiguous, params, x, recipe=RECIPE)
    assert "qkv/kernel, columns 64:96 of every 96" in {report.producer for report in coverage.groups}
    assert distance(adapt.serve(contiguous)(fused, x), contiguous(dense(fused), x)) < 1e-5
    _, wanted, _ = quantized(three, apart, x, recipe=RECIPE)
    for leaf in ("kernel", "bias"):
        whole = jnp.concatenate([dense(wanted)[n][leaf] for n in "qkv"], axis=-1)
        np.testing.assert_allclose(dense(fused)["qkv"][leaf], whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dense(fused)["o"]["kernel"], dense(wanted)["o"]["kernel"], rtol=1e-5, atol=1e-6)


def test_other_columns_are_not_mistaken_for_them(x):
    """k's columns, folded into o by hand, change the outputs."""
    table = adapt.propose(contiguous, make(contiguous), x)
    wrong = adapt.Group(
        producer="qkv/kernel", bias="qkv/bias", columns=Columns(period=96, start=32, stop=64), sinks=("o/kernel",)
    )
    assert adapt.verify(contiguous, make(contiguous), (x,), table.with_groups(wrong)) > 0.01
