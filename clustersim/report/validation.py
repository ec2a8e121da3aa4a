"""Predicted against measured, for people: errors by file and class, examples, leave-one-out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from clustersim.report.page import (
    put_line,
    put_paragraph,
    put_section,
    said_or_dash,
    said_share,
    said_size,
    said_time,
)

Found = Mapping[str, Any]


def show_validation(found: Found, console: Console) -> None:
    """Prints what `study.validate.validate_network` gives."""
    put_line(console, "network: predicted against measured", "bold")
    put_paragraph(console, "  ", boundary_sentence(found))
    _judged(found, console)
    _left_out(found, console)
    for file in found["files"]:
        _classes(file, console)
    for file in found["files"]:
        _examples(file, console)
    _foretold(found, console)
    _influences(found, console)
    put_line(console, "")
    put_line(console, "within the stated errors" if found["kept"] else "OUTSIDE of the stated errors", "bold")


def boundary_sentence(found: Found) -> str:
    """What the two size classes are, and the goals."""
    wide, small = found["goals"]["bandwidth"], found["goals"]["latency"]
    return (
        f"A row is ruled by bandwidth where its busiest port is busy at the data sheet's rate for at least "
        f"{found['boundary']:.0%} of the measured time, else by latency. Goals: bandwidth median within "
        f"{wide['median']:.0%} and 90th percentile within {wide['p90']:.0%}; latency median within "
        f"{small['median']:.0%}."
    )


def _errors(one: Found) -> list[str]:
    return [
        f"{one['rows']:,}",
        said_or_dash(said_share, one["median"]),
        said_or_dash(said_share, one["p90"]),
        said_or_dash(lambda ratio: f"{ratio:.2f}", one["ratio"]),
    ]


_ERRORS = ("rows", "median", "p90", "ratio")


def _judged(found: Found, console: Console) -> None:
    rows = [
        [file["file"], Text(one["ruled"]), *_errors(one), said_share(fitted_share(file)), Text(_verdict(one))]
        for file in found["files"]
        for one in file["judged"]
        if one["rows"]
    ]
    put_section(
        console, "By file: absolute relative error, predicted / measured", ("", *_ERRORS, "fitted", ""), rows
    )


def fitted_share(file: Found) -> float:
    """Share of a file's predicted times that the fit has seen: the errors of these are no forecast."""
    return float(file["fitted"] / max(file["predicted"]["rows"], 1))


def _verdict(one: Found) -> str:
    if one["met"]:
        return "goal met"
    return f"goal missed: {one['why_missed']}" if one["kept"] else "GOAL MISSED"


def _classes(file: Found, console: Console) -> None:
    rows = [
        [one["kind"], Text(one["ruled"]), Text(f"{one['gpus']} GPUs"), *_errors(one)]
        for one in file["classes"]
    ]
    put_section(console, rows_sentence(file), ("", "", *_ERRORS), rows)
    for which, why in file["not_fitted"].items():
        put_paragraph(console, "  ", f"not fitted: {which}: {why}")


def rows_sentence(file: Found) -> str:
    """How many rows a file has, and of how many times in them the model speaks; a row may hold several."""
    predicted, fitted = file["predicted"]["rows"], file["fitted"]
    return f"{file['file']}: {file['rows']:,} rows, {predicted:,} times predicted, {fitted:,} of them fitted"


def _examples(file: Found, console: Console) -> None:
    rows = [
        [
            one["kind"],
            Text(f"{one['gpus']} GPUs"),
            said_size(one["size"]),
            said_time(one["measured"]),
            said_time(one["predicted"]),
            f"{one['error']:+.0%}",
            Text(one["choice"]),
            Text(one["what"]),
        ]
        for one in file["examples"]
    ]
    columns = ("", "size", "measured", "predicted", "error", "algorithm", "")
    put_section(console, f"{file['file']}: examples", columns, rows)


def _left_out(found: Found, console: Console) -> None:
    rows = [
        [
            one["file"],
            *_errors(one["all_files"])[1:3],
            *_errors(one["without_it"])[1:3],
            said_or_dash(said_share, one["others_move"]["median"]),
            said_or_dash(said_share, one["others_move"]["p90"]),
            Text("" if one["holds"] else "MORE THAN ITS OWN ERROR"),
        ]
        for one in found["leave_one_out"]
    ]
    columns = ("median", "p90", "median", "p90", "median", "p90", "")
    title = "Leave one file out: its errors with all files, its errors without it, how far the others move"
    put_section(console, title, columns, rows)


def _foretold(found: Found, console: Console) -> None:
    rows = [
        [
            one["name"],
            *_errors(one)[:3],
            said_share(one["most"]),
            _errors(one)[3],
            Text("" if one["goal"] is None else "goal met" if one["kept"] else "GOAL MISSED"),
        ]
        for one in found["foretold"]
    ]
    columns = ("rows", "median", "p90", "most", "ratio", "")
    put_section(console, "Expert exchanges foretold by fits that have not seen them", columns, rows)


def _influences(found: Found, console: Console) -> None:
    rows = [
        [
            one["file"],
            f"{one['touched']:,}",
            *(said_share(one[name]) for name in ("off", "moved", "most")),
            Text("moves less than it is off" if one["kept"] else "MOVES MORE THAN IT IS OFF"),
        ]
        for one in found["influences"]
        if one["touched"]
    ]
    title = "Expert exchanges: leave one file out; rows of other files that its libraries share"
    put_section(console, title, ("rows", "off by", "move by", "most", ""), rows)
