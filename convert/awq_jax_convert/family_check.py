# SPDX-License-Identifier: Apache-2.0
"""Whether a user's table is true of the model: what our own tables are tested for, tried on one small random layer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax._fold import fold_scale
from awq_jax._plan import GroupPlan, LayerPlan
from awq_jax._tie import Tie
from awq_jax._tree import get, nested
from awq_jax.families import Norm
from awq_jax.models import DecoderConfig, param_shapes
from awq_jax.models.functional import block

__all__ = ["refuse_false_groups"]

_TOLERANCE = 1e-3  # float32 rounds a layer like this by 1e-6; a wrong group changes it by tenths


def _small(config: DecoderConfig) -> DecoderConfig:
    """One layer of the same mechanisms, small enough to compute at once."""
    kv, repeats = min(config.num_kv_heads, 2), min(config.num_heads // config.num_kv_heads, 2)
    experts = min(config.num_experts, 4)
    return dataclasses.replace(
        config,
        vocab_size=8,
        hidden_size=48,
        intermediate_size=40,
        num_layers=1,
        num_heads=kv * repeats,
        num_kv_heads=kv,
        num_experts=experts,
        experts_per_token=min(config.experts_per_token, experts),
        expert_size=min(config.expert_size, 24),
        shared_expert_size=min(config.shared_expert_size, 32),
    )


def _layer(config: DecoderConfig) -> dict[str, Any]:
    """Random parameters: gains around one, so that a scale that is not folded shows."""
    rng, prefix = np.random.default_rng(0), "layers/0/"

    def leaf(path: str, shape: tuple[int, ...]) -> Any:
        size = shape[-2] ** -0.5 if len(shape) > 1 else 0.3
        return jnp.asarray(rng.normal(float(path.endswith("/scale")), size, shape), jnp.float32)

    inside = ((path, shape) for path, shape in param_shapes(config).items() if path.startswith(prefix))
    return nested((path.removeprefix(prefix), leaf(path, shape)) for path, shape in inside)


def _readers(config: DecoderConfig, layer: Mapping[str, Any], h: Any) -> list[frozenset[str]]:
    """Linears of a layer by the array that they read."""
    found: dict[int, set[str]] = {}
    held = []  # keeps the arrays alive, and with them their identities

    def tap(name: str, x: Any) -> None:
        held.append(x)
        found.setdefault(id(x), set()).add(name)

    jax.eval_shape(lambda p, x: block(config, p, x, tap=tap), layer, h)
    return [frozenset(names) for names in found.values()]


def _widths(layer: Mapping[str, Any], plan: GroupPlan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels that the producer has, and those that the first sink reads."""
    producer = plan.group.producer
    assert producer is not None
    made = get(layer, producer.path)["scale" if isinstance(producer, Norm) else "kernel"].shape
    read = get(layer, plan.group.sinks[0])["kernel"].shape
    return (*made[:-2], made[-1]), (*read[:-2], read[-2]) if plan.group.per_expert else read[-2:-1]


def _refuse_fold(
    name: str, config: DecoderConfig, layer: Mapping[str, Any], plan: GroupPlan, run: Callable[[Any], Any]
) -> None:
    group, rng = plan.group, np.random.default_rng(1)
    if group.producer is None:
        return
    tie = plan.tie and Tie(config.num_kv_heads, config.num_heads // config.num_kv_heads)
    sinks = ", ".join((*group.sinks, *group.float_sinks))
    try:
        channels, read = _widths(layer, plan)
        t = jnp.asarray(np.exp(rng.uniform(-1, 1, channels)), jnp.float32)
        fits = (tie.spread(t).shape if tie else channels) == read
        folded = fold_scale(layer, group, t, tie) if fits else layer
    except KeyError as error:
        raise ValueError(f"family {name!r}, group of {sinks}: {error.args[0]}") from None
    if not fits:
        raise ValueError(
            f"family {name!r}: {group.producer.path} makes other channels than {group.sinks[0]} reads. With shared kv "
            'heads v and o need tie = "gqa".'
        )
    before, after = np.asarray(run(layer)), np.asarray(run(folded))
    if not np.abs(after - before).max() <= _TOLERANCE * np.abs(before).max():
        raise ValueError(
            f"family {name!r}: a scale that goes from {group.producer.path} into {sinks} changes what a layer "
            "computes. It does not make their input, or a norm's offset is missing, or something else reads it too."
        )


def refuse_false_groups(name: str, config: DecoderConfig, plan: LayerPlan) -> None:
    """Refuse a table whose groups are not those of the model.

    Args:
      name: of the family, for errors.
      config: of the layer, `DecoderConfig.of_layer`.
      plan: what the table gives for it, paths relative to the layer.

    Raises:
      ValueError: linears that read one tensor are not one group, or folding random scales changes the layer's output.
    """
    small = _small(config)
    layer = _layer(small)
    h = jnp.asarray(np.random.default_rng(2).normal(size=(1, 6, small.hidden_size)), jnp.float32)
    grouped = [frozenset((*p.group.sinks, *p.group.float_sinks)) for p in plan.groups]
    true = _readers(small, layer, h)
    for odd in sorted(map(sorted, set(true) - set(grouped))):
        raise ValueError(f"family {name!r}: {', '.join(odd)} read one tensor, and are not one group of the table.")
    for odd in sorted(map(sorted, set(grouped) - set(true))):
        raise ValueError(f"family {name!r}: {', '.join(odd)} are a group of the table, and do not read one tensor.")
    if len(grouped) != len(set(grouped)):
        raise ValueError(f"family {name!r} has a group twice.")
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda params: block(small, params, h))
        for each in plan.groups:
            _refuse_fold(name, small, layer, each, run)
