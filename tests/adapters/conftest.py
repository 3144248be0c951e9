# SPDX-License-Identifier: Apache-2.0
import jax
import pytest


@pytest.fixture
def their_promotion():
    """Other people's models count on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield
