# SPDX-License-Identifier: Apache-2.0
"""Every test runs on eight fake CPU devices with strict dtype promotion, unless told to use a real accelerator."""

import os

os.environ.setdefault("JAX_PLATFORMS", os.environ.get("AWQ_JAX_TEST_PLATFORM", "cpu"))
# Most programs run once, for milliseconds: optimizing a CPU's machine code took half of the time of all tests. Of a
# flag that is given twice the last one counts.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 "
    + ("--xla_backend_optimization_level=0 " if os.environ["JAX_PLATFORMS"] == "cpu" else "")
    + os.environ.get("XLA_FLAGS", "")
)

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh numbers for each test, the same in every run: seeded by the test's own name."""
    return np.random.default_rng(list(request.node.nodeid.encode()))
