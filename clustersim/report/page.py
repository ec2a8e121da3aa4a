"""The parts a terminal page is made of: headings, tables, paragraphs, and numbers for people.

Words that come from files are printed as they are: never read as markup, control characters escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from typing import Any

from rich.console import Console
from rich.text import Text

from clustersim.units import show as quantity

Cell = str | Text

_LABEL_WIDTH = 12


def put_section(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """A title and a table under it; nothing at all without rows."""
    if rows:
        put_title(console, title)
        put_table(console, columns, rows)


def put_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """A label, then columns: text to the right, Text to the left; lines are never folded or padded."""
    cells = [[cell if isinstance(cell, Text) else Text(printable(cell)) for cell in row] for row in rows]
    head = [Text(column, "dim") for column in ("", *columns)]
    lefts = [place == 0 or isinstance(cell, Text) for place, cell in enumerate(rows[0])]
    widths = [max(cell.cell_len for cell in column) for column in zip(head, *cells, strict=True)]
    widths[0] = max(widths[0], _LABEL_WIDTH)
    for row in (head, *cells):
        line = Text("  ")
        for cell, width, left in zip(row, widths, lefts, strict=True):
            gap = " " * (width - cell.cell_len)
            line.append_text(Text.assemble(cell, gap, "  ") if left else Text.assemble(gap, cell, "  "))
        line.rstrip()
        console.print(line, soft_wrap=True)


def put_title(console: Console, title: str) -> None:
    """A heading with an empty line before it."""
    put_line(console, "")
    put_line(console, title, "bold")


def put_line(console: Console, text: str, style: str = "") -> None:
    """One line, however long."""
    console.print(Text(printable(text), style=style), soft_wrap=True)


def put_paragraph(console: Console, mark: str, text: str) -> None:
    """The text in lines as wide as the console, the mark before the first and blanks before the others."""
    lines = Text(printable(text)).wrap(console, max(console.width - len(mark), 20))
    for before, line in zip(chain([mark], repeat(" " * len(mark))), lines, strict=False):
        line.rstrip()
        console.print(Text.assemble(before, line), soft_wrap=True)


def printable(text: str) -> str:
    """The text on one line: what does not print is escaped, so no file can steer the terminal."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def said_time(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    return quantity(seconds, "time")


def said_size(size: float) -> str:
    """Bytes in the unit that reads best."""
    return quantity(size, "size")


def said_share(share: float) -> str:
    """A fraction of one in percent."""
    return f"{share:.1%}"


def said_count(value: float) -> str:
    """A number, whole where it is large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def said_ratio(ratio: float) -> str:
    """A ratio to three digits."""
    return f"{ratio:.3g} x"


def said_or_dash(said: Any, value: float | None) -> str:
    """What `said` makes of a value, or a dash where there is none."""
    return "-" if value is None else str(said(value))


def tier_rows(tiers: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A summary's links by tier as rows: tier, links, bytes, mean and largest utilization."""
    return [
        [tier, f"{one['links']:,}", said_size(one["bytes"]), said_share(one["mean"]), said_share(one["max"])]
        for tier, one in tiers.items()
    ]
