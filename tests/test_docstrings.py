# SPDX-License-Identifier: Apache-2.0
"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awq_jax
import awq_jax_convert
import awq_jax_kernels


def with_examples():
    for package in (awq_jax, awq_jax_convert, awq_jax_kernels):
        root = pathlib.Path(package.__path__[0])
        for file in sorted(root.rglob("*.py")):
            if ">>> " in file.read_text(encoding="utf-8"):
                parts = file.relative_to(root.parent).with_suffix("").parts
                yield ".".join(parts).removesuffix(".__init__")


@pytest.mark.parametrize("module", list(with_examples()))
def test_examples(module):
    known = {"jax": jax, "jnp": jnp, "np": np}
    result = doctest.testmod(importlib.import_module(module), extraglobs=known)
    assert result.attempted
    assert not result.failed
