# SPDX-License-Identifier: Apache-2.0
"""English and Python that every Python brings along: the standard library's own documentation and source.

It is the text of last resort for calibration and what `examples/train_tiny_lm.py` trains on. Nothing of it is copied
into this project: it is read from the running interpreter, whose licence covers it.

Text is divided by a hash of its name, module by module, so that what was held out from training under one version of
Python is held out under every other. A paragraph that stands in two splits stays in the first of `heldout`,
`calibration`, `train` alone. The text differs between versions of Python all the same: compare numbers only where
`digest` agrees.
"""

import ast
import functools
import hashlib
import inspect
import pathlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, get_args

__all__ = ["Piece", "Split", "digest", "documentation", "pieces", "source", "split_of", "unseen"]

Split = Literal["heldout", "calibration", "train"]

_SIXTEENTHS = {"heldout": 2, "calibration": 3}  # of the names; training has the rest
_SHORTEST_DOCSTRING = 80
_SHORTEST_REPEAT = 60  # characters from which a paragraph counts as text of its own, not as a phrase like "Example:"
_NOT_OURS = {"site-packages", "dist-packages", "ensurepip", "lib2to3", "idlelib", "__pycache__"}
_TABLES = {"encodings", "pydoc_data", "cjkencodings"}  # columns of numbers, and the topics in another form


class Piece(NamedTuple):
    """A docstring, a topic of `help()` or a source file, under the name that decides its split."""

    name: str
    text: str


def digest(text: str) -> str:
    """sha256 of UTF-8 text, in hex: numbers measured on one text say so by it.

    >>> digest("")[:8]
    'e3b0c442'
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def split_of(name: str) -> Split:
    """The split that a dotted name falls into; a module, its submodules and its ``_`` or ``_py`` twin go together.

    >>> split_of("decimal.Decimal.sqrt") == split_of("_pydecimal.Decimal")
    True
    """
    root = re.sub(r"^_(py)?", "", name.split(".")[0])
    slot = hashlib.sha256(root.encode()).digest()[0] % 16
    for split, width in _SIXTEENTHS.items():
        if slot < width:
            return split  # pyright: ignore[reportReturnType]
        slot -= width
    return "train"


def pieces(split: Split) -> tuple[Piece, ...]:
    """Documentation of one split, in an order that mixes subjects and does not change: by hash of the name.

    Raises:
      FileNotFoundError: this Python comes without the source of its library.
    """
    return _pieces(split)


def documentation(split: Split) -> str:
    """The text of `pieces`, each under its name, with blank lines between.

    Raises:
      FileNotFoundError: this Python comes without the source of its library.
    """
    return "\n\n".join(f"{name}\n\n{text}" for name, text in pieces(split))


def source() -> tuple[Piece, ...]:
    """Source files to train on, the library's own tests among them; what the other splits hold is left out.

    Raises:
      FileNotFoundError: this Python comes without the source of its library.
    """
    files = (Piece(name, _read(path)) for name, path in _prose() if split_of(name) == "train")
    return tuple(unseen(_by_hash(files), (*pieces("heldout"), *pieces("calibration"))))


def unseen(found: Iterable[Piece], known: Iterable[Piece]) -> Iterator[Piece]:
    """Pieces without the paragraphs of ``known`` and without their own repeats; what nothing is left of is dropped.

    >>> text = "The same words, long enough to be told from a phrase that is just common."
    >>> list(unseen([Piece("a", text), Piece("b", text)], []))[1:]
    []
    """
    seen = {_words(paragraph) for piece in known for paragraph in piece.text.split("\n\n")}
    seen = {words for words in seen if len(words) >= _SHORTEST_REPEAT}
    for name, text in found:
        kept = []
        for paragraph in text.split("\n\n"):
            words = _words(paragraph)
            if words not in seen:
                kept.append(paragraph)
            if len(words) >= _SHORTEST_REPEAT:
                seen.add(words)
        if any(len(paragraph) >= _SHORTEST_REPEAT for paragraph in kept):
            yield Piece(name, "\n\n".join(kept))


@functools.cache
def _pieces(split: Split) -> tuple[Piece, ...]:
    earlier = get_args(Split)[: get_args(Split).index(split)]
    seen = [piece for other in earlier for piece in _pieces(other)]
    docstrings = (p for name, path in _prose() if split_of(name) == split for p in _docstrings(name, _read(path)))
    topics = (p for p in _topics() if split_of(p.name) == split)
    return tuple(unseen(_by_hash([*topics, *docstrings]), seen))


def _by_hash(found: Iterable[Piece]) -> list[Piece]:
    return sorted(found, key=lambda piece: digest(piece.name))


def _words(paragraph: str) -> str:
    """A paragraph regardless of indentation, line breaks and the quotes that open and close a docstring."""
    return " ".join(paragraph.replace('"""', " ").split())


@functools.cache
def _files() -> tuple[tuple[str, pathlib.Path], ...]:
    """(dotted name, path) of every source file of the library, sorted."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    found = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    named = tuple((_dotted(path), root / path) for path in found if not _NOT_OURS.intersection(path.parts))
    if not named:
        raise FileNotFoundError(
            f"this Python has no source of its standard library in {root}, so there is no text to fall back on. "
            "Give your own: --calib FILE."
        )
    return named


def _prose() -> Iterator[tuple[str, pathlib.Path]]:
    return ((name, path) for name, path in _files() if not _TABLES.intersection(path.parts))


def _dotted(path: pathlib.PurePath) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _read(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")  # a few test files are Latin-1 on purpose


def _docstrings(module: str, code: str) -> Iterator[Piece]:
    """Docstrings of a module, its classes and functions, longer than a phrase; none of the library's tests."""
    if "test" in module.split(".") or "tests" in module.split("."):
        return

    def walk(node: ast.AST, name: str) -> Iterator[Piece]:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{name}.{node.name}"
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) > _SHORTEST_DOCSTRING:
                yield Piece(name, text)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, name)

    yield from walk(ast.parse(code), module)


def _topics() -> Iterator[Piece]:
    """The chapters that `help()` shows, where the library has them: parsed, so that nothing of it runs."""
    for name, path in _files():
        if name == "pydoc_data.topics":
            [table] = [node.value for node in ast.parse(_read(path)).body if isinstance(node, ast.Assign)]
            for topic, text in ast.literal_eval(table).items():
                yield Piece(topic, inspect.cleandoc(text))
