# SPDX-License-Identifier: Apache-2.0
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax.adapt import find_weights
from awq_jax.adapt.interpret import interpret, traced
from awq_jax.adapt.layout import refine
from awq_jax.adapt.program import run
from awq_jax.adapt.record import Recorder


@pytest.mark.parametrize(
    ("old", "new", "pieces"),
    [
        ((6, 4), (2, 12), [[2, 3], [4]]),
        ((6, 4), (4, 6), None),
        ((8,), (2, 2, 2), [[2, 2, 2]]),
        ((2, 3), (6,), [[2], [3]]),
        ((4, 1, 3), (4, 3), [[4], [], [3]]),
        ((10,), (4, 2), None),
    ],
)
def test_refine(old, new, pieces):
    if math.prod(old) == math.prod(new):
        assert refine(old, new) == pieces


# (x, kernel, program): products as people write them, whatever side the kernel stands on.
PRODUCTS = {
    "dense": ((5, 6), (6, 8), lambda x, w: x @ w),
    "transposed": ((5, 6), (8, 6), lambda x, w: x @ w.T),
    "kernel first": ((6, 5), (8, 6), lambda x, w: w @ x),
    "heads": ((2, 5, 6), (6, 2, 4), lambda x, w: jnp.einsum("btd,dnh->btnh", x, w)),
    "heads in the middle": ((2, 5, 6), (2, 6, 4), lambda x, w: jnp.einsum("btd,ndh->bnth", x, w)),
    "heads contracted": ((2, 5, 3, 4), (3, 4, 6), lambda x, w: jnp.einsum("btnh,nhd->btd", x, w)),
    "heads contracted, other order": ((2, 4, 5, 3), (3, 4, 6), lambda x, w: jnp.einsum("bhtn,nhd->btd", x, w)),
    "experts": ((3, 5, 6), (3, 6, 8), lambda x, w: jnp.einsum("etd,edf->etf", x, w)),
    "experts of a shared input": ((5, 6), (3, 6, 8), lambda x, w: jnp.einsum("td,edf->tef", x, w)),
    "experts last": ((5, 3, 6), (6, 8, 3), lambda x, w: jnp.einsum("ted,dfe->fte", x, w)),
    "reshaped": ((5, 6), (6, 2, 4), lambda x, w: (x @ w.reshape(6, 8)).reshape(5, 2, 4)),
    "split": ((5, 2, 3), (6, 8), lambda x, w: jnp.einsum("tab,abn->tn", x, w.reshape(2, 3, 8))),
    "unit axis": ((5, 6), (6, 8), lambda x, w: jnp.einsum("td,zdn->ztn", x, w[None])),
    "vmap over experts": ((3, 5, 6), (3, 6, 8), jax.vmap(lambda x, w: x @ w)),
    "vmap over examples": ((3, 5, 6), (6, 8), lambda x, w: jax.vmap(lambda x: x @ w)(x)),
    "under remat and jit": ((5, 6), (6, 8), jax.checkpoint(jax.jit(lambda x, w: x @ w))),
    "cast": ((5, 6), (6, 8), lambda x, w: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)),
}


class Multiply(Recorder):
    """Computes the product from the matrices instead of the program's own way."""

    def product(self, view, product, x, usual):
        super().product(view, product, x, usual)
        matrix = product.layout.matrix(view.value.reshape(view.leaf_shape))
        self.matrix = matrix
        return product.restore(jnp.matmul(product.rows(x), matrix))


@pytest.mark.parametrize("name", [n for n in PRODUCTS if n not in ("transposed", "kernel first", "unit axis")])
def test_rows_and_matrix_say_what_the_program_computes(rng, name):
    shape_x, shape_w, program = PRODUCTS[name]
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (shape_x, shape_w))
    got = run(lambda p, x: program(x, p["w"]), {"w": w}, (x,), Multiply())
    np.testing.assert_allclose(got, program(x, w), rtol=1e-5, atol=2e-2 if name == "cast" else 1e-5)


@pytest.mark.parametrize("name", PRODUCTS)
def test_layout_is_a_bijection_with_the_right_sums(rng, name):
    shape_x, shape_w, program = PRODUCTS[name]
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (shape_x, shape_w))
    weights, left, _ = find_weights(lambda p, x: program(x, p["w"]), {"w": w}, x)
    assert not left
    layout = weights["w"]
    np.testing.assert_array_equal(layout.kernel(layout.matrix(w)), w)
    # Each output is one row of the product's k sums: scaling the matrix's rows by 0 leaves nothing.
    assert math.prod(layout.lead) * layout.k * layout.n == w.size
    assert layout.k == {"experts last": 6, "heads contracted": 12, "heads contracted, other order": 12}.get(name, 6)


def test_an_interpreted_program_is_the_program(rng):
    """Control flow, custom derivatives, random numbers and side results go through unchanged."""

    def program(w, x, key):
        def turn(carry, noise):
            y = jax.nn.relu(carry @ w["w"]) + 0.1 * noise
            return jax.lax.cond(y.sum() > 0, lambda y: y, lambda y: -y, y), jnp.abs(y).sum()

        noise = jax.random.normal(key, (3, *x.shape))
        y, sums = jax.lax.scan(turn, x, noise)
        return {"y": jax.lax.fori_loop(0, 2, lambda i, y: y + w["b"], y), "sums": sums}

    w = {"w": jnp.asarray(rng.standard_normal((6, 6)), jnp.float32), "b": jnp.ones(6)}
    x = jnp.asarray(rng.standard_normal((4, 6)), jnp.float32)
    wanted = program(w, x, jax.random.key(0))
    got = run(program, w, (x, jax.random.key(0)), Recorder())
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_without_views_a_jaxpr_evaluates_to_itself(rng):
    x = jnp.asarray(rng.standard_normal(5), jnp.float32)
    closed, _ = traced(lambda x: jnp.sin(x) * 2, x)
    np.testing.assert_array_equal(interpret(closed.jaxpr, closed.consts, [x], Recorder())[0], jnp.sin(x) * 2)
