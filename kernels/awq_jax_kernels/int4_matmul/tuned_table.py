# SPDX-License-Identifier: Apache-2.0
"""Block sizes that someone has tuned, one file of JSON for each device."""

import functools
import importlib.resources
import json
from typing import Any

__all__ = ["tuned_rows"]


@functools.cache
def tuned_rows(name: str) -> dict[str, dict[str, Any]]:
    """The rows of ``tuned/<name>.json``, fields of a `BlockConfig` by size; empty for a device without a file."""
    file = importlib.resources.files("awq_jax_kernels.int4_matmul") / "tuned" / f"{name}.json"
    return json.loads(file.read_text())["configs"] if file.is_file() else {}
