# SPDX-License-Identifier: Apache-2.0
"""What all pages share: the document around them, its style sheet, tiles and tables."""

from collections.abc import Collection, Iterable, Sequence
from html import escape
from importlib import resources

from awq_jax._version import __version__

__all__ = ["document", "key", "table", "tiles"]

STYLE = resources.files("awq_jax.pages").joinpath("style.css").read_text(encoding="utf-8")


def document(title: str, lead: str, body: Iterable[str]) -> str:
    """A whole page.

    Args:
      title: plain text.
      lead: HTML under the title.
      body: HTML parts.
    """
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f'<h1>{escape(title)}</h1><p class="soft">{lead}</p>{"".join(body)}'
        f"<footer>Written by awq-jax {__version__}.</footer></main></body></html>\n"
    )


def tiles(items: Iterable[tuple[str, str]]) -> str:
    """(value, what it is) pairs side by side."""
    made = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in items)
    return f'<div class="tiles">{"".join(made)}</div>'


def key(items: Iterable[tuple[str, str]], lead: str = "") -> str:
    """(class, name) pairs: which colour is what; ``lead`` says where."""
    made = (f'<span><i class="{kind}"></i>{escape(name)}</span>' for kind, name in items)
    return f'<p class="key">{f"<b>{escape(lead)}</b>" if lead else ""}{"".join(made)}</p>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, best: Collection[int] = (), words: bool = False
) -> str:
    """A table of plain text.

    Args:
      head: names of the columns; nothing, if it needs none.
      rows: cells.
      best: rows to stand out.
      words: cells are words, not numbers: they start where their column does.
    """
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    made = []
    for place, row in enumerate(rows):
        kind = ' class="best"' if place in best else ""
        cells = "".join(f"<td{' class=wrap' if len(cell) > 60 else ''}>{escape(cell)}</td>" for cell in row)
        made.append(f"<tr{kind}>{cells}</tr>")
    return f'<div class="card"><table class="{"words" if words else "text"}">{top}{"".join(made)}</table></div>'
