# SPDX-License-Identifier: Apache-2.0
"""One token's attention: the definition against numpy in float64, the kernel in interpret mode against both."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from awq_jax_kernels.decode_attention import cudnn, decode_attention
from awq_jax_kernels.decode_attention.form import Form
from awq_jax_kernels.decode_attention.pallas_tpu import blocks, plan_of, refusal

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)


@dataclasses.dataclass(frozen=True)
class Case:
    heads: int
    kv: int
    positions: int
    lengths: tuple[int, ...]
    dtype: str = "bfloat16"
    window: int | None = None
    softcap: float | None = None
    turned: bool = True


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


CASES = [
    Case(4, 2, 128, (0, 127, 128), "int8"),  # empty, full, past the end
    slow(Case(8, 4, 128, (0, 127, 128))),
    slow(Case(4, 2, 128, (5, 70), "int8", window=64)),
    slow(Case(8, 8, 256, (255, 17, 100, 128, 200), "int8")),
    slow(Case(4, 1, 512, (300, 511), window=40, softcap=20.0)),
    slow(Case(7, 1, 256, (31, 32, 33), turned=False)),
    slow(Case(6, 2, 640, (639, 1), "int8", softcap=5.0)),
]
D = 128


def problem(rng, case):
    """Operands whose bfloat16 values numpy knows exactly."""
    b, rows = len(case.lengths), case.positions * case.kv
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    held = [draw(b, rows, D) for _ in "kv"]
    scales = [None, None]
    if case.dtype == "int8":
        held = [jnp.asarray(rng.integers(-127, 128, size=(b, rows, D)), jnp.int8) for _ in "kv"]
        scales = [jnp.asarray(rng.uniform(0.5, 3, size=(b, 1, rows)) / 127, jnp.float32) for _ in "kv"]
    angle = rng.uniform(0, 6, size=(b, D // 2))
    cosine, sine = np.cos(angle), np.sin(angle)
    turns = [jnp.asarray(np.concatenate(x, axis=1), jnp.float32) for x in ((cosine, cosine), (-sine, sine))]
    qkv = draw(b, (case.heads + 2 * case.kv) * D)
    return qkv, (*held, *scales), jnp.array(case.lengths, jnp.int32), tuple(turns) if case.turned else None


def oracle(case, qkv, cache, lengths, turns):
    """Sequence by sequence and head by head, in float64; with the keys and values that are seen."""
    wide = lambda x: np.asarray(jnp.asarray(x, jnp.float32), np.float64)
    out = []
    for i, length in enumerate(case.lengths):
        heads = wide(qkv)[i].reshape(-1, D)
        q, k, v = np.split(heads, [case.heads, case.heads + case.kv])
        if turns is not None:
            turn = lambda x, i=i: x * wide(turns[0])[i] + np.roll(x, D // 2, axis=-1) * wide(turns[1])[i]
            q, k = turn(q), turn(k)
        held = []
        for which, new in ((0, k), (1, v)):
            rows = wide(cache[which])[i]
            if cache[2] is not None:
                rows = rows * wide(cache[2 + which])[i, 0][:, None]
            rows = rows.reshape(case.positions, case.kv, D).copy()
            if length < case.positions:
                rows[length] = new
            held.append(rows[max(0, length + 1 - (case.window or length + 1)) : length + 1])
        for head in range(case.heads):
            keys, values = (x[:, head * case.kv // case.heads] for x in held)
            scores = keys @ q[head] * D**-0.5
            if case.softcap:
                scores = case.softcap * np.tanh(scores / case.softcap)
            weights = np.exp(scores - scores.max())
            out.append(weights @ values / weights.sum())
    return np.stack(out).reshape(len(case.lengths), -1)


def run(case, operands, **options):
    step = functools.partial(decode_attention, heads=case.heads, scale=D**-0.5, window=case.window, **options)
    return jax.jit(functools.partial(step, softcap=case.softcap))(*operands)


def spread(got, wanted):
    """Error in units of the result's spread."""
    return np.abs(np.asarray(got, np.float64) - wanted).max() / wanted.std()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_and_definition(rng, case):
    operands = problem(rng, case)
    wanted = oracle(case, *operands)
    y, cache = run(case, operands, implementation="reference")
    same, held = run(case, operands, implementation="tpu", interpret=INTERPRET)
    # Queries, keys and weights are rounded to 8 bits each, a new int8 key to 1 in 254 of its largest channel, 3 to 4
    # times the rest: scores of size 1 move by 2**-8 of themselves, and so does a result.
    bound = 2.0**-4 if case.dtype == "int8" else 2.0**-5
    assert spread(y, wanted) < bound and spread(same, wanted) < bound
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(held), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize("case", [CASES[0], Case(8, 4, 128, (0, 127, 128))], ids=str)
def test_one_position_changes_in_the_cache(rng, case):
    operands = problem(rng, case)
    _, cache = run(case, operands, implementation="reference")
    for before, after in zip(operands[1], cache, strict=True):
        if before is None:
            continue
        along = 1 if before.ndim == 3 and before.shape[1] > 1 else 2
        changed = (np.asarray(before) != np.asarray(after)).any(axis=tuple({1, 2} - {along}))
        for row, length in enumerate(case.lengths):
            places = np.flatnonzero(changed[row]) // case.kv
            assert set(places) <= {length} and (length >= case.positions) == (places.size == 0)


