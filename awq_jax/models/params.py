# SPDX-License-Identifier: Apache-2.0
"""Between NNX modules and nested dicts of parameters."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from awq_jax._tree import leaves

__all__ = ["dict_of", "merge"]


def _path(keys: tuple[Any, ...]) -> str:
    return "/".join(map(str, keys))


def merge(build: Callable[[], Any], params: Mapping[str, Any]) -> Any:
    """A module whose parameters are those of a nested dict; its own initialisers run only abstractly.

    Args:
      build: makes the module.
      params: nested dict, text keys; a kernel may be a `QTensor`.

    Raises:
      ValueError: names or shapes differ from the module's.
    """
    graph, state = nnx.split(nnx.eval_shape(build))
    given = dict(leaves(params))
    flat = nnx.to_flat_state(state)
    expected = {_path(keys): variable for keys, variable in flat}
    if given.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
        raise ValueError(f"parameters do not fit the model: missing {missing[:5]}, unknown {unknown[:5]}.")
    wrong = [
        f"{path} is {tuple(given[path].shape)}, not {tuple(variable.get_value().shape)}"
        for path, variable in expected.items()
        if tuple(given[path].shape) != tuple(variable.get_value().shape)
    ]
    if wrong:
        raise ValueError(f"parameters do not fit the config: {'; '.join(wrong[:5])}.")
    filled = [(keys, variable.replace(given[_path(keys)])) for keys, variable in flat]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def dict_of(module: nnx.Module) -> dict[str, Any]:
    """The parameters of a module as a nested dict with text keys."""
    tree: dict[str, Any] = {}
    for keys, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(str(key), {})
        node[str(keys[-1])] = variable.get_value()
    return tree
