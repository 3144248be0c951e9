# SPDX-License-Identifier: Apache-2.0
"""config.json: what we take from it, and what we never pass on."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from awq_jax._files import read_json
from awq_jax.families import Family, by_architecture
from awq_jax.models import DecoderConfig, config_from_hf
from awq_jax_convert.family_file import Table, open_table, table_beside
from awq_jax_convert.pickles import refuse_pickle

__all__ = ["CONFIG", "FamilyChoice", "HFConfig", "public_config", "read_config"]

FamilyChoice = Family | str | os.PathLike[str] | None
"""A table, the name of one or its TOML file; None is the one beside config.json, or that of the architecture."""

CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class HFConfig:
    """A config.json, understood.

    Attributes:
      raw: as it is, without what `public_config` drops and without ``quantization_config``.
      quantization: its ``quantization_config``, or what an older file beside it says; None for a dense checkpoint.
      family: the table that maps the checkpoint's names.
      decoder: the config of our decoder.
      table: the text of the user's table, if the family is none of ours.
    """

    raw: dict[str, Any]
    quantization: Any
    family: Family
    decoder: DecoderConfig
    table: str | None = None

    @property
    def dtype(self) -> str:
        """What loaders load parameters as, by name; float32 where config.json does not say it."""
        found = self.raw.get("dtype") or self.raw.get("torch_dtype")
        return found.removeprefix("torch.") if isinstance(found, str) else "float32"

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end a text, from ``eos_token_id``.

        Raises:
          ValueError: it holds something else.
        """
        found = self.raw.get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if any(type(token) is not int or abs(token) >= 2**31 for token in ids):
            raise ValueError(f"config: eos_token_id is {found!r}; it must be a token id, a list of them, or null.")
        return tuple(ids)


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what could make a loader run code: ``auto_map`` and private attributes.

    >>> public_config({"vocab_size": 8, "auto_map": {}, "_attn_implementation_internal": "someone/code"})
    {'vocab_size': 8}
    """
    return {key: value for key, value in config.items() if key != "auto_map" and not key.startswith("_")}


def _beside(directory: Path) -> dict[str, Any] | None:
    """What files beside config.json say of a quantization: AutoAWQ's of 2023, and ModelOpt's, which says more there."""
    for method, name in (("awq", "quant_config.json"), ("modelopt", "hf_quant_config.json")):
        if (directory / name).is_file():
            return {"quant_method": method, **read_json(directory, name)}
    return None


def read_config(directory: Path, family: FamilyChoice = None) -> HFConfig:
    """Read and understand ``config.json``.

    Args:
      directory: of the checkpoint.
      family: instead of the one that serves the architecture.

    Raises:
      FileNotFoundError: no such directory or file.
      ValueError: not JSON, an unknown architecture, a table that is not understood or is for another architecture, or
        an attribute that is not understood.
    """
    refuse_pickle(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; download the checkpoint and give its local path.")
    raw = public_config(read_json(directory, CONFIG))
    quantization = raw.pop("quantization_config", None)
    if not quantization or (isinstance(quantization, dict) and quantization.get("quant_method") == "modelopt"):
        quantization = _beside(directory) or quantization
    table = _table(directory, raw, family)
    return HFConfig(raw, quantization, table.family, config_from_hf(table.family, raw), table.text)


def _table(directory: Path, raw: dict[str, Any], given: FamilyChoice) -> Table:
    named = raw.get("architectures")
    table = table_beside(directory) if given is None else open_table(given)
    if table is None:
        if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
            raise ValueError(
                f"{directory / CONFIG} must name one architecture; 'architectures' is {named!r}. If you know what "
                "model it is, name its family (--family)."
            )
        return Table(by_architecture(named[0], raw), None)
    wanted = table.family.architectures
    if table.text is not None and wanted and (not isinstance(named, list) or not set(map(str, named)) & set(wanted)):
        raise ValueError(
            f"family {table.family.name!r} is for {', '.join(wanted)}; {directory / CONFIG} names {named!r}. Leave "
            "`architectures` out of the table if it fits all the same."
        )
    return table
