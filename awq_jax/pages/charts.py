# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG text. Colours are classes, so that the page's style sheet decides them."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

__all__ = ["Series", "bars", "curves", "stems"]


_ENDS = (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 4.8, 6, 8, 10)
_CHARACTER = 6.6  # wide, in print


class Series(NamedTuple):
    """A named row of values; None leaves a gap."""

    name: str
    values: Sequence[float | None]


def _number(value: float) -> str:
    return f"{value:.3g}"


def _svg(width: float, height: float, parts: Iterable[str], label: str) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _cut_above(top: float, width: float, height: float, parts: Iterable[str]) -> str:
    """Parts without what lies above a line: they leave the picture there."""
    box = f'y="{top:g}" width="{width:g}" height="{height:g}" viewBox="0 {top:g} {width:g} {height:g}"'
    return f"<svg {box}>{''.join(parts)}</svg>"


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _round_up(value: float) -> float:
    """The next short number whose quarters are short too: where an axis ends."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in _ENDS if step * power >= value * (1 - 1e-9))


def bars(
    labels: Sequence[str], series: Sequence[Series], *, label: str, width: float = 920.0, height: float = 240.0
) -> str:
    """Grouped bars from 0, one group for each label; wide ones carry their values.

    Args:
      labels: under the groups; of many, some are left out.
      series: one bar of every group each; class ``s0``, ``s1``, … in order.
      label: what the chart shows, for those who cannot see it.
      width: of the drawing.
      height: of the drawing.
    """
    top = _round_up(max((v for s in series for v in s.values if v is not None), default=1.0) or 1.0)
    left, bottom = 52.0, height - 24
    room, slot = bottom - 18, min((width - left - 8) / max(len(labels), 1), 300.0)
    wide = min(slot * 0.8 / len(series), 48.0)
    longest = max((len(_number(v)) for s in series for v in s.values if v is not None), default=0)
    parts = []
    for step in range(5):
        y = bottom - room * step / 4
        parts += [_line(left, y, width - 8, y, "grid"), _text(left - 6, y + 4, _number(top * step / 4), anchor="end")]
    every = math.ceil(len(labels) / 24)
    for place, name in enumerate(labels):
        middle = left + slot * (place + 0.5)
        for i, one in enumerate(series):
            value = one.values[place]
            if value is None:
                continue
            x, tall = middle + wide * (i - len(series) / 2), room * value / top
            if wide >= _CHARACTER * longest:
                parts.append(_text(x + wide * 0.47, bottom - tall - 4, _number(value)))
            parts.append(
                f'<rect x="{x:.1f}" y="{bottom - tall:.1f}" width="{wide * 0.94:.1f}" height="{tall:.1f}" class="s{i}">'
                f"<title>{escape(f'{name}, {one.name}: {_number(value)}')}</title></rect>"
            )
        if place % every == 0:
            parts.append(_text(middle, height - 8, name))
    return _svg(width, height, parts, label)


def curves(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float | None]]],
    best: tuple[float, float] | None,
    *,
    label: str,
    width: float = 220.0,
    height: float = 116.0,
) -> str:
    """Ratios over an exponent; a dashed line at 1.

    Args:
      lines: (name, xs, ys); class ``l0``, ``l1``, … in order.
      best: the winner, ringed.
      label: what the chart shows.
      width: of the drawing.
      height: of the drawing.
    """
    xs = [x for _, row, _ in lines for x in row] or [0.0, 1.0]
    ys = [y for _, _, row in lines for y in row if y is not None] or [1.0]
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1e-6)
    # What is far worse than rounding to nearest needs no room: the curve leaves the picture.
    low_y, high_y = min(1.0, *ys), max(1.02, min(max(ys), 2 - min(1.0, *ys), 1.6))
    pad = 0.06 * (high_y - low_y)
    low_y, high_y, left, bottom = low_y - pad, high_y + pad, 32.0, height - 20
    at_x = lambda x: left + (x - low_x) / (high_x - low_x) * (width - left - 10)
    at_y = lambda y: bottom - (y - low_y) / (high_y - low_y) * (bottom - 8)
    parts = [
        _line(left, at_y(1.0), width - 10, at_y(1.0), "one"),
        _line(left, bottom, width - 10, bottom, "grid"),
        _text(left - 4, at_y(1.0) + 4, "1", anchor="end"),
        _text(left - 4, at_y(min(ys)) + 4, f"{min(ys):.2f}", anchor="end")
        if min(ys) < 1 - 0.12 * (high_y - low_y)
        else "",
        _text(left, height - 6, _number(low_x)),
        _text((left + width - 10) / 2, height - 6, "exponent"),
        _text(width - 12, height - 6, _number(high_x)),
    ]
    drawn = []
    for i, (name, row, values) in enumerate(lines):
        points = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in zip(row, values, strict=True) if y is not None)
        drawn.append(f'<polyline points="{points}" class="l{i}"><title>{escape(name)}</title></polyline>')
    parts.append(_cut_above(4.0, width, height - 4, drawn))
    if best:
        parts.append(
            f'<circle cx="{at_x(best[0]):.1f}" cy="{at_y(best[1]):.1f}" r="4.5" class="best">'
            f"<title>{escape(f'chosen: {_number(best[0])}, {best[1]:.3f} of round to nearest')}</title></circle>"
        )
    return _svg(width, height, parts, label)


def stems(
    channels: Sequence[int],
    tall: Sequence[float | None],
    lines: Sequence[Sequence[float | None]],
    titles: Sequence[str],
    *,
    salient: set[int],
    label: str,
    width: float = 220.0,
    height: float = 116.0,
) -> str:
    """Magnitudes by channel on a logarithmic axis, over their own medians.

    Args:
      channels: indices, increasing.
      tall: drawn as stems.
      lines: drawn over them, class ``l1``, ``l2``, … in order.
      titles: of each channel; those of the salient ones are shown under the pointer.
      salient: positions whose stems stand out.
      label: what the chart shows.
      width: of the drawing.
      height: of the drawing.
    """

    def relative(values: Sequence[float | None]) -> list[float | None]:
        live = sorted(v for v in values if v)
        middle = live[len(live) // 2] if live else 1.0
        return [math.log10(v / middle) if v else None for v in values]

    up, over = relative(tall), [relative(line) for line in lines]
    found = [v for row in (up, *over) for v in row if v is not None] or [0.0]
    low, high = min(*found, -0.3) - 0.05, max(*found, 0.3) + 0.05
    left, bottom = 32.0, height - 20
    at_x = lambda i: left + (i + 0.5) / max(len(channels), 1) * (width - left - 10)
    at_y = lambda v: bottom - (v - low) / (high - low) * (bottom - 8)
    parts = [_line(left, bottom, width - 10, bottom, "grid")]
    for power in range(math.ceil(low), math.floor(high) + 1):
        parts += [_line(left, at_y(power), width - 10, at_y(power), "grid")]
        parts += [_text(left - 4, at_y(power) + 4, f"{10.0**power:g}×", anchor="end")]
    path = "".join(
        f"M{at_x(i):.1f} {bottom:.0f}V{at_y(value):.1f}"
        for i, value in enumerate(up)
        if value is not None and i not in salient
    )
    parts.append(f'<path d="{path}" class="stem"/>')
    for i in sorted(salient):
        x, value = at_x(i), up[i]
        if value is not None:
            parts.append(
                f'<line x1="{x:.1f}" y1="{bottom:.1f}" x2="{x:.1f}" y2="{at_y(value):.1f}" class="salient">'
                f"<title>{escape(titles[i])}</title></line>"
            )
    for place, row in enumerate(over, 1):
        points = " ".join(f"{at_x(i):.1f},{at_y(v):.1f}" for i, v in enumerate(row) if v is not None)
        parts.append(f'<polyline points="{points}" class="l{place}"/>')
    if channels:
        parts += [_text(left, height - 6, str(channels[0]), anchor="start")]
        parts += [_text((left + width - 10) / 2, height - 6, "channel")]
        parts += [_text(width - 10, height - 6, str(channels[-1]), anchor="end")]
    return _svg(width, height, parts, label)
