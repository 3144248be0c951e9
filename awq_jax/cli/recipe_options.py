# SPDX-License-Identifier: Apache-2.0
"""From the options of `awq-jax quantize` to a recipe; what would say nothing is refused."""

import argparse
import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from awq_jax._spec import QuantSpec, Recipe

__all__ = ["activations_of", "recipe_of"]


def _override(text: str, base: "QuantSpec") -> "tuple[str, QuantSpec | None]":
    """Parse one --override."""
    glob, _, what = text.partition("=")
    if what == "float":
        return glob, None
    fields = {"bits": "bits", "group": "group_size"}
    changes: dict[str, Any] = {}
    for item in what.split(","):
        key, _, value = item.partition(":")
        if key not in fields or fields[key] in changes or not re.fullmatch("-?[0-9]{1,9}", value):
            raise ValueError(
                f"--override {text!r}: expected GLOB=float, GLOB=bits:N, GLOB=group:N or both with a comma."
            )
        changes[fields[key]] = int(value)
    return glob, dataclasses.replace(base, **changes)


def activations_of(args: argparse.Namespace) -> str:
    """What multiplies weights, and refusals of options that say nothing without it."""
    found = args.activations or ("token" if args.method == "smoothquant" else "float")
    if args.alpha is not None and args.method != "smoothquant":
        raise ValueError(f"--alpha belongs to --method smoothquant, not to {args.method}. Leave it out.")
    if args.budget is not None and found != "float":
        raise ValueError("--budget chooses widths, and what multiplies int8 activations has 8 bits. Leave it out.")
    if found != "float" and args.bits not in (None, 8):
        raise ValueError(
            f"--bits {args.bits}: int8 activations multiply symmetric weights of 8 bits alone. Leave it out, or the "
            f"activations in floating point (--method awq)."
        )
    return found


def _refuse_idle(args: argparse.Namespace) -> None:
    """Options of a search that the method does not make would say nothing."""
    given = {
        "--rules": args.rules,
        "--grid": args.grid,
        "--objective": args.objective,
        "--no-clip": args.no_clip or None,
    }
    idle = [option for option, value in given.items() if value is not None]
    if idle and "awq" not in args.method:
        raise ValueError(f"{idle[0]} belongs to --method awq and awq+gptq, not to {args.method}. Leave it out.")


def _scale_dtype(args: argparse.Namespace, fmt: str) -> str:
    """Loaders of compressed-tensors keep scales in the model's dtype: codes are rounded against that."""
    from awq_jax_convert.hf_config import read_config

    if args.scale_dtype or fmt != "compressed-tensors":
        return args.scale_dtype or "float16"
    return read_config(args.src, args.family).dtype


def _gram_limit(gigabytes: float) -> int:
    if not 0 <= gigabytes < math.inf:
        raise ValueError(
            f"--gram-limit is {gigabytes:g} GB; it must be a number from 0 up. Leave it out for the default."
        )
    return round(gigabytes * 1e9)


def recipe_of(args: argparse.Namespace, fmt: str) -> "Recipe":
    """The whole recipe, for a format."""
    from awq_jax._spec import QuantSpec, Recipe, RefineSpec, SearchSpec, SmoothSpec, rule

    _refuse_idle(args)
    inputs = activations_of(args)
    whole = QuantSpec() if inputs == "float" else QuantSpec.w8a8()
    quant = QuantSpec(
        bits=args.bits or whole.bits,
        group_size=whole.group_size if args.group_size is None else args.group_size,
        symmetric=args.symmetric or whole.symmetric,
        scale_dtype=_scale_dtype(args, fmt),
        activations=inputs,
    )
    grid = 20 if args.grid is None else args.grid
    named = "paper,duo" if args.rules is None else args.rules
    rules = tuple(rule(name.strip(), n_grid=grid) for name in named.split(","))
    clip = () if args.no_clip else SearchSpec().clip_ratios
    limit = None if args.gram_limit is None else _gram_limit(args.gram_limit)
    return Recipe(
        quant=quant,
        method=args.method,
        smooth=SmoothSpec() if args.alpha is None else SmoothSpec(alphas=(args.alpha,)),
        propagate=args.propagate,
        refine=RefineSpec(steps=args.refine) if args.refine else None,
        search=SearchSpec(rules=rules, objective=args.objective or "gram", clip_ratios=clip, gram_limit=limit),
        overrides=tuple(_override(text, quant) for text in args.override),
    )
