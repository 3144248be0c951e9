# SPDX-License-Identifier: Apache-2.0
"""List the model families: what each group of weights folds its scale into, and what keeps none and why.

A family is a table; docs/families.md tells how to write one of your own, and this lists it as well.

  awq-jax families
  awq-jax families gpt2 my_table.toml --json
"""

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from awq_jax.families import Family, Group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    what = "families to list, or .toml files of your own (default: all families)"
    parser.add_argument("names", nargs="*", metavar="NAME|FILE", help=what)
    parser.add_argument("--json", action="store_true", help="print as JSON")


def _short(path: str) -> str:
    return path.removeprefix("layers/*/")


def _group(group: "Group") -> dict[str, Any]:
    """One row of a table as plain data."""
    return {
        "weights": [_short(path) for path in group.sinks],
        "float": [_short(path) for path in group.float_sinks],
        "folds_into": _short(group.producer.path) if group.producer else None,
        "per_expert": group.per_expert,
        "reason": group.reason,
    }


def _named(name: str) -> "Family":
    from awq_jax.families import FAMILIES

    if name in FAMILIES:
        return FAMILIES[name]
    from awq_jax_convert.family_file import open_table  # imports jax, which a list of names does without

    return open_table(name).family


def _plain(family: "Family") -> dict[str, Any]:
    return {
        "name": family.name,
        "architectures": list(family.architectures),
        "when": dict(family.when),
        "groups": [_group(group) for group in family.groups],
        "never_clipped": [_short(path) for path in family.no_clip],
    }


def _into(group: dict[str, Any]) -> str:
    """The last column for people."""
    if group["folds_into"] is None:
        return f"nothing: {group['reason']}"
    also = f"; scaled too, kept float: {', '.join(group['float'])}" if group["float"] else ""
    return group["folds_into"] + (", a scale for each expert" if group["per_expert"] else "") + also


def run(args: argparse.Namespace) -> int:
    """List."""
    from awq_jax.families import FAMILIES

    found = [_plain(_named(name)) for name in args.names or FAMILIES]
    if args.json:
        print(json.dumps(found))
        return 0

    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=False)
    for column in ("family", "weights that share a scale", "which folds into"):
        table.add_column(column, overflow="fold")
    for family in found:
        when = "".join(f"\n{name}={json.dumps(value)}" for name, value in family["when"].items())
        named = "\n".join((family["name"], *family["architectures"])) + when
        for row, group in enumerate(family["groups"]):
            table.add_row("" if row else named, ", ".join(group["weights"]), _into(group))
        table.add_section()
    Console(markup=False, emoji=False).print(table)  # a user's table may say [anything]
    return 0
