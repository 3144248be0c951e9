# SPDX-License-Identifier: Apache-2.0
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from awq_jax import QuantSpec, adapt, dequantize, quantize
from awq_jax.train import apply_adapters, combine, fake_quantized, init_adapters, learned, learned_scales, split
from tests.adapters.models import D, mlp, mlp_params
from tests.adapters.served import RECIPE, dense, distance, quantized

SPEC = QuantSpec(bits=2, group_size=16, scale_dtype="float32")


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(1).standard_normal((8, 10, D)), jnp.float32)


@pytest.fixture(scope="module")
def weights(x):
    return adapt.find_weights(mlp, mlp_params(), x)[0]


def test_forward_is_what_will_be_written(x, weights):
    rounded = fake_quantized(mlp_params(), weights, SPEC)
    for name in ("gate", "up", "down"):
        wanted = dequantize(quantize(mlp_params()[name]["w"], SPEC))
        np.testing.assert_allclose(rounded[name]["w"], wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(rounded["norm"]["gain"], mlp_params()["norm"]["gain"])


def test_mistakes_are_named(weights):
    with pytest.raises(ValueError, match="Cannot quantize 'gate/w': its contraction dimension 32 is not a multiple"):
        fake_quantized(mlp_params(), weights, QuantSpec(group_size=24))
    with pytest.raises(ValueError, match="'gate/v' is not among the parameters"):
        fake_quantized(mlp_params(), {"gate/v": weights["gate/w"]}, SPEC)


def test_backward_passes_through_the_rounding(x, weights):
    loss = lambda p: jnp.mean(mlp(p, x) ** 2)
    through = jax.grad(lambda p: loss(fake_quantized(p, weights, SPEC)))(mlp_params())
    at_rounded = jax.grad(loss)(fake_quantized(mlp_params(), weights, SPEC))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), through, at_rounded)


def test_training_through_the_rounding_recovers_two_bits(x, weights):
    target = mlp(mlp_params(), x)
    distill = lambda p: jnp.mean((mlp(fake_quantized(p, weights, SPEC), x) - target) ** 2)
    optimizer = optax.adam(2e-3)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(distill)(params)
        update, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, update), state, value

    params, state = mlp_params(), optimizer.init(mlp_params())
    before, best = float(distill(params)), np.inf
    for _ in range(100):
        params, state, value = step(params, state)
        best = min(best, float(value))
    assert best < 0.6 * before


def test_learned_scales(x):
    _, base, _ = quantized(mlp, mlp_params(), x)
    scales, target = learned_scales(base), mlp(mlp_params(), x)
    assert scales.keys() == {"gate/w", "up/w", "down/w"}
    np.testing.assert_allclose(mlp(learned(base, scales), x), mlp(dense(base), x), rtol=1e-5, atol=1e-5)

    distill = lambda s: jnp.mean((mlp(learned(base, s), x) - target) ** 2)
    gradient = jax.grad(distill)(scales)
    direction = {p: jnp.sign(g) * scales[p] * 1e-3 for p, g in gradient.items()}
    finite = distill({p: s + direction[p] for p, s in scales.items()}) - distill(
        {p: s - direction[p] for p, s in scales.items()}
    )
    along = sum(float(jnp.vdot(gradient[p], direction[p])) for p in scales)
    np.testing.assert_allclose(2 * along, finite, rtol=1e-2)

    before = float(distill(scales))
    for _ in range(30):
        norms = jax.grad(distill)(scales)
        scales = {p: s * (1 - 2e-3 * jnp.sign(norms[p])) for p, s in scales.items()}
    stored = learned(base, scales, store=True)
    assert jax.tree.structure(stored) == jax.tree.structure(base)
    after = float(jnp.mean((adapt.serve(mlp)(stored, x) - target) ** 2))
    assert after < 0.8 * before


def test_split_and_combine(x):
    _, base, _ = quantized(mlp, mlp_params(), x, recipe=RECIPE)
    trained, frozen = split(base, lambda path: path.startswith("norm"))
    assert [leaf.shape for leaf in jax.tree.leaves(trained)] == [(D,)]
    again = combine(trained, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(base)
    jax.tree.map(np.testing.assert_array_equal, again, base)
    gradient = jax.grad(lambda t: jnp.sum(adapt.serve(mlp)(combine(t, frozen), x)))(trained)
    wanted = jax.grad(lambda gain: jnp.sum(mlp({**dense(base), "norm": {"gain": gain}}, x)))(base["norm"]["gain"])
    np.testing.assert_allclose(gradient["norm"]["gain"], wanted, rtol=1e-3, atol=1e-4)
    assert distance(adapt.serve(mlp)(again, x), adapt.serve(mlp)(base, x)) == 0


def test_split_takes_any_answer_for_yes_or_no(x):
    _, base, _ = quantized(mlp, mlp_params(), x, recipe=RECIPE)
    for answer in (lambda path: re.match("norm", path), lambda path: np.bool_(path.startswith("norm"))):
        trained, frozen = split(base, answer)
        assert [leaf.shape for leaf in jax.tree.leaves(trained)] == [(D,)]
        jax.tree.map(np.testing.assert_array_equal, combine(trained, frozen), base)


def test_scales_of_what_is_no_quantized_kernel_are_refused(x):
    _, base, _ = quantized(mlp, mlp_params(), x, recipe=RECIPE)
    path, scale = next(iter(learned_scales(base).items()))
    for scales, said in (
        ({"nowhere": scale}, "'nowhere' is not among the parameters"),
        ({"norm/gain": scale}, "'norm/gain' is of type ArrayImpl"),
        ({path: scale[:, :1]}, r"the scale of .* as learned_scales gives it"),
    ):
        for store in (False, True):
            with pytest.raises(ValueError, match=said):
                learned(base, scales, store=store)
    adapted = apply_adapters(base, init_adapters(jax.random.key(0), base))
    with pytest.raises(ValueError, match=r"is of type Adapted.*without adapters"):
        learned_scales(adapted)
