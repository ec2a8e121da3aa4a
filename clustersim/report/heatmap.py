"""A table of numbers as a drawing: one coloured cell each, with its number in it.

Plain SVG without scripts or outside references. Colours only repeat what the numbers say, so nothing is
lost to those who cannot tell them apart; every cell has a title that screen readers read and browsers show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from clustersim.report.page import printable

#: Pixels; a letter is about 0.6 of its size wide.
_LETTER, _CELL_H, _MARGIN, _HEAD, _LEAST_W = 7.0, 30.0, 16.0, 66.0, 56.0
_LEGEND_W, _LEGEND_STEPS = 240.0, 24

Colour = tuple[int, int, int]
#: Ends and middle of the scales: what is good is blue, what is bad is red, also for those who see no green.
_GOOD, _MIDDLE, _BAD = (33, 102, 172), (247, 247, 247), (178, 24, 43)
_NOTHING = "#dddddd"
#: Brightness below which letters are white.
_DARK = 0.45


@dataclass(frozen=True, slots=True)
class Cell:
    """One number.

    value  what the colour shows; None where there is none
    text   what is written in it
    title  what is said of it
    mark   whether a frame is drawn around it
    """

    value: float | None
    text: str
    title: str
    mark: bool = False


@dataclass(frozen=True, slots=True)
class Heatmap:
    """What is drawn.

    title, about   heading, and a description for those who cannot see it
    x, y           what columns and rows are, with units
    columns, rows  their labels
    cells          a row of cells for each label
    value          what the numbers are, with unit
    middle         value of the neutral colour; larger is worse unless `larger_is_better`
    """

    title: str
    about: str
    x: str
    y: str
    columns: Sequence[str]
    rows: Sequence[str]
    cells: Sequence[Sequence[Cell]]
    value: str
    middle: float = 1.0
    larger_is_better: bool = False


def heatmap_svg(drawn: Heatmap) -> str:
    """The drawing as an SVG document."""
    reach = _reach(drawn)
    left = _MARGIN + 24 + _LETTER * max(len(label) for label in [*drawn.rows, drawn.y])
    longest = max(len(cell.text) for row in drawn.cells for cell in row)
    wide = max(_LEAST_W, _LETTER * max(longest + 2, *(len(label) + 1 for label in drawn.columns)))
    top = _HEAD + 2 * 18
    width = max(left + wide * len(drawn.columns), _MARGIN + _LETTER * 1.2 * len(drawn.title)) + _MARGIN
    beside = max(_LEGEND_W + _LETTER * (len(drawn.value) + 2), _LETTER * len(drawn.x))
    width = max(width, left + beside + _MARGIN)
    height = top + _CELL_H * len(drawn.rows) + 70
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" aria-labelledby="title about" '
        'font-family="sans-serif" font-size="12">',
        f'<title id="title">{_text(drawn.title)}</title>',
        f'<desc id="about">{_text(drawn.about)}</desc>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
        f'<text x="{_MARGIN:g}" y="26" font-size="16" font-weight="bold">{_text(drawn.title)}</text>',
        f'<text x="{left:.0f}" y="{_HEAD:.0f}" fill="#555">{_text(drawn.x)}</text>',
        f'<text x="{left - 10:.0f}" y="{top - 6:.0f}" text-anchor="end" fill="#555">{_text(drawn.y)}</text>',
    ]
    for n, label in enumerate(drawn.columns):
        x = left + wide * (n + 0.5)
        parts.append(f'<text x="{x:.0f}" y="{top - 6:.0f}" text-anchor="middle">{_text(label)}</text>')
    for r, (label, row) in enumerate(zip(drawn.rows, drawn.cells, strict=True)):
        y = top + _CELL_H * r
        parts.append(f'<text x="{left - 10:.0f}" y="{y + 20:.0f}" text-anchor="end">{_text(label)}</text>')
        parts += [_cell(cell, left + wide * c, y, wide, drawn, reach) for c, cell in enumerate(row)]
    parts += _legend(drawn, reach, left, top + _CELL_H * len(drawn.rows) + 20)
    return "\n".join([*parts, "</svg>\n"])


def _cell(cell: Cell, x: float, y: float, wide: float, drawn: Heatmap, reach: float) -> str:
    colour = None if cell.value is None else _colour(cell.value, drawn, reach)
    fill = _NOTHING if colour is None else _hex(colour)
    ink = "white" if colour is not None and _brightness(colour) < _DARK else "black"
    frame = ' stroke="black" stroke-width="2"' if cell.mark else ' stroke="white"'
    return (
        f'<g><title>{_text(cell.title)}</title><rect x="{x + 1:.0f}" y="{y + 1:.0f}" width="{wide - 2:.0f}" '
        f'height="{_CELL_H - 2:.0f}" fill="{fill}"{frame}/><text x="{x + wide / 2:.0f}" y="{y + 20:.0f}" '
        f'text-anchor="middle" fill="{ink}">{_text(cell.text)}</text></g>'
    )


def _legend(drawn: Heatmap, reach: float, left: float, y: float) -> list[str]:
    """The scale from the smallest to the largest value, by ratio to the middle."""
    step = _LEGEND_W / _LEGEND_STEPS
    parts = []
    for n in range(_LEGEND_STEPS):
        value = drawn.middle * math.exp(reach * (2 * (n + 0.5) / _LEGEND_STEPS - 1))
        fill = _hex(_colour(value, drawn, reach))
        parts.append(
            f'<rect x="{left + n * step:.1f}" y="{y:.0f}" width="{step:.1f}" height="10" fill="{fill}"/>'
        )
    for share, anchor in ((-1.0, "start"), (0.0, "middle"), (1.0, "end")):
        x, value = left + _LEGEND_W * (share + 1) / 2, drawn.middle * math.exp(reach * share)
        parts.append(f'<text x="{x:.0f}" y="{y + 24:.0f}" text-anchor="{anchor}">{value:.3g}</text>')
    parts.append(f'<text x="{left + _LEGEND_W + 10:.0f}" y="{y + 10:.0f}">{_text(drawn.value)}</text>')
    return parts


def _reach(drawn: Heatmap) -> float:
    """How far the values lie from the middle at most, as a logarithm of their ratio."""
    far = [
        abs(math.log(cell.value / drawn.middle))
        for row in drawn.cells
        for cell in row
        if cell.value is not None and cell.value > 0
    ]
    return max([*far, math.log(1.1)])


def _colour(value: float, drawn: Heatmap, reach: float) -> Colour:
    share = math.log(value / drawn.middle) / reach if value > 0 else -1.0
    share = min(max(-share if drawn.larger_is_better else share, -1.0), 1.0)
    end = _BAD if share > 0 else _GOOD
    red, green, blue = (round(m + (e - m) * abs(share)) for m, e in zip(_MIDDLE, end, strict=True))
    return red, green, blue


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def _brightness(colour: Colour) -> float:
    # Source  relative luminance of ITU-R BT.709, without the gamma: it only chooses the ink.
    return (0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]) / 255


def _text(words: str) -> str:
    return escape(printable(words))
