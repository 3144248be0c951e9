# SPDX-License-Identifier: Apache-2.0
"""Model families, one table per file. Adding a model is adding a table to `FAMILIES`."""

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


def by_architecture(architecture: str) -> Family:
    """The family that serves an ``architectures`` entry of config.json.

    Raises:
      ValueError: none does.

    >>> by_architecture("Qwen2ForCausalLM").name
    'qwen2'
    """
    for family in FAMILIES.values():
        if architecture in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    raise ValueError(
        f"architecture {architecture!r} is not supported; these are: {known}. A decoder of the same kind needs a table "
        "in awq_jax/families (see CONTRIBUTING.md, 'Add a family')."
    )
