# SPDX-License-Identifier: Apache-2.0
"""What every family's table must keep, held against a tiny model of each variant."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from awq_jax import QuantSpec, Recipe, Tie, fold_scale, plan_layers
from awq_jax._tree import get, leaves
from awq_jax.families import FAMILIES, Norm, by_architecture
from awq_jax.models import param_shapes
from awq_jax.models.functional import block
from awq_jax_convert.fused import columns, wholes
from awq_jax_convert.keymap import home, resolve
from awq_jax_convert.shapes import expected_shape
from tests.models.families import TINY
from tests.tiny_models import logits_of, rounding, some_tokens


def plans_of(checkpoint):
    """Every layer's plan, whole columns so that any width fits."""
    c = checkpoint.config
    widths = {path.split("/", 2)[2]: checkpoint.shape(f"{path}/kernel")[-2] for path in linears(checkpoint)}
    tie = Tie(kv_heads=c.num_kv_heads, repeats=c.num_heads // c.num_kv_heads)
    return plan_layers(checkpoint.family, Recipe(quant=QuantSpec(group_size=-1)), c.num_layers, widths, tie)


def linears(checkpoint):
    return [path.removesuffix("/kernel") for path in checkpoint.paths() if re.match(r"layers/.*/kernel$", path)]


def test_every_family_has_a_tiny_model():
    assert {row.family for row in TINY} == set(FAMILIES)


def test_the_architecture_finds_its_family(oracle, checkpoint):
    (named,) = oracle.model.config.architectures
    assert by_architecture(named, oracle.model.config.to_dict()) is FAMILIES[oracle.row.family]
    assert checkpoint.family is FAMILIES[oracle.row.family]


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match=r"'MambaForCausalLM' is not supported; these are: LlamaForCausalLM, .*table"):
        by_architecture("MambaForCausalLM")


@pytest.mark.parametrize("architecture", ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"])
def test_latent_attention_is_refused_with_its_reason(architecture):
    with pytest.raises(ValueError, match=rf"'{architecture}' is not supported: .*latent vector \(MLA\).* no experts"):
        by_architecture(architecture)


def test_paths_of_the_groups_exist(checkpoint):
    for index, plan in enumerate(plans_of(checkpoint)):
        layer = checkpoint.layer(index)
        for group in (p.group for p in plan.groups):
            for sink in (*group.sinks, *group.float_sinks):
                assert get(layer, sink)["kernel"].ndim == (3 if "/experts/" in sink else 2)
            if group.producer is None:
                assert group.reason
            else:
                assert ("scale" if isinstance(group.producer, Norm) else "kernel") in get(layer, group.producer.path)
            if group.output is not None:
                assert group.output in layer


def test_every_linear_of_a_layer_is_in_exactly_one_group(checkpoint):
    grouped = [sink for group in checkpoint.family.groups for sink in (*group.sinks, *group.float_sinks)]
    for index in range(checkpoint.num_layers):
        named = [path.replace("*", str(index)) for path in grouped]
        assert sorted(named) == [path for path in linears(checkpoint) if path.startswith(f"layers/{index}/")]


def test_a_group_is_all_that_reads_one_tensor(checkpoint):
    """Linears that the forward pass hands the same array are one group, so no consumer of a producer is left out."""
    readers: dict[int, set[str]] = {}
    held = []  # keeps the arrays alive, and with them their identities

    def tap(name, x):
        held.append(x)
        readers.setdefault(id(x), set()).add(name)

    config = checkpoint.config
    h = jax.ShapeDtypeStruct((1, 3, config.hidden_size), jnp.float32)
    jax.eval_shape(lambda p, x: block(config, p, x, tap=tap), checkpoint.layer(0), h)
    (plan,) = set(plans_of(checkpoint))
    grouped = {frozenset((*p.group.sinks, *p.group.float_sinks)) for p in plan.groups}
    assert grouped == set(map(frozenset, readers.values()))
    assert set(plan.taps) <= set().union(*readers.values())


def test_random_scales_fold_without_changing_the_logits(rng, checkpoint):
    params = checkpoint.params()
    folded = {**params, "layers": dict(params["layers"])}
    for index, plan in enumerate(plans_of(checkpoint)):
        layer = folded["layers"][str(index)]
        for p in plan.groups:
            producer = p.group.producer
            if producer is None:  # nothing is ever folded there; `test_paths_of_the_groups_exist` wants the reason
                continue
            shape = get(layer, producer.path)["scale" if isinstance(producer, Norm) else "kernel"].shape
            channels = (*shape[:-2], shape[-1])  # of every expert, where they are stacked
            t = jnp.asarray(np.exp(rng.uniform(-2, 2, channels)), jnp.float32)
            layer = fold_scale(layer, p.group, t, p.tie)
            for sink in p.group.sinks:
                before = get(params, f"layers/{index}/{sink}/kernel")
                assert not np.array_equal(get(layer, sink)["kernel"], before)
        folded["layers"][str(index)] = layer
    tokens = some_tokens(checkpoint.config.vocab_size)
    before, after = (logits_of(checkpoint.config, p, tokens) for p in (params, folded))
    assert np.abs(after - before).max() <= rounding(checkpoint.config) * np.abs(before).max()


def test_names_of_the_checkpoint_map_both_ways(oracle, checkpoint):
    tensors = load_file(oracle.path / "model.safetensors")
    shapes = param_shapes(checkpoint.config)
    places = resolve(checkpoint.family, checkpoint.config, tensors)
    assert {path for place in places.values() for path in place.paths} == set(shapes)
    for name, place in places.items():
        for path in place.paths:
            found, back = home(checkpoint.family, path)
            assert found.replace("*", str(place.expert)) == name
            assert back == place._replace(expert=None)
        stored = tensors[name].T if place.transpose else tensors[name]
        parts = [shapes[path] if place.expert is None else shapes[path][1:] for path in place.paths]
        assert stored.shape == (*parts[0][:-1], sum(part[-1] for part in parts))
        if len(parts) > 1:  # every column is one part's, and each part has its own
            assert sorted(np.concatenate(columns(checkpoint.config, place))) == list(range(stored.shape[-1]))


def test_parameters_are_written_as_they_were_read(oracle, checkpoint):
    tensors = load_file(oracle.path / "model.safetensors")
    params = dict(leaves(checkpoint.params()))
    written = {whole.name: whole for whole in wholes(checkpoint.family, checkpoint.config, params)}
    assert set(written) == set(tensors)
    for name, whole in written.items():
        np.testing.assert_array_equal(whole.leaf.T if whole.transpose else whole.leaf, tensors[name])


def test_every_parameter_of_the_decoder_has_the_shape_that_the_config_implies(checkpoint):
    shapes = param_shapes(checkpoint.config)
    assert set(shapes) == set(checkpoint.paths())
    for path, shape in shapes.items():
        assert expected_shape(checkpoint.config, path) == shape == checkpoint.shape(path)
    assert {path: leaf.shape for path, leaf in leaves(checkpoint.params())} == shapes


def test_a_shape_of_no_parameter_is_an_error(checkpoint):
    for path in ("layers/0/attn/q/gain", "layers/0/attn/qkv/kernel", "embed/kernel"):
        with pytest.raises(KeyError, match="no parameter"):
            expected_shape(checkpoint.config, path)


def test_what_is_never_clipped_is_quantized_otherwise(checkpoint):
    sinks = {sink for group in checkpoint.family.groups for sink in group.sinks}
    assert set(checkpoint.family.no_clip) <= sinks
    for plan in plans_of(checkpoint):
        for p in plan.groups:
            for path, _, clip in p.quantized:
                assert clip == (f"layers/*/{path}" not in checkpoint.family.no_clip)
