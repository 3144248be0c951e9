# SPDX-License-Identifier: Apache-2.0
"""The verbs on any Flax NNX module: `propose`, `observe`, `quantize`; the result is a module again.

A module's parameters are its `nnx.Param` variables; everything else it holds (caches, counters, statistics, adapters of
`nnx.LoRA`) is carried along and updated as its own code does.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx

from awq_jax import adapt
from awq_jax._spec import Recipe, SearchSpec
from awq_jax._stats import ActStats
from awq_jax.adapt import Coverage, Table
from awq_jax.adapt.quantize import Without

__all__ = ["Quantized", "observe", "params_of", "propose", "quantize", "serve"]

Call = Callable[..., Any]
"""``call(model, *args) -> outputs``."""


def _call(model: Any, *args: Any, **keywords: Any) -> Any:
    return model(*args, **keywords)


_BASE = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))  # adapters of the model's own are trained, not quantized


def _parts(model: nnx.Module) -> tuple[Any, dict[Any, Any], Any]:
    """(structure, {keys: parameter}, other state)."""
    graph, params, rest = nnx.split(model, _BASE, ...)
    return graph, dict(nnx.to_flat_state(params)), rest


def _original(model: Any, call: Call) -> tuple[Any, Call]:
    """The module and the call that a `Quantized` one stands for; any other as it is."""
    if isinstance(model, Quantized):
        return model.model, model.call if call is _call else call
    return model, call


def _tree(flat: dict[Any, Any]) -> dict[str, Any]:
    """Parameters as {path: value}."""
    return {"/".join(map(str, keys)): variable.get_value() for keys, variable in flat.items()}


def _function(model: nnx.Module, call: Call) -> tuple[Callable[..., Any], dict[str, Any], Any]:
    """(pure function of (params, rest, args, keywords) that returns (outputs, rest), params, rest)."""
    model, call = _original(model, call)
    graph, flat, rest = _parts(model)

    def function(params: dict[str, Any], rest: Any, args: Any, keywords: Any) -> Any:
        filled = [(keys, variable.replace(params["/".join(map(str, keys))])) for keys, variable in flat.items()]
        # Variables belong to the trace that makes them; these may be changed by the call.
        module = nnx.merge(graph, nnx.from_flat_state(filled), jax.tree.map(lambda leaf: leaf, rest))
        outputs = call(module, *args, **keywords)
        _, _, rest = nnx.split(module, _BASE, ...)
        return outputs, rest

    return function, _tree(flat), rest


def _pure(model: nnx.Module, call: Call) -> tuple[Callable[..., Any], dict[str, Any]]:
    """(``(params, *args) -> outputs`` that starts from the model's present state each time, params)."""
    function, params, rest = _function(model, call)
    return lambda params, *args: function(params, rest, args, {})[0], params


def propose(model: nnx.Module, *args: Any, call: Call = _call) -> Table:
    """Find what shares a scale and what absorbs it, by experiment; see `awq_jax.adapt.propose`.

    Args:
      model: with dense parameters; left as it is.
      *args: a small batch for ``call``.
      call: ``call(model, *args)``, for models that are not called like this or with other arguments.
    """
    apply, params = _pure(model, call)
    return adapt.propose(apply, params, *args)


def observe(
    model: nnx.Module,
    batches: Iterable[Any],
    table: Table,
    search: SearchSpec | Recipe = SearchSpec(),  # noqa: B008 - frozen
    *,
    call: Call = _call,
    token_mask: Callable[[Any], jax.Array] | None = None,
) -> dict[str, ActStats]:
    """Statistics of what the weights read; see `awq_jax.adapt.observe`.

    Args:
      model: with dense parameters, in the mode that it serves in (`model.eval()`), for dropout would be measured too;
        left as it is.
      batches: each an argument of ``call(model, batch)``.
      table: from `propose`.
      search: the one that `quantize` will use, or its recipe.
      call: as for `propose`.
      token_mask: ``token_mask(batch)``, ``[b, t]``, True where a token counts; None counts all.
    """
    apply, params = _pure(model, call)
    return adapt.observe(apply, params, batches, table, search, token_mask=token_mask)


def quantize(
    model: nnx.Module,
    stats: dict[str, ActStats],
    table: Table,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    *,
    without_producer: Without = "identity",
    call: Call = _call,
) -> tuple["Quantized", Coverage]:
    """A quantized copy of a model, and what each weight got and why; see `awq_jax.adapt.quantize`."""
    model, call = _original(model, call)
    _, flat, _ = _parts(model)
    params, coverage = adapt.quantize(_tree(flat), stats, table, recipe, without_producer=without_producer)
    return serve(model, params, call=call), coverage


def serve(model: nnx.Module, params: dict[str, Any], *, call: Call = _call) -> "Quantized":
    """A model that runs ``call`` with other parameters, quantized ones among them.

    Args:
      model: the dense model, or ``nnx.eval_shape`` of its constructor: its parameters are not used.
      params: ``{path: value}``.
      call: what calling the result does.
    """
    model, call = _original(model, call)
    graph, flat, rest = _parts(model)
    filled = [(keys, _plain(variable, params["/".join(map(str, keys))])) for keys, variable in flat.items()]
    return Quantized(nnx.merge(graph, nnx.from_flat_state(filled), rest), call)


def params_of(model: nnx.Module) -> dict[str, Any]:
    """``{path: value}`` of a model's parameters, with the paths of the original if it is `Quantized`."""
    _, flat, _ = _parts(_original(model, _call)[0])
    return _tree(flat)


def _plain(variable: Any, value: Any) -> Any:
    """The variable with another value; how a dense kernel was to be sharded says nothing of a packed one."""
    if isinstance(value, jax.Array):
        return variable.replace(value)
    return type(variable)(value)


class Quantized(nnx.Module):
    """A module whose parameters may be quantized, called as the original was.

    It works under `nnx.jit`, `nnx.grad`, `nnx.split` and `nnx.merge` as any module does. Put it under `nnx.jit`: the
    original is traced at every call.

    Attributes:
      model: the original's structure, holding the parameters.
    """

    def __init__(self, model: nnx.Module, call: Call) -> None:
        self.model = model
        self.call = call

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """What ``call(original, *args, **keywords)`` returns, from the quantized parameters."""
        return self.run(self.call, *args, **keywords)

    def run(self, call: Call, *args: Any, **keywords: Any) -> Any:
        """``call(original, ...)`` of any other function of the original, for example one of its methods."""
        function, params, rest = _function(self.model, call)
        outputs, after = adapt.serve(function)(params, rest, args, keywords)
        old, new = jax.tree.leaves(rest), jax.tree.leaves(after)
        if len(old) != len(new) or any(a is not b for a, b in zip(old, new, strict=True)):
            nnx.update(self.model, after)
        return outputs
