"""Predicted against measured as a drawing: one dot per cell in which rows lie, logarithmic both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _LEFT, _TOP = 720, 420, 70, 30
_LEGEND = 230
_CELLS = 140
_MOST = 4.0
_COLOURS = (
    "#1b6ca8",
    "#d1495b",
    "#3a7d44",
    "#8f5fb0",
    "#c77d0a",
    "#3f8f8f",
    "#7a4b2a",
    "#555555",
    "#e377c2",
    "#9aa800",
)


def scatter(points: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """SVG of predicted / measured over the measured time.

    points  label → (measured, predicted) s of each row; ratios beyond 4 lie on the edge
    """
    times = [measured for rows in points.values() for measured, _ in rows]
    low, high = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))
    parts = [*_frame(low, high)]
    for place, (label, rows) in enumerate(points.items()):
        colour = _COLOURS[place % len(_COLOURS)]
        cells = sorted({_cell(measured, predicted, low, high) for measured, predicted in rows})
        dots = "".join(f"M{x} {y}h3v3h-3z" for x, y in cells)
        parts.append(f'<path class="rows" d="{dots}" fill="{colour}" fill-opacity="0.6"/>')
        parts += _legend(place, f"{label} ({len(rows):,})", colour)
    width = _LEFT + _WIDTH + _LEGEND
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT + 80}" '
        'font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def _across(share: float) -> float:
    return round(_LEFT + share * _WIDTH, 1)


def _down(ratio: float) -> float:
    share = math.log(min(max(ratio, 1 / _MOST), _MOST)) / math.log(_MOST)
    return round(_TOP + (1 - share) / 2 * _HEIGHT, 1)


def _cell(measured: float, predicted: float, low: int, high: int) -> tuple[int, int]:
    """Upper left corner of a dot."""
    share = (math.log10(measured) - low) / (high - low)
    step = 2 * math.log(_MOST) / _CELLS
    ratio = math.exp(round(math.log(predicted / measured) / step) * step)
    return int(_across(round(share * _CELLS) / _CELLS)) - 1, int(_down(ratio)) - 1


def _frame(low: int, high: int) -> list[str]:
    parts = []
    for ratio in (0.25, 0.5, 0.75, 1.0, 1.25, 2.0, 4.0):
        y, wide, right = _down(ratio), 1.5 if ratio == 1.0 else 0.5, _LEFT + _WIDTH
        parts.append(
            f'<line x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}" stroke="#999" stroke-width="{wide}"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{ratio:g}</text>')
    for power in range(low, high + 1):
        x = _across((power - low) / (high - low))
        parts.append(
            f'<line x1="{x}" x2="{x}" y1="{_TOP}" y2="{_TOP + _HEIGHT}" stroke="#999" stroke-width="0.5"/>'
        )
        parts.append(f'<text x="{x}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">{_time(power)}</text>')
    middle = _LEFT + _WIDTH / 2
    parts.append(f'<text x="{middle}" y="{_TOP + _HEIGHT + 40}" text-anchor="middle">measured time</text>')
    parts.append(f'<text x="{_LEFT - 55}" y="{_TOP - 12}">predicted / measured</text>')
    return parts


def _time(power: int) -> str:
    unit, scale = next((u, s) for u, s in (("s", 0), ("ms", -3), ("us", -6), ("ns", -9)) if power >= s)
    return f"{10 ** (power - scale)} {unit}"


def _legend(place: int, text: str, colour: str) -> list[str]:
    x, y = _LEFT + _WIDTH + 16, _TOP + 10 + 20 * place
    return [
        f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>',
        f'<text x="{x + 10}" y="{y + 4}">{escape(text)}</text>',
    ]
