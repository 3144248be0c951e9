# SPDX-License-Identifier: Apache-2.0
"""A program as data, so that another process can build it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Program"]


@dataclass(frozen=True)
class Program:
    """``builder(**arguments)`` returns a function and the shapes of its arguments.

    Attributes:
      builder: "module:function".
      arguments: JSON values only.

    >>> Program("awq_jax_kernels.chips:tpu_of", {"device_kind": "TPU v4"}).build().name
    'v4'
    """

    builder: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """The function and its argument shapes."""
        module, _, name = self.builder.partition(":")
        builder: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return builder(**self.arguments)
