# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel in interpret mode: unwritten memory is NaN, races are looked for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from awq_jax_kernels.chips import TPUS
from awq_jax_kernels.int4_matmul import int4_matmul, pallas_tpu
from awq_jax_kernels.int4_matmul.config import BlockConfig, derive, tuned_key
from awq_jax_kernels.int4_matmul.unpack import split
from tests.kernels.cases import ALIGNED, LLAMA, ODD, Case
from tests.kernels.contract import CODES, check, make_problem

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
SMALL = BlockConfig(bn=128, tile=128, chunk=128, buffers=2, interpret=INTERPRET)


def run(config, **fields):
    return functools.partial(int4_matmul, implementation="tpu", config=dataclasses.replace(config, **fields))


def errors_of(variant):
    """What the contract's error model needs to know of a variant."""
    return {"largest_operand": 143 if variant == "A" else 15, "rounds_around_8": variant == "G"}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


QUICK = {
    Case(16, 512, 256, 128): "AEG",
    Case(7, 256, 256, 64): "BF",
    Case(8, 256, 128, 32): "D",
    Case(5, 384, 384, 384): "A",
}
ALL = [(case, v) for case in ALIGNED for v in "ABDEFG" if v != "A" or case.g % 128 == 0]


@pytest.mark.parametrize(
    "case, variant", [pair if pair[1] in QUICK.get(pair[0], "") else slow(*pair) for pair in ALL], ids=str
)
def test_contract(rng, case, variant):
    check(run(SMALL, variant=variant), make_problem(rng, case), **errors_of(variant))


@pytest.mark.parametrize("variant, dtype", [("B", "float32"), slow("A", "float16"), slow("A", "float32")])
def test_wider_activations_stay_exact(rng, variant, dtype):
    """In float32 neither the weight nor the zero points' share may round to bfloat16."""
    problem = make_problem(rng, Case(5, 512, 128, 128), dtype=dtype, scale_dtype="float32")
    check(run(SMALL, variant=variant), problem, **errors_of(variant), weight_unit=2.0**-24)


@pytest.mark.parametrize("variant", ["A", slow("B"), slow("E"), slow("G")])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("codes", CODES)
def test_extremes(rng, codes, zeros, variant):
    problem = make_problem(rng, Case(6, 256, 128, 128), zeros=zeros, codes=codes)
    check(run(SMALL, variant=variant), problem, **errors_of(variant))


@pytest.mark.parametrize("variant", [slow("A"), "E"])
def test_rows_and_columns_in_blocks(rng, variant):
    """A ring that turns more than once, shares of the columns, both halves of a megacore, a last block of two rows."""
    config = dataclasses.replace(SMALL, variant=variant, bm=16, buffers=3, splits=2, cores=2)
    check(run(config), make_problem(rng, Case(34, 256, 1024, 128)), **errors_of(variant))


@pytest.mark.parametrize(
    "fields",
    [{}, {"by_tile": True, "buffers": 3}, {"by_tile": True, "bn": 1024, "buffers": 1}, {"splits": 2, "buffers": 3}],
    ids=["first", "every", "only", "in a grid"],
)
def test_blocks_in_tiles(rng, fields):
    """The first block, every block, a single one; and the same where x and y do not stay in VMEM."""
    config = dataclasses.replace(SMALL, variant="E", bn=256, tile=128)
    check(run(config, **fields), make_problem(rng, Case(4, 256, 1024, 128)))


def test_stacked_weights_become_one_kernel(rng):
    problems = [make_problem(rng, Case(4, 256, 128, 128)) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[p.operands for p in problems])
    product = run(SMALL)
    for y, p in zip(product(*stacked), problems, strict=True):
        check(lambda *_, y=y: y, p)
    assert str(jax.make_jaxpr(product)(*stacked)).count("pallas_call") == 1


