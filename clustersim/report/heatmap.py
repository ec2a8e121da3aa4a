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
_LETTER, _CELL_H, _MARGIN, _HEAD, _LEAST_W = 7.0, 30.0, 16.0, 60.0, 56.0
_LEGEND_W, _LEGEND_STEPS, _LINE = 240.0, 24, 18.0
#: Largest / smallest value of a scale at least, and how far from an end the middle may be written.
_LEAST_SPAN, _APART = 1.1, 0.15
#: Cells keep their colours on dark screens; what is around them follows the reader's.
_STYLE = (
    "text{fill:#111}.axis{fill:#555}.paper{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#eee}.axis{fill:#bbb}.paper{fill:#1b1b1b}}"
    "g text.white{fill:#fff}g text.black{fill:#000}"
)

Colour = tuple[int, int, int]
#: Ends and middle of the scales: what is good is blue, what is bad is red, also for those who see no green.
_GOOD, _MIDDLE, _BAD = (33, 102, 172), (247, 247, 247), (178, 24, 43)
_NOTHING = "#dddddd"
#: Luminance below which white letters have more contrast than black ones.
# Source  WCAG 2.1: contrast (1.05 / (L + 0.05)) equals ((L + 0.05) / 0.05) there.
_DARK = 0.179


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
    under          lines under the heading
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
    under: Sequence[str] = ()


def heatmap_svg(drawn: Heatmap) -> str:
    """The drawing as an SVG document, for light and dark screens."""
    low, high = _ends(drawn)
    left = _MARGIN + 24 + _LETTER * max(len(label) for label in [*drawn.rows, drawn.y])
    longest = max(len(cell.text) for row in drawn.cells for cell in row)
    wide = max(_LEAST_W, _LETTER * max(longest + 2, *(len(label) + 1 for label in drawn.columns)))
    head = _HEAD + _LINE * len(drawn.under)
    top = head + 2 * 18
    lines = [_LETTER * 1.3 * len(drawn.title), *(_LETTER * len(line) for line in drawn.under)]
    # The legend's words stand on a line of their own, under the axis' name and the scale.
    beside = max(_LEGEND_W, _LETTER * len(drawn.value), _LETTER * len(drawn.x))
    width = max(left + max(wide * len(drawn.columns), beside), _MARGIN + max(lines)) + _MARGIN
    bottom = top + _CELL_H * len(drawn.rows)
    height = bottom + 74
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" aria-labelledby="title about" '
        'font-family="sans-serif" font-size="12">',
        f'<title id="title">{_text(drawn.title)}</title>',
        f'<desc id="about">{_text(drawn.about)}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{width:.0f}" height="{height:.0f}"/>',
        f'<text x="{_MARGIN:g}" y="26" font-size="16" font-weight="bold">{_text(drawn.title)}</text>',
        *(
            f'<text x="{_MARGIN:g}" y="{26 + _LINE * (n + 1):.0f}">{_text(line)}</text>'
            for n, line in enumerate(drawn.under)
        ),
        f'<text class="axis" x="{left:.0f}" y="{head:.0f}">{_text(drawn.x)}</text>',
        f'<text class="axis" x="{left - 10:.0f}" y="{top - 6:.0f}" text-anchor="end">{_text(drawn.y)}</text>',
    ]
    for n, label in enumerate(drawn.columns):
        x = left + wide * (n + 0.5)
        parts.append(f'<text x="{x:.0f}" y="{top - 6:.0f}" text-anchor="middle">{_text(label)}</text>')
    for r, (label, row) in enumerate(zip(drawn.rows, drawn.cells, strict=True)):
        y = top + _CELL_H * r
        parts.append(f'<text x="{left - 10:.0f}" y="{y + 20:.0f}" text-anchor="end">{_text(label)}</text>')
        parts += [_cell(cell, left + wide * c, y, wide, drawn) for c, cell in enumerate(row)]
    parts += _legend(drawn, low, high, left, bottom + 34)
    return "\n".join([*parts, "</svg>\n"])


def _cell(cell: Cell, x: float, y: float, wide: float, drawn: Heatmap) -> str:
    colour = None if cell.value is None else _colour(cell.value, drawn)
    fill = _NOTHING if colour is None else _hex(colour)
    ink = "white" if colour is not None and _brightness(colour) < _DARK else "black"
    # Inside the cell, so that frames of neighbours stay apart.
    inner = (
        f'<rect class="mark" x="{x + 2.5:.1f}" y="{y + 2.5:.1f}" width="{wide - 5:.1f}" '
        f'height="{_CELL_H - 5:.1f}" fill="none" stroke="{ink}" stroke-width="1.5"/>'
    )
    return (
        f'<g><title>{_text(cell.title)}</title><rect x="{x + 1:.0f}" y="{y + 1:.0f}" width="{wide - 2:.0f}" '
        f'height="{_CELL_H - 2:.0f}" fill="{fill}"/>{inner if cell.mark else ""}'
        f'<text x="{x + wide / 2:.0f}" y="{y + 20:.0f}" '
        f'text-anchor="middle" class="{ink}">{_text(cell.text)}</text></g>'
    )


def _legend(drawn: Heatmap, low: float, high: float, left: float, y: float) -> list[str]:
    """The scale from the smallest to the largest value there is, by ratio, and what it is of."""
    step = _LEGEND_W / _LEGEND_STEPS
    parts = [f'<text x="{left:.0f}" y="{y - 8:.0f}">{_text(drawn.value)}</text>']
    for n in range(_LEGEND_STEPS):
        value = low * (high / low) ** ((n + 0.5) / _LEGEND_STEPS)
        fill = _hex(_colour(value, drawn))
        parts.append(
            f'<rect x="{left + n * step:.1f}" y="{y:.0f}" width="{step:.1f}" height="10" fill="{fill}"/>'
        )
    marks = [(low, "start"), (high, "end")]
    share = math.log(drawn.middle / low) / math.log(high / low)
    if _APART < share < 1 - _APART:
        marks.append((drawn.middle, "middle"))
    for value, anchor in marks:
        x = left + _LEGEND_W * math.log(value / low) / math.log(high / low)
        parts.append(f'<text x="{x:.0f}" y="{y + 24:.0f}" text-anchor="{anchor}">{value:.3g}</text>')
    return parts


def _ends(drawn: Heatmap) -> tuple[float, float]:
    """The smallest and the largest value, the middle among them; apart from each other."""
    values = [cell.value for row in drawn.cells for cell in row if cell.value is not None and cell.value > 0]
    low, high = min([*values, drawn.middle]), max([*values, drawn.middle])
    return (low, high) if high > low * _LEAST_SPAN else (low, low * _LEAST_SPAN)


def _colour(value: float, drawn: Heatmap) -> Colour:
    low, high = _ends(drawn)
    # One scale on both sides of the middle: twice as bad is as strong a colour as twice as good.
    reach = max(math.log(high / drawn.middle), math.log(drawn.middle / low), math.log(_LEAST_SPAN))
    share = math.log(value / drawn.middle) / reach if value > 0 else -1.0
    share = min(max(-share if drawn.larger_is_better else share, -1.0), 1.0)
    end = _BAD if share > 0 else _GOOD
    red, green, blue = (round(m + (e - m) * abs(share)) for m, e in zip(_MIDDLE, end, strict=True))
    return red, green, blue


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def _brightness(colour: Colour) -> float:
    # Source  relative luminance of WCAG 2.1, with a plain power for the gamma of sRGB: it chooses the ink.
    red, green, blue = (math.pow(part / 255, 2.2) for part in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _text(words: str) -> str:
    return escape(printable(words))
