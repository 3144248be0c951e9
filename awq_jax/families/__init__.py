# SPDX-License-Identifier: Apache-2.0
"""Model families, one table per file. Adding a model is adding a table to `FAMILIES`."""

from collections.abc import Mapping
from typing import Any

from awq_jax.families._refused import REFUSED
from awq_jax.families._table import Family as Family
from awq_jax.families._table import Group as Group
from awq_jax.families._table import Key as Key
from awq_jax.families._table import Linear as Linear
from awq_jax.families._table import Norm as Norm
from awq_jax.families.bloom import BLOOM
from awq_jax.families.falcon import FALCON, FALCON_NEW
from awq_jax.families.gemma import GEMMA
from awq_jax.families.gemma2 import GEMMA2
from awq_jax.families.gemma3 import GEMMA3
from awq_jax.families.gpt2 import GPT2
from awq_jax.families.gpt_neox import GPT_NEOX
from awq_jax.families.llama import LLAMA
from awq_jax.families.mistral import MISTRAL
from awq_jax.families.mixtral import MIXTRAL
from awq_jax.families.olmo2 import OLMO2
from awq_jax.families.opt import OPT
from awq_jax.families.phi3 import PHI3
from awq_jax.families.qwen2 import QWEN2
from awq_jax.families.qwen3 import QWEN3
from awq_jax.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from awq_jax.families.stablelm import STABLELM

__all__ = ["FAMILIES", "Family", "Group", "Key", "Linear", "Norm", "by_architecture"]

_TABLES = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    PHI3,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMO2,
    STABLELM,
    GPT_NEOX,
    GPT2,
    OPT,
    FALCON,
    FALCON_NEW,
    BLOOM,
)
FAMILIES: dict[str, Family] = {family.name: family for family in _TABLES}


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
    if architecture in REFUSED:
        raise ValueError(
            f"architecture {architecture!r} is not supported: {REFUSED[architecture]}. The decoder has no such "
            "mechanism, so a table can't describe it."
        )
    if not serving:
        known = ", ".join(dict.fromkeys(name for family in FAMILIES.values() for name in family.architectures))
        raise ValueError(
            f"architecture {architecture!r} is not supported; these are: {known}. If it is one of them under another "
            "name, say which family: --family llama. A decoder-only model of the same mechanisms with other names "
            "needs a table, a TOML file of about twenty lines: --family my_table.toml, or awq_jax_family.toml in the "
            "directory, where every command finds it. docs/families.md tells how to write it, and `awq-jax families` "
            "lists the tables there are."
        )
    for family in serving:
        said = {**dict(family.defaults), **(hf or {})}
        if hf is None or all(said.get(name) == value for name, value in family.when):
            return family
    choices = "; ".join(", ".join(f"{name}={value!r}" for name, value in family.when) for family in serving)
    raise ValueError(f"architecture {architecture!r} is supported where config.json has one of: {choices}.")