def test_what_is_read_follows_lengths_and_window():
    form = Form(3, 8, 8, D, 512, 512, "bfloat16", 1.0, 200, None)
    row, block, count, lengths = blocks(form, plan_of(form), jnp.array([0, 511, 130]))
    read = list(zip(np.asarray(row)[: count[0]].tolist(), np.asarray(block)[: count[0]].tolist(), strict=True))
    assert read == [(0, 0), (1, 2), (1, 3), (2, 0), (2, 1)]  # blocks of 128 positions
    assert set(np.asarray(row)[count[0] :].tolist()) == {3} and lengths[3] == 0


def test_refusals():
    form = Form(1, 8, 4, D, 128, 128, "bfloat16", 1.0, None, None)
    assert refusal(form, jnp.dtype("bfloat16")) is None
    reasons = {"float32": dict(dtype="float32"), "64 channels": dict(d=64), "power of two": dict(kv=3)}
    for reason, changed in {**reasons, "no multiple of 128 rows": dict(positions=40)}.items():
        found = refusal(dataclasses.replace(form, **changed), jnp.dtype("bfloat16"))
        assert found is not None and reason in found
    qkv = jnp.zeros((1, 6 * 64), jnp.bfloat16)
    half = jnp.zeros((1, 128, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="64 channels"):
        decode_attention(qkv, (half, half, None, None), jnp.array([0]), heads=4, scale=1.0, implementation="tpu")


def test_cudnn_says_what_it_is_not_asked_for(monkeypatch):
    form, dtype = Form(4, 8, 4, D, 128, 128, "bfloat16", 1.0, None, None), jnp.dtype("bfloat16")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert cudnn.refusal(form, dtype) is None
    reasons = {"too few": dict(batch=3), "int8": dict(dtype="int8"), "36 channels": dict(d=36)}
    for reason, changed in {**reasons, "windows": dict(window=9)}.items():
        assert reason in (cudnn.refusal(dataclasses.replace(form, **changed), dtype) or "")
    found: list[str | None] = []
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    noting = lambda x: (found.append(cudnn.refusal(form, dtype)), x)[1]
    jax.shard_map(noting, mesh=mesh, in_specs=jax.P("tp"), out_specs=jax.P("tp"))(jnp.zeros(2))
    assert found and "shard_map" in str(found[0])
    monkeypatch.undo()
    if jax.default_backend() != "gpu":
        operands = problem(np.random.default_rng(0), Case(4, 2, 128, (1, 2, 3, 4)))
        with pytest.raises(ValueError, match="this process has no GPU"):
            run(Case(4, 2, 128, (1, 2, 3, 4)), operands, implementation="cudnn")


GPU_CASES = [
    *[("cudnn", Case(8, 2, 256, (0, 255, 256, 17), turned=turned)) for turned in (True, False)],
    *[("gpu", Case(8, 2, 256, (0, 255, 256, 17), turned=turned)) for turned in (True, False)],
    ("gpu", Case(32, 8, 1024, (700,))),
    ("gpu", Case(8, 8, 64, (63, 1, 30))),
    ("gpu", Case(16, 2, 2048, (2047, 100), window=300)),
    ("gpu", Case(7, 1, 8, (0, 8, 3), window=2)),
    ("gpu", Case(8, 4, 384, tuple(range(0, 384, 12)))),
]


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU; AWQ_JAX_TEST_PLATFORM=cuda uses one")
@pytest.mark.parametrize("implementation, case", GPU_CASES, ids=str)
def test_on_a_gpu(rng, implementation, case):
    operands = problem(rng, case)
    y, cache = run(case, operands, implementation=implementation)
    _, held = run(case, operands, implementation="reference")
    assert spread(y, oracle(case, *operands)) < 2.0**-5
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(held), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def test_shapes_that_disagree_are_named():
    k = jnp.zeros((1, 128, D), jnp.bfloat16)
    qkv = jnp.zeros((1, 6 * D), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"\(heads \+ 2 kv\) d"):
        decode_attention(qkv[:, :-1], (k, k, None, None), jnp.array([0]), heads=4, scale=1.0)
    with pytest.raises(ValueError, match="scales belong to an int8 cache"):
        codes = k.astype(jnp.int8)
        decode_attention(qkv, (codes, codes, None, None), jnp.array([0]), heads=4, scale=1.0)
