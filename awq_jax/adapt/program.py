# SPDX-License-Identifier: Apache-2.0
"""A user's function of parameters, traced and run with an `Act`."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.adapt.columns import whole
from awq_jax.adapt.interpret import Act, interpret, traced
from awq_jax.adapt.kernel import as_kernel, is_kernel
from awq_jax.adapt.views import View

__all__ = ["Apply", "bind_stars", "fill_stars", "flatten", "hold_static", "run", "star", "unflatten"]

Apply = Callable[..., Any]
"""``apply(params, *args) -> outputs``; pure. Params are a tree of arrays, args hold arrays and static values."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """Of a tree, with the paths of its leaves in order: a dict that has been through `jax.jit` has lost that."""

    tree: Any
    paths: tuple[str, ...]


def flatten(params: Any) -> tuple[dict[str, Any], Structure]:
    """({path: leaf}, structure); a quantized kernel is a leaf.

    Raises:
      ValueError: two leaves have one path, or a leaf is no array.
    """
    pairs, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_kernel)
    named = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in pairs}
    if len(named) != len(pairs):
        raise ValueError("two leaves of these parameters have the same path; name them apart.")
    for path, leaf in named.items():
        if isinstance(leaf, str) or callable(leaf):
            raise ValueError(
                f"the parameter {path!r} is a {type(leaf).__name__}, and parameters are arrays; close over it in the "
                "function, or take it out of the tree as equinox.partition does."
            )
    return named, Structure(tree, tuple(named))


def unflatten(structure: Structure, leaves: Mapping[str, Any]) -> Any:
    """Inverse of `flatten`."""
    return jax.tree.unflatten(structure.tree, [leaves[path] for path in structure.paths])


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def hold_static(args: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """(arrays among the arguments, how to put arrays back between the static values)."""
    leaves, tree = jax.tree.flatten(args)

    def restore(arrays: list[Any]) -> Any:
        rest = iter(arrays)
        return jax.tree.unflatten(tree, [next(rest) if _is_array(leaf) else leaf for leaf in leaves])

    return [leaf for leaf in leaves if _is_array(leaf)], restore


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(tuple(leaf.shape), np.dtype(leaf.dtype)) if is_kernel(leaf) else leaf


def run(apply: Apply, params: Any, args: Iterable[Any], act: Act) -> Any:
    """``apply(params, *args)`` with every floating parameter in sight of ``act``."""
    named, structure = flatten(params)
    named = {path: as_kernel(leaf) for path, leaf in named.items()}
    arrays, restore = hold_static(tuple(args))

    def together(weights: list[Any], given: list[Any]) -> Any:
        return apply(jax.tree.unflatten(structure.tree, weights), *restore(given))

    closed, shape = traced(together, [_abstract(leaf) for leaf in named.values()], arrays)
    views = [_view(path, leaf) for path, leaf in named.items()]
    results = interpret(closed.jaxpr, closed.consts, [*views, *arrays], act)
    results = [act.other(r, "the function's result") if isinstance(r, View) else whole(r) for r in results]
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def _view(path: str, leaf: Any) -> Any:
    if is_kernel(leaf):
        return View.of(path, leaf, quantized=True)
    floating = _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim > 0
    return View.of(path, leaf, quantized=False) if floating else leaf


_NUMBERED = re.compile(r"(|.*_)(\d+)")


def star(path: str, count: int | None = None) -> tuple[str, tuple[str, ...]]:
    """The path with its first numbers as ``*``, all of them if no count is given, and all its numbers.

    >>> star("layers/3/mlp/up"), star("Block_3/Dense_1/kernel", 1)
    (('layers/*/mlp/up', ('3',)), ('Block_*/Dense_1/kernel', ('3', '1')))
    """
    parts, numbers = path.split("/"), []
    for index, part in enumerate(parts):
        if found := _NUMBERED.fullmatch(part):
            if count is None or len(numbers) < count:
                parts[index] = f"{found[1]}*"
            numbers.append(found[2])
    return "/".join(parts), tuple(numbers)


def bind_stars(pattern: str, paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """{path: what each ``*`` stands for} of the paths that match; a star is one part of a path, or the end of one."""
    shape = re.compile("([^/]+)".join(map(re.escape, pattern.split("*"))))
    return {path: found.groups() for path in paths if (found := shape.fullmatch(path))}


def fill_stars(pattern: str, values: tuple[str, ...]) -> str:
    """Inverse of `bind_stars`, as far as there are stars."""
    rest = iter(values)
    return re.sub(r"\*", lambda _: next(rest, "*"), pattern)
