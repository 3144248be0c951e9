# SPDX-License-Identifier: Apache-2.0
"""Names as the README writes them, after `import awq_jax` alone."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "name", ["run.load_model", "nnx.propose", "adapt.observing", "train.learned", "serving.Engine"]
)
def test_what_the_docs_name_needs_no_other_import(name: str):
    code = f"import awq_jax; awq_jax.{name}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_not_there_is_an_attribute_error():
    import awq_jax

    with pytest.raises(AttributeError, match="'nothing'"):
        _ = awq_jax.nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_help_needs_no_package_that_is_not_required():
    code = "import inspect, sys; sys.modules['lm_eval'] = None; import awq_jax; inspect.getmembers(awq_jax)"
    subprocess.run([sys.executable, "-c", code], check=True)
