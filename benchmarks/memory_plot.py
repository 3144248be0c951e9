# SPDX-License-Identifier: Apache-2.0
"""The two curves of `benchmarks.memory` as one SVG: peak memory, measured and predicted, and time, over depth."""

from collections.abc import Sequence
from typing import Any

__all__ = ["plot"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 360, 220, 48, 34, 30
_INK, _SECOND = "#1f6feb", "#d1242f"


def _panel(
    at: float, title: str, layers: Sequence[int], curves: Sequence[tuple[str, str, str, Sequence[float]]]
) -> list[str]:
    """One diagram from 0 up: (name, colour, dashes, values) of each curve."""
    high = 1.15 * max(max(values) for *_, values in curves)
    x = lambda n: at + _LEFT + (_WIDTH - _LEFT - 14) * n / max(layers)
    y = lambda value: _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * value / high
    text = lambda px, py, words, anchor="middle", colour="#57606a": (
        f'<text x="{px:.1f}" y="{py:.1f}" text-anchor="{anchor}" fill="{colour}">{words}</text>'
    )
    parts = [text(at + _WIDTH / 2, 14, title, colour="#24292f")]
    for share in (0.0, 0.25, 0.5, 0.75):
        level = high * share
        ends = f'x1="{x(0):.1f}" x2="{x(max(layers)):.1f}" y1="{y(level):.1f}" y2="{y(level):.1f}"'
        parts.append(f'<line {ends} stroke="#d0d7de"/>')
        parts.append(text(x(0) - 6, y(level) + 4, f"{level:.3g}", "end"))
    parts += [text(x(n), _HEIGHT - 18, str(n)) for n in layers]
    parts.append(text(at + _WIDTH / 2, _HEIGHT - 3, "layers"))
    for row, (name, colour, dashes, values) in enumerate(curves):
        points = " ".join(f"{x(n):.1f},{y(value):.1f}" for n, value in zip(layers, values, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-dasharray="{dashes}"/>')
        parts += [
            f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="2.5" fill="{colour}"/>'
            for n, v in zip(layers, values, strict=True)
        ]
        parts.append(text(x(max(layers)), 28 + 13 * row, name, "end", colour))
    return parts


def plot(rows: Sequence[dict[str, Any]]) -> str:
    """An SVG document of what `benchmarks.memory.measure` found at each depth, shallowest first."""
    layers = [row["layers"] for row in rows]
    gigabytes = lambda key: [row[key] / 1e9 for row in rows]
    parts = _panel(
        0,
        "peak memory, GB",
        layers,
        [
            ("measured", _INK, "", gigabytes("peak_memory_bytes")),
            ("said by --dry-run", _SECOND, "4 3", gigabytes("predicted_bytes")),
        ],
    )
    parts += _panel(_WIDTH, "processor time, s", layers, [("", _INK, "", [row["cpu_s"] for row in rows])])
    size = f'width="{2 * _WIDTH}" height="{_HEIGHT}" viewBox="0 0 {2 * _WIDTH} {_HEIGHT}"'
    style = 'font-family="sans-serif" font-size="11"'
    box = f'<rect width="{2 * _WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{box}{"".join(parts)}</svg>\n'
