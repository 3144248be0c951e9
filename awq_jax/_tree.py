# SPDX-License-Identifier: Apache-2.0
"""Parameters as nested dicts, addressed by paths such as ``layers/0/attn/q``."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = ["get", "leaves", "nested", "put"]


def get(tree: Mapping[str, Any], path: str) -> Any:
    """The subtree or leaf at a path.

    Raises:
      KeyError: naming the part of the path that exists and the keys found there.
    """
    node: Any = tree
    done: list[str] = []
    for key in path.split("/"):
        if not isinstance(node, Mapping) or key not in node:
            found = sorted(node) if isinstance(node, Mapping) else type(node).__name__
            raise KeyError(f"no {path!r} in these parameters: {'/'.join(done) or 'the root'!r} has {found}.")
        node = node[key]
        done.append(key)
    return node


def put(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of the tree with one path replaced; everything else is shared with the original."""
    key, _, rest = path.partition("/")
    if key not in tree:
        raise KeyError(f"no {key!r} in these parameters; the keys here are {sorted(tree)}.")
    return {**tree, key: put(tree[key], rest, value) if rest else value}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) pairs, depth first; anything that is not a dict is a leaf."""
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(value, Mapping):
            yield from leaves(value, path)
        else:
            yield path, value


def nested(found: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The tree of (path, leaf) pairs, the inverse of `leaves`.

    >>> nested([("attn/q", 1), ("attn/k", 2), ("norm", 3)])
    {'attn': {'q': 1, 'k': 2}, 'norm': 3}
    """
    tree: dict[str, Any] = {}
    for path, leaf in found:
        node = tree
        *parents, name = path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree
