# SPDX-License-Identifier: Apache-2.0
"""Model families, one table per file. Adding a model is adding a table to `FAMILIES`."""

from collections.abc import Mapping
from typing import Any

from awq_jax.families._table import Family as Family
from awq_jax.families._table import Group as Group
from awq_jax.families._table import Key as Key
from awq_jax.families._table import Linear as Linear
from awq_jax.families._table import Norm as Norm
from awq_jax.families.llama import LLAMA
from awq_jax.families.mistral import MISTRAL
from awq_jax.families.qwen2 import QWEN2
from awq_jax.families.qwen3 import QWEN3

__all__ = ["FAMILIES", "Family", "Group", "Key", "Linear", "Norm", "by_architecture"]

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def by_architecture(architecture: str, hf: Mapping[str, Any] | None = None) -> Family:
    """The family that serves an ``architectures`` entry of config.json.

    Args:
      architecture: the entry.
      hf: the whole config.json, which tells between tables of one architecture; None takes the first.

    Raises:
      ValueError: none does.

    >>> by_architecture("Qwen2ForCausalLM").name
    'qwen2'
    """
    serving = [family for family in FAMILIES.values() if architecture in family.architectures]
    if not serving:
        known = ", ".join(dict.fromkeys(name for family in FAMILIES.values() for name in family.architectures))
        raise ValueError(
            f"architecture {architecture!r} is not supported; these are: {known}. A decoder of the same kind needs a "
            "table in awq_jax/families (see CONTRIBUTING.md, 'Add a family')."
        )
    for family in serving:
        said = {**dict(family.defaults), **(hf or {})}
        if hf is None or all(said.get(name) == value for name, value in family.when):
            return family
    choices = "; ".join(", ".join(f"{name}={value!r}" for name, value in family.when) for family in serving)
    raise ValueError(f"architecture {architecture!r} is supported where config.json has one of: {choices}.")
