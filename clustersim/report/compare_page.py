"""A comparison as one page of HTML: tables and small drawings, without scripts or outside references.

It reads in light and dark, and in print. Words that come from files are escaped; every drawing has a title
for screen readers and the numbers it shows stand in a table beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from clustersim.analysis.compare import BASES
from clustersim.report.compare import (
    about_intervals,
    said_change,
    said_difference,
    said_explained,
    said_interval,
    said_part,
    said_percent,
    said_runs,
    said_seconds,
    said_value,
    sides_of,
)
from clustersim.report.page import printable

Found = Mapping[str, Any]

#: Pixels of a drawing.
_WIDTH, _HEIGHT, _MIDDLE, _LETTER = 160.0, 16.0, 80.0, 14.0

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2327; --paper: #fff; --soft: #5f6b73; --rule: #d5dadd;
  --more: #b3402e; --less: #2b7a4b; --bar: #4a78a8; --zebra: #f5f7f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7e9; --paper: #16191b; --soft: #9aa5ac;
  --rule: #363d42; --more: #ef8a7a; --less: #74c795; --bar: #7fb0e0; --zebra: #1e2225; } }
@media print { :root { --ink: #000; --paper: #fff; --soft: #444; --rule: #bbb; --more: #a0301e;
  --less: #1e6a3b; --bar: #35618e; --zebra: #fff; } table, figure, li { break-inside: avoid; } }
body { margin: 2rem auto; max-width: 84rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--rule);
  font-variant-numeric: tabular-nums; vertical-align: top; white-space: nowrap; }
td.words, td.value { white-space: normal; } td.words { min-width: 14rem; }
th { font-weight: 600; } tbody tr:nth-child(even) { background: var(--zebra); }
th:first-child, td.words, th.words { text-align: left; } td.words { color: var(--soft); }
td.value { text-align: left; max-width: 26rem; overflow-wrap: anywhere; }
.better { color: var(--less); } .worse { color: var(--more); } .soft { color: var(--soft); }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
tfoot td, tfoot th { font-weight: 600; border-top: 2px solid var(--rule); }
svg .more { fill: var(--more); } svg .less { fill: var(--less); } svg .bar { fill: var(--bar); }
svg text { fill: var(--soft); }
svg line { stroke: var(--ink); stroke-width: 1.2; } svg .zero { stroke: var(--soft); stroke-width: .8; }
"""


