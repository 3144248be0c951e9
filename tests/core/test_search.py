# SPDX-License-Identifier: Apache-2.0
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import QuantSpec, ScaleRule, SearchSpec, Tie, observe, rule, search_scale
from awq_jax._round import fake_quantize
from awq_jax._search import candidate_scales

SPEC = QuantSpec(group_size=32)


def outlier_layer(rng, k=128, n=64, tokens=512):
    """Activations with a few large channels: what AWQ is for."""
    x = rng.standard_normal((tokens, k)) * np.exp(rng.standard_normal(k))
    x[:, rng.choice(k, 4, replace=False)] *= 20
    return x.astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)


def output_error(x, w, t, spec=SPEC):
    """||X W - X diag(1/t) Q(diag(t) W)||^2 / tokens in float64, from the definition."""
    hat = np.asarray(fake_quantize(jnp.asarray(w * t[:, None]), spec), np.float64) / t[:, None]
    return np.square(x.astype(np.float64) @ (w - hat)).sum() / len(x)


def test_the_gram_loss_is_the_output_error(rng):
    x, w = outlier_layer(rng)
    result = search_scale(observe(jnp.asarray(x)), [jnp.asarray(w)], SearchSpec(), SPEC)
    t = np.asarray(result.scale, np.float64)
    np.testing.assert_allclose(result.loss, output_error(x, w, t), rtol=1e-3)
    np.testing.assert_allclose(result.rtn_loss, output_error(x, w, np.ones(len(t))), rtol=1e-3)


@pytest.mark.parametrize("names", [("paper",), ("duo",), ("article",), ("article-literal",), ("paper", "duo")])
@pytest.mark.parametrize("symmetric", [False, True])
def test_never_worse_than_round_to_nearest(rng, names, symmetric):
    spec = QuantSpec(group_size=32, symmetric=symmetric)
    search = SearchSpec(rules=tuple(rule(n) for n in names))
    for _ in range(3):
        x, w = outlier_layer(rng)
        result = search_scale(observe(jnp.asarray(x)), [jnp.asarray(w)], search, spec)
        assert result.loss <= result.rtn_loss


def test_protecting_outliers_pays_and_the_literal_direction_does_not(rng):
    x, w = outlier_layer(rng)
    stats = observe(jnp.asarray(x))
    losses = {
        name: search_scale(stats, [jnp.asarray(w)], SearchSpec(rules=(rule(name),)), SPEC).losses
        for name in ("paper", "duo", "article", "article-literal")
    }
    for name in ("paper", "duo", "article"):
        assert losses[name][1:].min() < 0.7 * losses[name][0]
    assert losses["article-literal"][1:].min() > 2 * losses["article-literal"][0]


def test_one_scale_for_all_linears_of_a_group(rng):
    x, w = outlier_layer(rng, n=48)
    together = search_scale(observe(jnp.asarray(x)), [jnp.asarray(w)], SearchSpec(), SPEC)
    apart = search_scale(observe(jnp.asarray(x)), [jnp.asarray(w[:, :16]), jnp.asarray(w[:, 16:])], SearchSpec(), SPEC)
    assert together.index == apart.index
    np.testing.assert_allclose(together.losses, apart.losses, rtol=1e-4)


def test_candidates_follow_the_formula(rng):
    x, w = outlier_layer(rng, k=64)
    search = SearchSpec(rules=(ScaleRule(name="one", powers=((0.5, 0.25),)),))
    got = candidate_scales(observe(jnp.asarray(x)), [jnp.asarray(w)], search, SPEC)
    a = np.abs(x.astype(np.float64)).mean(0)
    groups = np.abs(w.astype(np.float64)).reshape(2, 32, -1)
    stat = (groups / groups.max(1, keepdims=True)).mean(2).reshape(-1)
    t = a**0.5 * stat**-0.25
    np.testing.assert_allclose(got[1], t / np.sqrt(t.max() * t.min()), rtol=1e-4)
    np.testing.assert_array_equal(got[0], np.ones(64))


def test_salient_fraction_scales_those_channels_alone(rng):
    x, w = outlier_layer(rng, k=100 * 2)
    search = SearchSpec(rules=(rule("paper", n_grid=3, salient_fraction=0.01),))
    t = candidate_scales(observe(jnp.asarray(x)), [jnp.asarray(w)], search, QuantSpec(group_size=-1))
    assert int((t[-1] != 1).sum()) == 2


