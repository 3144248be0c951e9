# SPDX-License-Identifier: Apache-2.0
"""Frozen records that are pytrees."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

__all__ = ["pytree", "static"]

T = TypeVar("T")


def static(**options: Any) -> Any:
    """A field that belongs to the tree's structure: hashable, compared by jit's cache, never traced."""
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(static,))
def pytree(cls: type[T]) -> type[T]:
    """Make a class a frozen keyword-only dataclass and a pytree whose leaves are its non-static fields.

    Unflattening bypasses ``__init__``: jax rebuilds trees with tracers, ``None`` and ``ShapeDtypeStruct`` in the
    leaves, and validation would reject them.
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    meta = tuple(f.name for f in fields if f.metadata.get("static"))
    data = tuple(f.name for f in fields if not f.metadata.get("static"))

    def flatten_with_keys(tree: Any) -> tuple[Any, Any]:
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(tree, name)) for name in data)
        return children, tuple(getattr(tree, name) for name in meta)

    def unflatten(aux: Any, leaves: Any) -> Any:
        tree = object.__new__(cls)
        for name, value in zip(meta + data, (*aux, *leaves), strict=True):
            object.__setattr__(tree, name, value)
        return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls
