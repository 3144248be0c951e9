# SPDX-License-Identifier: Apache-2.0
import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def optax_promotion():
    """optax counts on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield
