"""The answers of the stress suite and of regime maps for people: line by line as they come, and drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from clustersim.report.heatmap import Cell, Heatmap, heatmap_svg
from clustersim.report.page import (
    printable,
    put_line,
    put_paragraph,
    put_section,
    put_title,
    said_count,
    said_ratio,
    said_size,
    said_time,
)

Found = Mapping[str, Any]

_CASE_WIDTH = 16
#: Column of the suite → width; what stands in it is made by `_suite_cells`.
_COLUMNS = {
    "tokens/s": 9,
    "ratio": 7,
    "step p50": 9,
    "p99": 9,
    "ratio ": 7,
    "token p50": 9,
    "p99 ": 9,
    "load": 6,
    "queued": 8,
    "exposed": 8,
}
_LONGEST_ERROR = 160


def show_head(head: Found, console: Console) -> None:
    """The first lines: what is run, and the bound."""
    steps = head["decode_steps"]
    put_line(console, f"{head['name']} under stress  seed {head['seed']}", "bold")
    if steps["run"]:
        run = f"{steps['run']} decode steps per case"
        put_line(
            console,
            f"  {run}" + (f", the file's {steps['in_file']} cut short" * (steps["run"] < steps["in_file"])),
        )
    slo = head["slo"]
    put_line(console, f"  bound: {slo['text']}" + ("" if slo["stated"] else "  (1.2 x under even load)"))


def show_suite_head(console: Console) -> None:
    """The columns of the suite."""
    heading = [f"{name.strip():>{width}}" for name, width in _COLUMNS.items()]
    put_line(console, f"  {'case':<{_CASE_WIDTH}}{' '.join(heading)}  bound   waited for", "dim")


def show_suite_row(row: Found, console: Console) -> None:
    """One line for a case."""
    name = f"  {printable(row['case']):<{_CASE_WIDTH}}"
    if row["error"]:
        what = "does not apply" if not row["applies"] else "not run"
        put_line(console, f"{name}{what}: {_cut(row['error'])}", "dim" if not row["applies"] else "red")
        return
    cells = [f"{cell:>{width}}" for cell, width in zip(_suite_cells(row), _COLUMNS.values(), strict=True)]
    worst = row["figures"]["worst_gpu"]
    blame = "-" if worst is None else f"{worst['gpu']} {worst['share']:.0%}"
    verdict = "MISSED" if row["missed"] else "kept"
    style = "red" if row["missed"] else ""
    put_line(console, f"{name}{' '.join(cells)}  {verdict:<6}  {blame}", style)


def _suite_cells(row: Found) -> list[str]:
    figures, ratios = row["figures"], row["against_balanced"]
    step, token = figures["latency"]["step"], token_latency(figures)
    load, wait = figures["imbalance"], figures["queue_wait"]
    return [
        _or_dash(said_count, figures["tokens_per_second"]),
        _or_dash(said_ratio, ratios["tokens_per_second"]),
        said_time(step["p50"]),
        said_time(step["p99"]),
        _or_dash(said_ratio, ratios["p99_step"]),
        _or_dash(said_time, token["p50"] if token else None),
        _or_dash(said_time, token["p99"] if token else None),
        _or_dash(lambda one: f"{one:.2f}", load and load["mean"]),
        _or_dash(said_time, wait and wait["p99"]),
        _or_dash(said_time, figures["exposed_exchange"]),
    ]


def token_latency(figures: Found) -> Found | None:
    """TPOT where tokens are made, else TTFT."""
    found: Found | None = figures["latency"]["tpot"] or figures["latency"]["ttft"]
    return found


def _or_dash(said: Callable[[float], str], value: float | None) -> str:
    return "-" if value is None else said(value)


def show_columns(console: Console) -> None:
    """What the columns of the suite are."""
    put_paragraph(
        console,
        "  ",
        "ratio: to the balanced case; token: TPOT, of prompts TTFT; load: busiest rank / mean tokens, mean "
        "over layers; queued: p99 time of a token in its expert's queue; exposed: time per step and GPU in "
        "exchanges with nothing computed meanwhile; waited for: the GPU that others wait for longest, and "
        "its share of all waiting",
    )


def show_what(rows: Sequence[Found], console: Console) -> None:
    """What is done in each case."""
    put_title(console, "What is done")
    for row in rows:
        put_paragraph(console, f"  {printable(row['case']):<{_CASE_WIDTH}}", row["what"])


def show_breaking_row(row: Found, console: Console) -> None:
    """Where the bound breaks for one cause."""
    put_paragraph(console, "  ", f"{row['what']}: {row['said']}")
    for doubt in row.get("doubts", ()):
        put_paragraph(console, "    but ", doubt)


_OF_COPIES = (
    "+ 1, + 2: spare places per rank. Tokens go to those of an expert's copies that leave the busiest rank "
    'the fewest of them (copy_choice = "least_loaded"). A rank reads the weights of every copy that gets '
    "tokens, and of no other: with few tokens per expert, as in decode, a copy can cost more than the tokens "
    "that it takes over."
)


def show_help(found: Found, console: Console) -> None:
    """Which placement of experts keeps the bound, case by case: p99 step ÷ that of even load."""
    places = found["placements"]
    rows = [[row["case"], *(_help_cell(cell) for cell in row["cells"])] for row in found["rows"]]
    names = [place["placement"] for place in places]
    put_section(console, "What would help: p99 step / balanced, * where the bound is missed", names, rows)
    if any("+" in name for name in names):
        put_paragraph(console, "  ", _OF_COPIES)
    summary = [
        [
            one["placement"],
            f"{one['kept']} of {one['ran']}",
            _or_dash(lambda ratio: f"{ratio:.2f}", one["worst"]),
            _or_dash(lambda ratio: f"{ratio:.2f}", one["mean"]),
            Text(f"{one['not_run']} not run: {_cut(one['error'])}" if one["not_run"] else ""),
        ]
        for one in found["summary"]
    ]
    title = "By placement (policy + spare places per rank): in how many cases the bound is kept"
    put_section(console, title, ["kept", "worst", "mean", ""], summary)
    if found["moving"]:
        _show_moving(found["moving"], console)


def _show_moving(moving: Found, console: Console) -> None:
    """Experts placed once and anew while the load moves, with the bill."""
    title = (
        f"Where the load moves: experts placed anew every {moving['every']} of {moving['steps']} steps, by "
        f"the loads of the last {moving['window']}"
    )
    columns = [
        "tokens/s once",
        "anew",
        "gain",
        "p99 token once",
        "anew",
        "moved",
        "weights",
        "passes stopped",
    ]
    rows = [
        [f"{row['case']}  {row['placement']}  {row['transfer']}", *_moving_cells(row)]
        for row in moving["rows"]
    ]
    put_section(console, title, columns, rows)
    put_paragraph(
        console,
        "  ",
        "tokens/s / balanced; p99 token: from an output token to the next, stops included; moved: plans "
        "carried out of those made, and with them expert copies; stop: no pass while weights move; "
        "background: weights share the links with the passes",
    )


def _moving_cells(row: Found) -> list[str | Text]:
    if row["error"]:
        return [_help_cell(row), *("" for _ in range(6)), Text(_cut(row["error"]))]
    once, anew, bill = row["once"], row["anew"], row["bill"]
    return [
        _or_dash(said_ratio, once["against_balanced"]),
        _or_dash(said_ratio, anew["against_balanced"]),
        _or_dash(lambda gain: f"{gain:+.1%}", row["gain"]),
        _or_dash(said_time, once["p99_token"]),
        _or_dash(said_time, anew["p99_token"]),
        f"{bill['finished']} of {bill['planned']}, {bill['copies']}" if bill else "no plan",
        said_size(bill["bytes"]) if bill else "-",
        Text(f"{said_time(bill['stopped'])} ({bill['stopped_share'] or 0:.0%})" if bill else "-"),
    ]


def _cut(error: str) -> str:
    """What of an error fits behind a row: up to its first semicolon, and not endless."""
    text = printable(error).partition(";")[0]
    return text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]} ..."


def _help_cell(cell: Found) -> str:
    if cell["error"]:
        return "no fit" if cell["error"].startswith("does not fit") else "-"
    return f"{cell['against_balanced']['p99_step']:.2f}" + ("*" if cell["missed"] else " ")


def show_end(
    found: Found, console: Console, path: Path | None = None, parts: Sequence[str] = ("suite", "help")
) -> None:
    """What was done, the sentences on what stands out, and where the answer lies.

    parts  those that were shown; others of the answer are from earlier calls
    """
    suite = [row for row in found.get("suite", ()) if row["applies"]]
    if suite and "suite" in parts:
        show_columns(console)
        show_what(suite, console)
    elif found.get("help") and "help" in parts:
        show_what(found["help"]["rows"], console)
    elif "help" in parts and "help" in found.get("parts", ()) and not found["help"]:
        put_line(console, "No placement can help: the experts have no choice of ranks.")
    if found["notes"]:
        put_title(console, "Notes")
        for note in found["notes"]:
            put_paragraph(console, "  - ", note)
    if path is not None:
        put_line(console, "")
        put_line(console, f"Result: {path}")


def help_drawings(found: Found) -> dict[str, str]:
    """File name → SVG of the cases under every placement: by time, and by load."""
    helped = found["help"]
    if not helped:
        return {}
    kinds = {
        "placements.svg": (
            "p99 step",
            "p99 step / that under even load with the file's own placement",
            lambda cell: cell["against_balanced"]["p99_step"],
        ),
        "placements-load.svg": (
            "load of the busiest rank",
            "tokens of the busiest EP rank / mean, mean over layers",
            lambda cell: cell["imbalance"],
        ),
    }
    return {
        name: heatmap_svg(
            Heatmap(
                title=f"{found['name']}: {title}, cases under placements of experts",
                under=[_run_of(found), f"* and framed: misses the bound {found['slo']['text']}"],
                about="A row for each stress, a column for each expert policy with its spare places per "
                f"rank; the number is {value}. Framed cells miss the bound {found['slo']['text']}. "
                + " ".join(found["notes"]),
                x="expert policy + spare places per rank",
                y="case",
                columns=[place["placement"] for place in helped["placements"]],
                rows=[row["case"] for row in helped["rows"]],
                cells=[[_drawn(row["case"], cell, of) for cell in row["cells"]] for row in helped["rows"]],
                value=value,
            )
        )
        for name, (title, value, of) in kinds.items()
    }


def _run_of(found: Found) -> str:
    steps = found["decode_steps"]["run"]
    return f"seed {found['seed']}" + (f", {steps} decode steps per case" if steps else "")


def _drawn(case: str, cell: Found, of: Callable[[Found], float | None]) -> Cell:
    where = f"{case}, {cell['placement']}"
    if cell["error"]:
        return Cell(None, _help_cell(cell), f"{where}: {cell['error']}")
    value = of(cell)
    text = "-" if value is None else f"{value:.2f}"
    verdict = "missed" if cell["missed"] else "kept"
    title = f"{where}: {text}, p99 step {said_time(cell['p99_step'])}, bound {verdict}"
    return Cell(value, f"{text} *" if cell["missed"] else text, title, bool(cell["missed"]))


def show_map(found: Found, console: Console, path: Path | None = None) -> None:
    """A regime map as a grid: which deployment is better at each point, and by how much."""
    drawn = found["map"]
    for which in "ab":
        put_line(console, _named(drawn, which), "bold")
    steps = found["decode_steps"]
    if steps["run"] < steps["in_file"]:
        put_line(console, f"  {steps['run']} decode steps per case, the file's {steps['in_file']} cut short")
    put_line(console, f"  rows: {drawn['y']['what']}")
    put_line(console, f"  columns: {drawn['x']['what']}")
    rows = [
        [label, *(Text(_map_text(cell), _STYLES[cell["better"]]) for cell in row)]
        for label, row in zip(drawn["y"]["labels"], _grid(drawn), strict=True)
    ]
    put_section(console, "Which gives more tokens/s, and how many times as many", drawn["x"]["labels"], rows)
    show_end(found, console, path)


_STYLES = {"a": "cyan", "b": "yellow", "neither": "", "unknown": "dim"}


def _named(drawn: Found, which: str) -> str:
    base = drawn[which]
    return f"{which.upper()}: {base['what']}"


def _grid(drawn: Found) -> list[Sequence[Found]]:
    wide = len(drawn["x"]["values"])
    return [drawn["cells"][at : at + wide] for at in range(0, len(drawn["cells"]), wide)]


def _map_text(cell: Found) -> str:
    """`A 1.24`, `B 1.10`, `= 1.01`, or who runs alone."""
    ratio, better = cell["ratio"], cell["better"]
    if ratio is None:
        return "-" if better == "unknown" else f"{better.upper()} only"
    letter = {"a": "A", "b": "B", "neither": "="}[better]
    return f"{letter} {1 / ratio if better == 'b' else ratio:.2f}"


def map_drawing(found: Found) -> str:
    """The map as SVG: blue where the first deployment is better."""
    drawn = found["map"]
    a, b = (_named(drawn, which) for which in "ab")
    return heatmap_svg(
        Heatmap(
            title="Which gives more tokens/s, A or B",
            under=[a, b, f"rows: {drawn['y']['what']}", f"columns: {drawn['x']['what']}"],
            about=f"{a} against {b}; rows are {drawn['y']['what']}, columns {drawn['x']['what']}. "
            + " ".join(found["notes"]),
            x=drawn["x"]["what"],
            y=drawn["y"]["name"],
            columns=drawn["x"]["labels"],
            rows=drawn["y"]["labels"],
            cells=[[_map_cell(drawn, cell) for cell in row] for row in _grid(drawn)],
            value="tokens/s of A / those of B: above 1 A is better (blue), below 1 B (red)",
            larger_is_better=True,
        )
    )


def _map_cell(drawn: Found, cell: Found) -> Cell:
    where = f"{drawn['x']['name']} {cell['x']:g}, {drawn['y']['name']} {cell['y']:g}"
    told = [
        f"{which.upper()} {_or_dash(said_count, cell[which]['tokens_per_second'])} tokens/s"
        + (f" ({cell[which]['error']})" if cell[which]["error"] else "")
        for which in "ab"
    ]
    return Cell(cell["ratio"], _map_text(cell), f"{where}: {', '.join(told)}")


def show_row(kind: str, title: str | None, row: Any, console: Console) -> None:
    """A row of the answer as soon as it is known, a title before it if there is one."""
    if title is not None:
        put_title(console, title)
        if kind == "suite":
            show_suite_head(console)
    ROWS[kind](row, console)


#: Kind of row → what stands before the first.
TITLES: Mapping[str, str] = {
    "suite": "The suite, each case with the same random numbers",
    "breaking": "Where the bound breaks",
}
#: Kind of row → how it is shown when it comes.
ROWS: Mapping[str, Callable[[Any, Console], None]] = {
    "head": show_head,
    "suite": show_suite_row,
    "breaking": show_breaking_row,
    "help": show_help,
}
