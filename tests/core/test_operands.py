# SPDX-License-Identifier: Apache-2.0
"""Wrong ranks, widths and dtypes are told by name; in a process without the tests' own type checks, as users run it."""

import re
import subprocess
import sys

import pytest

PRELUDE = """
import jax.numpy as jnp
from awq_jax import QuantSpec, Tie, fold_scale, matmul, merge, observe, quantize, search_scale
from awq_jax.families import Group, Norm
w, x, g32 = jnp.ones((64, 8)), jnp.ones((4, 64)), QuantSpec(group_size=32)
stats, q = observe(x), quantize(w, g32)
group = Group(Norm("norm"), ("up",))
tree = {"norm": {"scale": jnp.ones(64)}, "up": {"kernel": w}}
"""

# (call, what its message says)
CASES = [
    ("quantize(jnp.ones(64))", r"weight is float32\[64\].*\[\*b, k, n\].*bias"),
    ("quantize(jnp.ones((64, 8), jnp.int32))", r"weight is int32\[64, 8\].*floats"),
    ("quantize([[1.0]])", r"weight is of type list"),
    ("quantize(jnp.ones((0, 8)))", r"float32\[0, 8\].*empty"),
    ("quantize(w, g32, jnp.ones((3, 8)))", r"ratio is float32\[3, 8\]; it must be \[2, 8\]"),
    ("observe(jnp.ones(()))", r"single number"),
    ("observe(jnp.ones((4, 8), jnp.int32))", r"x is int32\[4, 8\].*[Cc]ast"),
    ("observe(x, jnp.ones((4, 64), bool))", r"mask is bool\[4, 64\]; it must be \[4\]"),
    ("observe(x, jnp.ones(4, jnp.int32))", r"mask is int32.*astype\(bool\)"),
    ("observe(x, stride=0)", r"stride is 0"),
    ("merge(stats, observe(jnp.ones((4, 32))))", r"abs_sum \(64,\) and \(32,\)"),
    ("merge(stats, observe(x, gram=False))", r"gram \(64, 64\) and None"),
    ("search_scale(stats, [])", r"at least one kernel"),
    ("search_scale(stats, w)", r"weights must be a list"),
    ("search_scale(x, [w])", r"ActStats"),
    ("search_scale(stats, [jnp.ones(64)])", r"weights\[0\] is float32\[64\]"),
    (
        "search_scale(stats, [w, jnp.ones((32, 8))], spec=g32)",
        r"weights\[1\] is float32\[32, 8\]; it must be \[64, 8\]",
    ),
    ("search_scale(stats, [w[None]], spec=g32)", r"weights\[0\] is float32\[1, 64, 8\].*vmap"),
    ("search_scale(stats, [w.astype(int)], spec=g32)", r"weights\[0\] is int32.*floats"),
    ("search_scale(stats, [w], spec=[g32, g32])", r"1 weights and 2 specs"),
    ("search_scale(stats, [w], spec=g32, tie=Tie(3, 2))", r"Tie.*64 channels"),
    ("fold_scale(tree, group, jnp.ones(32))", r"t is float32\[32\]; it must be \[64\].*'norm'"),
    ("fold_scale(tree, group, jnp.ones(()))", r"t is float32\[\]; it must be \[64\]"),
    (
        "fold_scale({**tree, 'up': {'kernel': w[:32]}}, group, jnp.ones(64))",
        r"64 channels does not fit 'up'.*\[32, 8\]",
    ),
    ("matmul(jnp.ones((4, 32)), q)", r"x is float32\[4, 32\].*64 rows"),
    ("matmul(jnp.ones((4, 32)), w)", r"x is float32\[4, 32\].*64 rows"),
    ("matmul(jnp.ones(()), q)", r"single number"),
    ("matmul(jnp.ones((4, 64), jnp.int32), q)", r"x is int32.*[Cc]ast"),
    ("matmul(x, jnp.ones(64))", r"weight is float32\[64\]"),
]


@pytest.fixture(scope="module")
def said() -> list[str]:
    calls = "\n".join(f"attempt(lambda: {call})" for call, _ in CASES)
    code = f"""{PRELUDE}
def attempt(call):
    try:
        call()
        print("NO ERROR")
    except (TypeError, ValueError) as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
    except Exception as error:
        print("RAW", type(error).__name__, error)
{calls}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("number", range(len(CASES)), ids=[call for call, _ in CASES])
def test_is_refused_by_name(said: list[str], number: int):
    assert re.search(CASES[number][1], said[number]), said[number]
    assert not said[number].startswith("RAW")
