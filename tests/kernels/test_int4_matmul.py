# SPDX-License-Identifier: Apache-2.0
"""The contract of `int4_matmul`, and what `api` adds to every implementation."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from awq_jax_kernels.int4_matmul import int4_matmul, refusal
from tests.kernels.cases import ALIGNED, ODD, Case
from tests.kernels.contract import CODES, check, make_problem

ANYWHERE = ["xla", "reference"]


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ALIGNED + ODD, ids=str)
def test_contract(rng, case, dtype, implementation):
    product = functools.partial(int4_matmul, implementation=implementation)
    check(product, make_problem(rng, case, dtype=dtype, zeros=True))


@pytest.mark.parametrize("case", [ALIGNED[1], ODD[0]], ids=str)
def test_contract_without_a_name(rng, case):
    """The choice is staged for every platform, and the program runs on this one."""
    check(int4_matmul, make_problem(rng, case))


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("codes", CODES)
def test_extremes(rng, codes, zeros, implementation):
    product = functools.partial(int4_matmul, implementation=implementation)
    check(product, make_problem(rng, Case(6, 256, 64, 64), zeros=zeros, codes=codes, scale_dtype="float32"))


def test_any_leading_axes_of_x(rng):
    p = make_problem(rng, Case(6, 64, 32, 32), dtype="float32")
    y = int4_matmul(*p.operands)
    np.testing.assert_array_equal(int4_matmul(p.x.reshape(2, 3, 64), *p.operands[1:]), y.reshape(2, 3, 32))
    assert int4_matmul(p.x[0], *p.operands[1:]).shape == (32,)
    assert int4_matmul(p.x[:0], *p.operands[1:]).shape == (0, 32)


@pytest.mark.parametrize("zeros", [False, True])
def test_stacked_weights(rng, zeros):
    problems = [make_problem(rng, Case(4, 64, 32, 32), dtype="float32", zeros=zeros) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[p.operands for p in problems])
    for y, p in zip(int4_matmul(*stacked), problems, strict=True):
        check(lambda *_, y=y: y, p)

    def layer(_, weight):
        return None, int4_matmul(*weight)

    _, scanned = jax.lax.scan(layer, None, stacked)
    np.testing.assert_allclose(scanned, int4_matmul(*stacked), rtol=1e-5, atol=1e-5)


def test_rows_that_share_a_weight_become_one_product(rng):
    """Mapping over x must not run (or fetch) the weight once per row."""
    p = make_problem(rng, Case(8, 64, 32, 32), dtype="float32")
    mapped = jax.vmap(lambda row: int4_matmul(row, *p.operands[1:]))
    text = str(jax.make_jaxpr(mapped)(p.x))
    assert "f32[8,64]" in text and "i8[8," not in text
    np.testing.assert_array_equal(mapped(p.x), int4_matmul(*p.operands))


@pytest.mark.parametrize("case", [Case(3, 256, 64, 64), Case(2, 20, 6, 20)], ids=str)
def test_gradient_with_respect_to_x(rng, case):
    """Against float64: ``dx = dy @ w.T``."""
    p = make_problem(rng, case, dtype="float32")
    dy = rng.standard_normal((case.m, case.n)).astype(np.float32)
    _, pull = jax.vjp(lambda x: int4_matmul(x, *p.operands[1:]), p.x)
    (dx,) = pull(jnp.asarray(dy))
    bound = 6 * 2.0**-24 * np.sqrt(case.n) * np.sqrt(np.square(dy) @ np.square(15 * p.scale_rows.T)) + 1e-30
    assert np.all(np.abs(np.asarray(dx, np.float64) - dy.astype(np.float64) @ p.w64.T) <= bound)


def test_the_weight_is_frozen(rng):
    p = make_problem(rng, Case(3, 64, 32, 32), dtype="float32", scale_dtype="float32")
    loss = lambda *operands: int4_matmul(*operands).sum()
    _, packed, scale, zero = jax.grad(loss, argnums=(0, 1, 2, 3), allow_int=True)(*p.operands)
    assert packed.dtype == zero.dtype == jax.dtypes.float0
    assert not scale.any() and scale.shape == p.scale.shape


def test_gradient_never_holds_the_dense_weight():
    """No array of the backward pass is as large as the float weight, whatever the platform's compiler does later."""
    k, n, g = 4096, 4096, 128
    shapes = [((16, k), "float32"), ((k // 2, n), "int8"), ((k // g, n), "float32"), ((k // g, n), "int8")]
    x, *weight = (jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes)
    jaxpr = jax.make_jaxpr(jax.grad(lambda x, *w: int4_matmul(x, *w).sum()))(x, *weight)
    assert max(_float_sizes(jaxpr.jaxpr)) < k * n // 2


def _float_sizes(jaxpr):
    for eqn in jaxpr.eqns:
        for v in eqn.outvars:
            if jnp.issubdtype(v.aval.dtype, jnp.floating):
                yield v.aval.size
        for sub in jaxprs_in_params(eqn.params):
            yield from _float_sizes(sub)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, p, s, z: (x[:, :-2], p, s, z), "columns"),
        (lambda x, p, s, z: (x, p, s[:, :-1], z), "scale must be"),
        (lambda x, p, s, z: (x, p, jnp.concatenate([s, s[:1]]), None), "divisor"),
        (lambda x, p, s, z: (x, p, s, z[:1]), "shape of scale"),
        (lambda x, p, s, z: (x, p[None], s[None], z[None]), "leading axes"),
    ],
)
def test_shapes_that_disagree(rng, change, message):
    operands = change(*make_problem(rng, Case(4, 64, 32, 32)).operands)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(int4_matmul)(*operands)  # below the annotations, which users don't run


def test_refusals_are_listed_in_one_error(rng):
    """Three rows to a group cut bytes in two: only the definition takes that."""
    p = make_problem(rng, Case(2, 6, 4, 3), dtype="float32")
    with pytest.raises(ValueError, match=r"(?s)tpu: .*gpu: .*xla: groups of 3 rows cut a byte"):
        int4_matmul(*p.operands)
    check(functools.partial(int4_matmul, implementation="reference"), p)
    assert refusal("reference", *p.operands) is None


def test_a_config_needs_an_implementation(rng):
    operands = make_problem(rng, Case(2, 64, 32, 32)).operands
    with pytest.raises(ValueError, match="name it"):
        int4_matmul(*operands, config=object())
    with pytest.raises(ValueError, match="takes no config"):
        int4_matmul(*operands, implementation="xla", config=3)
