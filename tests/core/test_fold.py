# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import QuantSpec, Tie, dequantize, fold_scale, quantize
from awq_jax.families._table import Group, Linear, Norm


def linear(rng, k, n, bias=False):
    made = {"kernel": jnp.asarray(rng.standard_normal((k, n)), jnp.float32)}
    return {**made, "bias": jnp.asarray(rng.standard_normal(n), jnp.float32)} if bias else made


def apply(layer, x):
    return x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer.get("bias", 0.0), np.float64)


def scales(rng, n):
    return jnp.asarray(np.exp(rng.uniform(-3, 3, n)), jnp.float32)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_norm_to_linears(rng, offset, bias):
    params = {"norm": {"scale": jnp.asarray(rng.standard_normal(32), jnp.float32)}}
    if bias:
        params["norm"]["bias"] = jnp.asarray(rng.standard_normal(32), jnp.float32)
    params |= {"q": linear(rng, 32, 8, bias=True), "k": linear(rng, 32, 4), "router": linear(rng, 32, 3)}
    group = Group(Norm("norm", offset=offset), ("q", "k"), float_sinks=("router",))
    folded = fold_scale(params, group, scales(rng, 32))
    x = rng.standard_normal((5, 32))

    def outputs(p):
        gain = offset + np.asarray(p["norm"]["scale"], np.float64)
        normed = x * gain + np.asarray(p["norm"].get("bias", 0.0), np.float64)
        return [apply(p[name], normed) for name in ("q", "k", "router")]

    for before, after in zip(outputs(params), outputs(folded), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    assert not np.allclose(folded["q"]["kernel"], params["q"]["kernel"])


def test_values_to_output_under_grouped_query_attention(rng):
    heads, kv_heads, d, tokens = 6, 2, 4, 5
    params = {"v": linear(rng, 16, kv_heads * d, bias=True), "o": linear(rng, heads * d, 16)}
    tie = Tie(kv_heads=kv_heads, repeats=heads // kv_heads)
    folded = fold_scale(params, Group(Linear("v", tie="gqa"), ("o",)), scales(rng, kv_heads * d), tie)
    x = rng.standard_normal((tokens, 16))
    attention = rng.random((heads, tokens, tokens))  # any mixing of tokens, head by head

    def output(p):
        v = apply(p["v"], x).reshape(tokens, kv_heads, d)
        mixed = np.stack([attention[h] @ v[:, h // tie.repeats] for h in range(heads)], axis=1)
        return apply(p["o"], mixed.reshape(tokens, heads * d))

    np.testing.assert_allclose(output(folded), output(params), rtol=1e-5, atol=1e-4)


def test_folding_into_a_linear_leaves_its_codes(rng):
    """The columns of the producer shrink, and its group scales shrink with them."""
    params = {"up": linear(rng, 64, 32), "down": linear(rng, 32, 8)}
    powers_of_two = jnp.asarray(2.0 ** rng.integers(-3, 4, 32), jnp.float32)
    folded = fold_scale(params, Group(Linear("up"), ("down",)), powers_of_two)
    spec = QuantSpec(group_size=32, scale_dtype="float32")
    before, after = (quantize(p["up"]["kernel"], spec) for p in (params, folded))
    np.testing.assert_array_equal(before.packed, after.packed)
    np.testing.assert_array_equal(dequantize(before) / powers_of_two, dequantize(after))


def test_refusals(rng):
    params = {"up": linear(rng, 8, 8), "down": linear(rng, 8, 8)}
    with pytest.raises(ValueError, match="no producer to fold a scale into: GELU lies between"):
        fold_scale(params, Group(None, ("down",), reason="GELU lies between"), jnp.ones(8))
    with pytest.raises(KeyError, match=r"no 'gate' in these parameters: 'the root' has \['down', 'up'\]"):
        fold_scale(params, Group(Linear("up"), ("gate",)), jnp.ones(8))
