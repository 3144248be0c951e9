# SPDX-License-Identifier: Apache-2.0
"""The step that quantizes a layer through libtpu's compiler, spread over eight chips that are not there."""

import pytest

from benchmarks.tpu_step import compile_step

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("mesh", ["data=2,model=4", "fsdp=2,model=2"])
def test_the_step_compiles_for_a_slice_and_each_chip_holds_a_part(mesh: str):
    whole, part = (compile_step(f"tiny:v5e:{axes}") for axes in ("data=1", mesh))
    for found in (whole, part):
        assert "error" not in found, found["error"]
        assert found["held_bytes"] < found["hbm_bytes"]
    # Weights and samples are spread; what every chip has in full is norms.
    assert part["arguments_bytes"] < 0.6 * whole["arguments_bytes"]
    assert part["flops"] == whole["flops"]