def compare_html(found: Found) -> str:
    """The page of what `study.compare.compare` gives."""
    names = " and ".join(f"{side['side']} {side['name']}" for side in found["sides"])
    title = _safe(f"Compared: {names}")
    body = "\n".join(
        [
            f"<h1>{title}</h1>",
            _sides(found["sides"]),
            *_summary(found),
            _metrics(found),
            *(_explained(one["side"], phase) for one in found["explained"] for phase in one["phases"]),
            _differs(found),
            *_notes(found),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def _safe(text: object) -> str:
    return escape(printable(str(text)))


def _table(caption: str, head: Sequence[str], rows: Sequence[str], foot: str = "") -> str:
    """Cells and rows are HTML already."""
    columns = "".join(f'<th scope="col">{one}</th>' for one in head)
    end = f"<tfoot>{foot}</tfoot>" if foot else ""
    return (
        f'<div class="wide"><table><caption>{caption}</caption><thead><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody>{end}</table></div>"
    )


def _row(label: str, *cells: str) -> str:
    return f'<tr><th scope="row">{_safe(label)}</th>{"".join(cells)}</tr>'


def _cell(text: str, kind: str = "") -> str:
    about = f' class="{kind}"' if kind else ""
    return f"<td{about}>{_safe(text)}</td>"


def _sides(sides: Sequence[Found]) -> str:
    rows = [
        _row(
            side["side"], _cell(side["name"], "value"), _cell(said_runs(side["seeds"]), "value"),
            _cell(", ".join(side["phases"]), "value"), _cell(side["where"], "value"),
        )
        for side in sides
    ]  # fmt: skip
    return _table("What is compared", ["", "scenario", "runs", "phases", "folder"], rows)


def _summary(found: Found) -> Iterator[str]:
    said = [said_explained(one["side"], phase) for one in found["explained"] for phase in one["phases"]]
    yield from (f"<p>{_safe(sentence)}</p>" for sentence in said)
    yield from (f'<p class="worse">{_safe(sentence)}</p>' for sentence in found.get("broken", ()))


# ---- headline numbers -----------------------------------------------------------------------------------


def _metrics(found: Found) -> str:
    letters = [side["side"] for side in found["sides"]]
    head = ["", *map(_safe, letters)]
    for letter in letters[1:]:
        head += [f"{_safe(letter)} − A", "", "what to make of it"]
    head.append("drawn from 0")
    rows = []
    for row in found["metrics"]:
        cells = [_cell(said_interval(value, row["dimension"])) for value in row["values"]]
        for one in row["differences"]:
            cells += _difference(row, one)
        cells.append(f"<td>{_bars(row, letters)}</td>")
        rows.append(_row(row["metric"], *cells))
    return f"<h2>Side by side</h2>{_table('Headline numbers; in drawings lines are intervals', head, rows)}"


def _difference(row: Found, one: Found) -> list[str]:
    said = said_difference(row, one)
    if "lacking" in one:
        return [_cell("-"), _cell(""), _cell(said, "words")]
    kind = "better" if said.startswith("better") else "worse" if said.startswith("worse") else "soft"
    change = said_change(one, row["dimension"], *sides_of(row, one))
    return [_cell(change), _cell(said_percent(one, row["values"][0]["value"])), _cell(said, f"value {kind}")]


def _bars(row: Found, letters: Sequence[str]) -> str:
    """A bar for each side, from zero, with its interval as a line."""
    there = [(letter, one) for letter, one in zip(letters, row["values"], strict=True) if one]
    longest = max((one["high"] or one["value"] for _, one in there), default=0.0)
    if longest <= 0:
        return ""
    scale, drawn = (_WIDTH - _LETTER) / longest, []
    for place, (letter, one) in enumerate(there):
        y = place * _HEIGHT
        drawn.append(f'<text x="0" y="{y + 12:g}" font-size="11">{_safe(letter)}</text>')
        drawn.append(_rect("bar", _LETTER, y + 3, one["value"] * scale))
        if one["half_width"]:
            low, high = (_LETTER + one[key] * scale for key in ("low", "high"))
            drawn.append(_line(low, high, y + _HEIGHT / 2))
    said = "; ".join(f"{letter} {said_interval(one, row['dimension'])}" for letter, one in there)
    return _svg(len(there), f"{row['metric']}: {said}", drawn)


# ---- explained ------------------------------------------------------------------------------------------


def _explained(side: str, one: Found) -> str:
    longest = max((_reach(part["difference"]) for part in one["parts"]), default=0.0)
    rows = [
        _row(
            part["cause"].replace("_", " "),
            _cell(said_seconds(part["a"], part)), _cell(said_seconds(part["b"], part)),
            _cell(said_change(part["difference"], "time", part["a"], part["b"])),
            _cell(said_part(part)),
            f"<td>{_diverging(part, longest)}</td>", _cell(part["words"], "words"),
        )
        for part in one["parts"]
    ]  # fmt: skip
    foot = _row(
        "all", _cell(said_seconds(one["a"], one)), _cell(said_seconds(one["b"], one)),
        _cell(said_change(one["difference"], "time", one["a"], one["b"])), _cell(""),
        "<td></td>", _cell("the parts add up to it", "words"),
    )  # fmt: skip
    head = ["", "A", _safe(side), f"{_safe(side)} − A", "share", "less ← → more", ""]
    caption = _safe(f"{BASES[one['basis']]}; {_covered(one)}")
    title = _safe(f"Why a {one['phase']} step of {side} differs from A's")
    return f"<h2>{title}</h2>{_table(caption, head, rows, foot)}"


def _covered(one: Found) -> str:
    a, b = one["steps"]
    return f"{a['explained']:,} of {a['all']:,} steps of A, {b['explained']:,} of {b['all']:,} of the other"


def _reach(found: Found) -> float:
    """How far a difference with its interval is from zero."""
    ends = (found["value"], found["low"], found["high"])
    return max(abs(float(one)) for one in ends if one is not None)


def _diverging(part: Found, longest: float) -> str:
    """A bar to the right for more, to the left for less, with its interval as a line."""
    if longest <= 0:
        return ""
    found, scale = part["difference"], _MIDDLE / longest
    value = found["value"] * scale
    kind = "more" if value > 0 else "less"
    drawn = [
        _rect(kind, _MIDDLE + min(value, 0.0), 3.0, abs(value)),
        f'<line class="zero" x1="{_MIDDLE:g}" x2="{_MIDDLE:g}" y1="0" y2="{_HEIGHT:g}"/>',
    ]
    if found["half_width"]:
        drawn.append(_line(_MIDDLE + found["low"] * scale, _MIDDLE + found["high"] * scale, _HEIGHT / 2))
    return _svg(
        1, f"{part['cause'].replace('_', ' ')}: {said_change(found, 'time', part['a'], part['b'])}", drawn
    )


def _svg(rows: int, title: str, drawn: Sequence[str]) -> str:
    height = rows * _HEIGHT
    return (
        f'<svg role="img" width="{_WIDTH:g}" height="{height:g}" viewBox="0 0 {_WIDTH:g} {height:g}">'
        f"<title>{_safe(title)}</title>{''.join(drawn)}</svg>"
    )


def _rect(kind: str, x: float, y: float, width: float) -> str:
    return f'<rect class="{kind}" x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{_HEIGHT - 6:g}"/>'


def _line(start: float, end: float, y: float) -> str:
    start, end = (min(max(x, 0.0), _WIDTH) for x in (start, end))
    return f'<line x1="{start:.2f}" x2="{end:.2f}" y1="{y:g}" y2="{y:g}"/>'


# ---- what differs, and notes ----------------------------------------------------------------------------


def _differs(found: Found) -> str:
    letters = [_safe(side["side"]) for side in found["sides"]]
    title = "<h2>What differs in the scenarios</h2>"
    if not found["differs"]:
        return f"{title}<p>Nothing.</p>"
    rows = [
        _row(one["key"], *(_cell(said_value(value), "value") for value in one["values"]))
        for one in found["differs"]
    ]
    return f"{title}{_table('Keys of the resolved scenarios, defaults written out', ['', *letters], rows)}"


def _notes(found: Found) -> Iterator[str]:
    notes = [*found["notes"], *about_intervals(found)]
    if notes:
        yield "<h2>Notes</h2><ul>" + "".join(f"<li>{_safe(note)}</li>" for note in notes) + "</ul>"
