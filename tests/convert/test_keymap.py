# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from awq_jax.families._table import Family, Key
from awq_jax_convert.keymap import Place, resolve, theirs

FAMILY = Family(
    name="toy",
    architectures=("ToyForCausalLM",),
    groups=(),
    keys=(
        Key("model.embed.weight", "embed/embedding"),
        Key("model.layers.*.q_proj.weight", "layers/*/attn/q/kernel", transpose=True),
        Key("model.layers.*.q_proj.bias", "layers/*/attn/q/bias", optional=True),
        Key("lm_head.weight", "lm_head/kernel", transpose=True),
    ),
)
NAMES = ["model.embed.weight", "model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight", "lm_head.weight"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    num_layers: int = 2
    num_experts: int = 0
    tie_embeddings: bool = False


def test_resolves_and_inverts():
    found = resolve(FAMILY, Sizes(), [*NAMES, "model.layers.1.q_proj.bias"])
    assert found["model.layers.1.q_proj.weight"] == Place(("layers/1/attn/q/kernel",), True)
    assert found["model.layers.1.q_proj.bias"] == Place(("layers/1/attn/q/bias",), False)
    for name, place in found.items():
        assert theirs(FAMILY, place.paths[0]) == (name, place.transpose)


def test_inverse_of_an_unknown_path():
    with pytest.raises(KeyError, match=r"family 'toy' has no key for the parameter 'layers/0/attn/q/gain'"):
        theirs(FAMILY, "layers/0/attn/q/gain")


@pytest.mark.parametrize(
    "name", ["model.layers.2.q_proj.weight", "model.layers.01.q_proj.weight", "model.layers.-1.q_proj.weight", "x", ""]
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=r"1 checkpoint tensors match no key of family 'toy' with 2 layers"):
        resolve(FAMILY, Sizes(), [*NAMES, name])


def test_five_unknown_names_and_the_count():
    with pytest.raises(ValueError, match=r"9 checkpoint tensors .*'x0', 'x1', 'x2', 'x3', 'x4' and 4 more"):
        resolve(FAMILY, Sizes(), [*NAMES, *(f"x{i}" for i in range(9))])


def test_missing_names_are_refused():
    with pytest.raises(ValueError, match=r"2 tensors that family 'toy' needs are missing: 'lm_head.weight', 'mod"):
        resolve(FAMILY, Sizes(), [*NAMES[1:3], "model.layers.0.q_proj.bias"])


def test_a_tied_head_may_be_absent_or_present():
    tied = Sizes(tie_embeddings=True)
    assert "lm_head.weight" in resolve(FAMILY, tied, NAMES)
    assert "lm_head.weight" not in resolve(FAMILY, tied, NAMES[:-1])


def test_an_absurd_number_of_layers_is_refused_before_expanding():
    with pytest.raises(ValueError, match=r"claims 1000000000 layers, the checkpoint has 4 tensors"):
        resolve(FAMILY, Sizes(num_layers=10**9), NAMES)


def test_two_names_for_one_path():
    twice = dataclasses.replace(FAMILY, keys=(*FAMILY.keys, Key("embed.weight", "embed/embedding", optional=True)))
    with pytest.raises(ValueError, match=r"'model.embed.weight' and 'embed.weight' are both 'embed/embedding'"):
        resolve(twice, Sizes(), [*NAMES, "embed.weight"])