@pytest.mark.parametrize("spec", [P(None, "n"), P("n", None)], ids=["columns", "rows, psum"])
@pytest.mark.parametrize("implementation", ["tpu", "xla"])
def test_shard_map(rng, implementation, spec):
    """Columns shard anywhere, rows at group boundaries with a sum over the mesh."""
    problem = make_problem(rng, Case(3, 512, 512, 128), dtype="float32")
    mesh = Mesh(np.array(jax.devices()[:4]), "n")
    config = dataclasses.replace(SMALL, interpret=True) if implementation == "tpu" else None
    over_rows = spec == P("n", None)

    def local(x, *weight):
        y = int4_matmul(x, *weight, implementation=implementation, config=config)
        return jax.lax.psum(y, "n") if over_rows else y

    x_spec = P(None, "n") if over_rows else P()
    out = P() if over_rows else spec
    # The interpreter's callbacks know nothing of mesh axes.
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(x_spec, spec, spec, spec), out_specs=out, check_vma=implementation != "tpu"
    )
    check(jax.jit(sharded), problem)


@pytest.mark.parametrize("spec", [P(None, "n"), P("n", None)], ids=["columns", "rows, psum"])
def test_shard_map_lowered_for_tpus(rng, spec):
    """With the check of varying mesh axes on, which the interpreter does not pass."""
    over_rows = spec == P("n", None)
    problem = make_problem(rng, Case(3, 1024, 512, 128))
    mesh = Mesh(np.array(jax.devices()[:4]), "n")

    def local(x, *weight):
        y = int4_matmul(x, *weight)
        return jax.lax.psum(y, "n") if over_rows else y

    in_specs = (P(None, "n") if over_rows else P(), spec, spec, spec)
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=P() if over_rows else spec))
    assert "tpu_custom_call" in sharded.trace(*problem.operands).lower(lowering_platforms=("tpu",)).as_text()


def test_lowering_for_a_tpu_on_a_cpu_takes_the_kernel(rng):
    problem = make_problem(rng, Case(3, 256, 128, 128))
    lowered = lambda platform: jax.jit(int4_matmul).trace(*problem.operands).lower(lowering_platforms=(platform,))
    assert "tpu_custom_call" in lowered("tpu").as_text()
    assert "tpu_custom_call" not in lowered("cpu").as_text()


@pytest.mark.parametrize("case", ODD, ids=str)
def test_refuses_odd_shapes(rng, case):
    assert pallas_tpu.supports(*make_problem(rng, case).operands)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bn": 384}, "must divide n=512"),
        ({"tile": 256}, "tile=256"),
        ({"splits": 8}, "8 shares"),
        ({"variant": "E", "chunk": 384}, "chunk=384"),
    ],
)
def test_configs_that_do_not_fit(rng, fields, message):
    problem = make_problem(rng, Case(2, 512, 512, 128))
    with pytest.raises(ValueError, match=message):
        run(SMALL, **fields)(*problem.operands)


@pytest.mark.parametrize("generation", [None, *TPUS])
@pytest.mark.parametrize("m", [1, 16, 100, 512, 4096])
@pytest.mark.parametrize("g", [32, 128])
def test_derived_configs_fit(generation, m, g):
    for k, n in (*LLAMA, (128, 128), (1024, 384), (28672, 8192)):
        for exact in (False, True):
            config = derive(m, k, n, g, tpu=TPUS.get(generation), exact=exact)
            if config.variant == "A" and g < 128:
                config = dataclasses.replace(config, variant="B")
            of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
            x = of((m, k), "float32" if exact else "bfloat16")
            operands = of((k // 2, n), "int8"), of((k // g, n), "bfloat16"), of((k // g, n), "int8")
            assert pallas_tpu.supports(x, *operands, config=config) is None, (k, n, config)


def test_tuned_rows_cover_every_m_up_to_their_own():
    assert tuned_key(1, 2, 3, 4, True) == tuned_key(16, 2, 3, 4, True) != tuned_key(17, 2, 3, 4, True)


def test_split_is_exact(rng):
    value = jnp.asarray(rng.standard_normal(1000), jnp.float32)
    terms = split(value, 3)
    np.testing.assert_array_equal(sum(np.asarray(t, np.float64) for t in terms), np.asarray(value, np.float64))
    for term in terms:
        np.testing.assert_array_equal(term, term.astype(jnp.bfloat16).astype(jnp.float32))
