# SPDX-License-Identifier: Apache-2.0
import pytest

from benchmarks.memory import measure


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_depth():
    shallow, deep = measure(4), measure(16)
    grown = deep["peak_memory_bytes"] - shallow["peak_memory_bytes"]
    # Twelve more layers, in float32 twice their size on disk: holding them would take 24 of these bytes_per_layer.
    assert grown < 6 * shallow["bytes_per_layer"], (shallow, deep)
