"""The parts an HTML page is made of: headings, tables, figures with captions, and notes on what is missing.

Words from files pass through `text` on their way into HTML and through `label` on their way into a plot.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clustersim.report.page import printable, said_time

#: Rows of a table beside a figure; who wants more asks the trace.
MOST_ROWS = 24


@dataclass(frozen=True, slots=True)
class Missing:
    """What a result does not hold.

    words   a sentence: what is missing, and how to record it
    """

    words: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text.

    head   names of columns, with units
    rows   cells; the first of a row is its label
    left   numbers of columns that hold words; others are numbers and stand to the right
    note   what is left out, and where it is
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)
    note: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot with what it shows in words and in numbers.

    name      its id on the page
    title     heading
    says      what it shows, in a sentence or two
    plot      data and layout as the plotting library takes them
    table     its numbers, or the most important of them
    open      whether the table is shown at once, or on demand
    choices   what can be chosen → the choices, the first of which is shown at first; a trace belongs to
              those that its `meta` names
    zooms     whether its x axis is time, which can be zoomed by buttons
    """

    name: str
    title: str
    says: str
    plot: Mapping[str, Any]
    table: Table
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    open: bool = False
    zooms: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it: HTML that `paragraph` and others made, tables, figures."""

    name: str
    title: str
    parts: Sequence[str | Table | Figure | Missing]


def text(words: str) -> str:
    """Any words as HTML text or the value of an attribute."""
    return html.escape(printable(words))


def label(words: str) -> str:
    """Any words in a plot, where some tags would be followed: they are shown as they are."""
    return html.escape(printable(words), quote=False)


def time(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    return said_time(seconds).replace(" us", " µs")


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph of plain words."""
    return f"<p{_class(kind)}>{text(words)}</p>"


def bullets(sentences: Sequence[str]) -> str:
    """A list of plain sentences."""
    return "<ul>" + "".join(f"<li>{text(one)}</li>" for one in sentences) + "</ul>"


def first_rows(rows: Sequence[Sequence[str]], where: str, most: int = MOST_ROWS) -> tuple[Any, str]:
    """The first rows, and a note on those left out.

    where   the command that shows them
    """
    left = len(rows) - most
    return rows[:most], f"{left:,} more rows: {where}" if left > 0 else ""


def part_html(part: str | Table | Figure | Missing) -> str:
    """A part of a section as HTML."""
    if isinstance(part, Missing):
        return paragraph(part.words, "missing")
    if isinstance(part, Table):
        return table_html(part)
    if isinstance(part, Figure):
        return figure_html(part)
    return part


def section_html(section: Section) -> str:
    """A section as HTML."""
    inside = "\n".join(map(part_html, section.parts))
    return (
        f'<section id="{section.name}" aria-labelledby="{section.name}-title">\n'
        f'<h2 id="{section.name}-title">{text(section.title)}</h2>\n{inside}\n</section>\n'
    )


def table_html(table: Table) -> str:
    """A table as HTML; on a narrow screen it can be moved sideways, by keys too."""
    head = "".join(
        f'<th scope="col"{_class("words" if at in table.left else "")}>{text(name)}</th>'
        for at, name in enumerate(table.head)
    )
    body = "".join(_row(row, table.left) for row in table.rows)
    note = paragraph(table.note, "note") if table.note else ""
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        f"</div>{note}"
    )


def _row(row: Sequence[str], left: Sequence[int]) -> str:
    first, *others = row
    cells = "".join(
        f"<td{_class('words' if at in left else '')}>{text(cell)}</td>" for at, cell in enumerate(others, 1)
    )
    return f'<tr><th scope="row">{text(first)}</th>{cells}</tr>'


def figure_html(figure: Figure) -> str:
    """A figure as HTML: title, choices, an empty place that the page draws in, caption and table."""
    return (
        f'<figure id="{figure.name}"><h3>{text(figure.title)}</h3>'
        f'<div class="controls">{_choices(figure)}{_buttons(figure) if figure.zooms else ""}</div>'
        f'<div class="plot" id="{figure.name}-plot" role="img" aria-label="{text(figure.title)}. '
        f'{text(figure.says)}" style="min-height:{int(figure.plot["layout"]["height"])}px"></div>'
        f"<figcaption>{text(figure.says)}</figcaption>"
        f"{_numbers(figure)}</figure>"
    )


def _numbers(figure: Figure) -> str:
    table = table_html(figure.table)
    return table if figure.open else f"<details><summary>Numbers of this figure</summary>{table}</details>"


def _choices(figure: Figure) -> str:
    return "".join(
        f"<fieldset><legend>{text(what)}</legend>"
        + "".join(
            f'<label><input type="radio" name="{figure.name}-{at}" value="{text(one)}" '
            f'data-figure="{figure.name}" data-what="{text(what)}"{" checked" if not n else ""}> '
            f"{text(one)}</label>"
            for n, one in enumerate(choices)
        )
        + "</fieldset>"
        for at, (what, choices) in enumerate(figure.choices.items())
        if len(choices) > 1
    )


#: What a button does → its sign and its name.
_ZOOMS = {
    "in": ("+", "Zoom in"),
    "out": ("−", "Zoom out"),
    "left": ("←", "Earlier"),
    "right": ("→", "Later"),
    "all": ("all", "Show all of the time"),
}


def _buttons(figure: Figure) -> str:
    buttons = "".join(
        f'<button type="button" data-figure="{figure.name}" data-zoom="{what}" title="{name}" '
        f'aria-label="{name}: {text(figure.title)}">{sign}</button>'
        for what, (sign, name) in _ZOOMS.items()
    )
    return f'<span class="zooms" role="group" aria-label="Time shown">{buttons}</span>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
