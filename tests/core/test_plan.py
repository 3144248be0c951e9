# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from awq_jax import QuantSpec, Recipe, RefineSpec, Tie, plan_layers
from awq_jax.families._table import Family, Group, Linear, Norm

L = "layers/*"
TABLE = Family(
    name="toy",
    architectures=(),
    keys=(),
    groups=(
        Group(Norm(f"{L}/norm"), (f"{L}/q", f"{L}/v"), output=f"{L}/attn"),
        Group(Linear(f"{L}/v", tie="gqa"), (f"{L}/o",)),
    ),
    no_clip=(f"{L}/q",),
)
WIDTHS = {"q": 256, "v": 256, "o": 128}


def test_paths_become_relative_and_layers_share_a_plan():
    first, second = plan_layers(TABLE, Recipe(), 2, WIDTHS, Tie(kv_heads=2, repeats=2))
    assert first == second and hash(first) == hash(second)
    assert first.taps == ("q", "o")
    qv, o = first.groups
    assert qv.group.producer == Norm("norm") and qv.group.output == "attn" and qv.tie is None
    assert qv.clip == (False, True)
    assert o.tie == Tie(kv_heads=2, repeats=2)


def test_no_tie_without_shared_heads():
    (plan,) = plan_layers(TABLE, Recipe(), 1, WIDTHS, Tie(kv_heads=4, repeats=1))
    assert plan.groups[1].tie is None


def test_overrides_first_match_wins():
    wide = QuantSpec(group_size=64)
    recipe = Recipe(overrides=(("layers/0/q", None), ("layers/*/q", wide)))
    first, second = plan_layers(TABLE, recipe, 2, WIDTHS)
    assert [path for path, _, _ in first.groups[0].quantized] == ["v"]
    assert second.groups[0].quantized[0][1] == wide


def test_refusals():
    with pytest.raises(ValueError, match=r"override 'layers/\*/mlp' matches no weight"):
        plan_layers(TABLE, Recipe(overrides=(("layers/*/mlp", None),)), 2, WIDTHS)
    with pytest.raises(ValueError, match=r"'layers/0/o/kernel': its contraction dimension 96 .* group_size=128"):
        plan_layers(TABLE, Recipe(), 2, {**WIDTHS, "o": 96})


def test_experts_are_neither_propagated_nor_refined():
    experts = dataclasses.replace(
        TABLE, groups=(*TABLE.groups[:1], dataclasses.replace(TABLE.groups[1], per_expert=True))
    )
    with pytest.raises(ValueError, match=r"has experts, .* propagate='quantized' is not implemented"):
        plan_layers(experts, Recipe(propagate="quantized"), 2, WIDTHS)
    with pytest.raises(ValueError, match=r"has experts, .* refinement is not implemented"):
        plan_layers(experts, Recipe(refine=RefineSpec()), 2, WIDTHS)
    assert plan_layers(experts, Recipe(), 2, WIDTHS)
