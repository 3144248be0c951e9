# SPDX-License-Identifier: Apache-2.0
"""Whether tunix computes what a checkpoint's config says, tried on a small random model before the checkpoint is read.

A config that is accepted is not a config that is followed: tunix 0.1.7 takes ``rope_theta`` for Llama 3 and Qwen 3 and
turns by a base of its own. So the mechanisms of the checkpoint, in a few narrow layers, run through tunix's forward and
through ours, and where they differ each suspect is changed in ours until both agree: that is the name in the message.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from awq_jax._tree import nested
from awq_jax.models import DecoderConfig, param_shapes
from awq_jax.models.functional import forward
from awq_jax.serving.tunix_families import TunixFamily

__all__ = ["prove", "small"]

_TOKENS = 24
_AGREE = 1e-4  # of the largest logit, in float32; a mechanism that is missing changes more than that
_SUSPECTS: dict[str, tuple[Any, ...]] = {
    "rope_theta": (1e6, 1e4, 5e5),
    "rope_scaling": (None,),
    "norm_eps": (1e-6, 1e-5),
    "sliding_window": (None,),
    "query_scalar": (None,),
    "attn_softcap": (None,),
    "logit_softcap": (None,),
    "local_rope_theta": (None,),
}
"""What a model may leave out, and what it then computes instead."""


def small(config: DecoderConfig) -> DecoderConfig:
    """The mechanisms of a config in a few narrow layers, with a window of 5 positions, which run in a moment."""
    layers = min(config.num_layers, 6 if config.sliding_layers else 2)  # Gemma 3 has a period of six
    heads, kv = (2, 2) if config.num_heads == config.num_kv_heads else (4, 1 if config.num_kv_heads == 1 else 2)
    width, head, scaling, scalar = 32, 16, config.rope_scaling, config.query_scalar
    named = {config.hidden_size // config.num_heads: width // heads, config.head_dim: head}
    return dataclasses.replace(
        config,
        vocab_size=61,
        hidden_size=width,
        intermediate_size=48,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head,
        rope_scaling=None if scaling is None else dataclasses.replace(scaling, original=16),
        sliding_window=None if config.sliding_window is None else 5,
        sliding_layers=config.sliding_layers[:layers],
        query_scalar=None if scalar is None else float(named.get(int(scalar), scalar)),
    )


def prove(
    name: str,
    family: TunixFamily,
    module: Any,
    config: DecoderConfig,
    theirs: Any,
    place: Callable[[Any, Mapping[str, Any]], Any],
) -> None:
    """Compare both forwards.

    Args:
      name: of the family, for messages.
      family: its table.
      module: tunix's.
      config: of the checkpoint.
      theirs: the ``ModelConfig`` that the model will be built with.
      place: ``(ModelConfig, {path: array}) -> model``.

    Raises:
      ValueError: they differ; the message says by what, and what tunix seems to do instead.
    """
    tried = small(config)
    fields = family.config(tried, module, jnp.dtype("float32"))
    if hasattr(theirs, "use_flash_attention"):
        fields["use_flash_attention"] = False  # a TPU kernel
    with _exactly():
        params = _random(tried)
        model = place(dataclasses.replace(theirs, **fields), params)
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, tried.vocab_size, (2, _TOKENS)), jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(_TOKENS), tokens.shape)
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((_TOKENS, _TOKENS), bool)), (2, _TOKENS, _TOKENS))
        got = np.asarray(nnx.jit(lambda m: m(tokens, positions, None, mask)[0])(model), np.float64)
        gap = lambda changed: _gap(got, _ours(changed, params, tokens))
        found = gap(tried)
        if found > _AGREE:
            raise ValueError(_explained(name, family, module, config, tried, found, gap))


def _exactly() -> contextlib.AbstractContextManager[Any]:
    """On the host, with products in float32."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.default_matmul_precision("highest"))
    with contextlib.suppress(RuntimeError):  # a process may be told to have no CPU backend
        stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
    return stack


def _random(config: DecoderConfig) -> dict[str, Any]:
    """Every parameter random; small embeddings, or no epsilon of a norm would show."""
    rng = np.random.default_rng(1)
    found = {}
    for path, shape in param_shapes(config).items():
        size = 0.003 if path == "embed/embedding" else shape[0] ** -0.5 if len(shape) > 1 else 0.3
        shift = 1.0 - config.norm_offset if path.endswith("scale") else 0.0
        found[path] = jnp.asarray(shift + size * rng.standard_normal(shape), jnp.float32)
    return found


def _ours(config: DecoderConfig, params: Mapping[str, Any], tokens: Any) -> Any:
    return np.asarray(jax.jit(lambda p: forward(config, p, tokens))(nested(params.items())), np.float64)


def _gap(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def _explained(
    name: str,
    family: TunixFamily,
    module: Any,
    config: DecoderConfig,
    tried: DecoderConfig,
    found: float,
    gap: Callable[[DecoderConfig], float],
) -> str:
    said = f"tunix's {family.model} does not compute what this {name!r} checkpoint's config says: on a small model its "
    said += f"logits are {found:.0e} of the largest away from ours"
    for field, values in _SUSPECTS.items():
        for value in values:
            changed = dataclasses.replace(tried, **{field: value})
            if value != getattr(tried, field) and gap(changed) <= _AGREE:
                was = getattr(config, field)
                return f"{said}, and agree with {field}={value!r} in the place of {was!r}.{_remedy(module, field, was)}"
    return f"{said}. `awq_jax.serving.load` serves it."


def _remedy(module: Any, field: str, value: Any) -> str:
    rotate = getattr(module, "apply_rope", None)
    if field == "rope_theta" and rotate is not None and field in inspect.signature(rotate).parameters:
        where = module.__name__
        return f" Bind it before: `{where}.apply_rope = functools.partial({where}.apply_rope, rope_theta={value!r})`."
    return " `awq_jax.serving.load` serves it."
