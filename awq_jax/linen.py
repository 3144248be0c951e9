# SPDX-License-Identifier: Apache-2.0
"""The verbs on any Flax Linen module: `propose`, `observe`, `quantize`, `serve`; variables stay a plain tree.

Where one works with ``nn.intercept_methods``, class by class, these follow the parameters through the traced program:
`nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`, `nn.scan` and what you wrote yourself are seen alike.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax

from awq_jax import adapt
from awq_jax._spec import Recipe, SearchSpec
from awq_jax._stats import ActStats
from awq_jax.adapt import Coverage, Table
from awq_jax.adapt.quantize import Without

__all__ = ["observe", "propose", "quantize", "serve"]

Variables = Mapping[str, Any]


def _apply(module: nn.Module, variables: Variables, keywords: Mapping[str, Any]) -> Callable[..., Any]:
    """``(params, *args) -> outputs``; other collections are what they are."""
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    return lambda params, *args: module.apply({"params": params, **rest}, *args, **keywords)


def _params(variables: Variables) -> Any:
    if "params" not in variables:
        raise ValueError(f"these variables hold no 'params', only {sorted(variables)}; give what module.init made.")
    return nn.meta.unbox(variables["params"])


def propose(module: nn.Module, variables: Variables, *args: Any, **keywords: Any) -> Table:
    """Find what shares a scale and what absorbs it, by experiment; see `awq_jax.adapt.propose`.

    Args:
      module: unbound.
      variables: dense, as ``module.init`` returns them.
      *args: a small batch for ``module.apply``.
      **keywords: for ``module.apply``: ``method``, ``rngs``, ``deterministic``, …
    """
    return adapt.propose(_apply(module, variables, keywords), _params(variables), *args)


def observe(
    module: nn.Module,
    variables: Variables,
    batches: Iterable[Any],
    table: Table,
    search: SearchSpec | Recipe = SearchSpec(),  # noqa: B008 - frozen
    token_mask: Callable[[Any], jax.Array] | None = None,
    **keywords: Any,
) -> dict[str, ActStats]:
    """Statistics of what the weights read; see `awq_jax.adapt.observe`.

    ``token_mask`` is not handed on to ``module.apply``: ``token_mask(batch)`` is True where a token counts.
    """
    apply = _apply(module, variables, keywords)
    return adapt.observe(apply, _params(variables), batches, table, search, token_mask=token_mask)


def quantize(
    variables: Variables,
    stats: Mapping[str, ActStats],
    table: Table,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    *,
    without_producer: Without = "identity",
) -> tuple[dict[str, Any], Coverage]:
    """Variables with quantized kernels, for `serve`, and what each weight got; see `awq_jax.adapt.quantize`."""
    params, coverage = adapt.quantize(_params(variables), stats, table, recipe, without_producer=without_producer)
    return {**variables, "params": params}, coverage


def serve(module: nn.Module) -> Callable[..., Any]:
    """``module.apply`` for variables that hold quantized kernels: ``serve(module)(variables, *args, **keywords)``.

    Put it under `jax.jit`. ``mutable`` and the other keywords mean what they do there.
    """

    def apply(variables: Variables, *args: Any, **keywords: Any) -> Any:
        function = _apply(module, variables, keywords)
        return adapt.serve(function)(_params(variables), *args)

    return apply