def test_tied_channels_share_a_scale(rng):
    x, w = outlier_layer(rng, k=128)
    tie = Tie(kv_heads=2, repeats=2)
    result = search_scale(observe(jnp.asarray(x)), [jnp.asarray(w)], SearchSpec(), SPEC, tie=tie)
    assert result.scale.shape == (64,) and result.loss <= result.rtn_loss
    wide = tie.spread(result.scale)
    np.testing.assert_array_equal(wide[:32], wide[32:64])
    np.testing.assert_allclose(tie.pool(wide), result.scale, rtol=1e-6)
    np.testing.assert_allclose(result.loss, output_error(x, w, np.asarray(wide, np.float64)), rtol=1e-3)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_activations_that_are_not_finite_leave_identity(rng, poison):
    x, w = outlier_layer(rng)
    x[3, 5] = poison
    result = search_scale(observe(jnp.asarray(x)), [jnp.asarray(w)], SearchSpec(), SPEC)
    assert result.index == 0
    np.testing.assert_array_equal(result.scale, np.ones(128))


@pytest.mark.parametrize("magnitude", [1e-30, 1e15])
def test_extreme_activations_give_usable_scales(rng, magnitude):
    x, w = outlier_layer(rng)
    result = search_scale(observe(jnp.asarray(x * np.float32(magnitude))), [jnp.asarray(w)], SearchSpec(), SPEC)
    t = np.asarray(result.scale)
    assert np.isfinite(t).all() and (t > 0).all() and t.max() <= 1e4 and t.min() >= 1e-4


def test_dead_channels_stay_at_one(rng):
    x, w = outlier_layer(rng)
    x[:, [7, 40]] = 0
    w[9] = 0
    t = candidate_scales(observe(jnp.asarray(x)), [jnp.asarray(w)], SearchSpec(), SPEC)
    np.testing.assert_array_equal(t[:, [7, 9, 40]], np.ones((t.shape[0], 3)))
    live = np.delete(np.asarray(t), [7, 9, 40], axis=1)
    np.testing.assert_allclose(live.max(1) * live.min(1), np.ones(len(live)), rtol=1e-4)


def test_it_composes_with_jit_vmap_and_eval_shape(rng):
    pairs = [outlier_layer(rng, k=64, n=16) for _ in range(3)]
    stats = [observe(jnp.asarray(x)) for x, _ in pairs]
    weights = [jnp.asarray(w) for _, w in pairs]
    one_by_one = [search_scale(s, [w], SearchSpec(), SPEC) for s, w in zip(stats, weights, strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats), jnp.stack(weights)
    search = jax.jit(jax.vmap(lambda s, w: search_scale(s, [w], SearchSpec(), SPEC)))
    together = search(*stacked)
    for i, alone in enumerate(one_by_one):
        assert together.index[i] == alone.index
        np.testing.assert_allclose(together.losses[i], alone.losses, rtol=1e-4)
    assert jax.eval_shape(search, *stacked).scale.shape == (3, 64)


def test_a_custom_objective_decides(rng):
    x, w = outlier_layer(rng)
    stats = observe(jnp.asarray(x), gram=False)
    nearest_to_dense = lambda ws: jnp.sum((ws[0] - w) ** 2)
    result = search_scale(stats, [jnp.asarray(w)], SearchSpec(), SPEC, loss=nearest_to_dense)
    assert result.index == jnp.argmin(result.losses)


def test_errors_say_what_to_do(rng):
    x, w = outlier_layer(rng)
    with pytest.raises(ValueError, match="gram=True"):
        search_scale(observe(jnp.asarray(x), gram=False), [jnp.asarray(w)])
    with pytest.raises(ValueError, match="named rules are identity, paper, duo, article"):
        rule("awq")
    with pytest.raises(ValueError, match="at least one point"):
        rule("paper", n_grid=0)
    with pytest.raises(ValueError, match="'gram' or 'block'"):
        SearchSpec(objective="mse")


@pytest.mark.parametrize("n_grid", [1, 2])
def test_tiny_grids_work(rng, n_grid):
    x, w = outlier_layer(rng)
    search = SearchSpec(rules=(rule("paper", n_grid=n_grid), rule("duo", n_grid=n_grid)))
    result = search_scale(observe(jnp.asarray(x)), [jnp.asarray(w)], search, SPEC)
    assert result.losses.shape == (1 + 2 * n_grid,) and result.loss <= result.rtn_loss


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"statistic": "median"}, "statistic is 'median'; use mean, max, percentile"),
        ({"weight_statistic": "mean"}, "weight_statistic is 'mean'; use 'group' or 'max'"),
        ({"powers": ((float("nan"), 0.0),)}, "powers that are no numbers"),
        ({"powers": ()}, "no candidates"),
    ],
)
def test_rules_that_mean_nothing_are_refused(change, said):
    fields = {"name": "mine", "powers": ((0.5, 0.0),), **change}
    with pytest.raises(ValueError, match=said):
        inspect.unwrap(ScaleRule.__init__)(object.__new__(ScaleRule), **fields)  # below the annotations
