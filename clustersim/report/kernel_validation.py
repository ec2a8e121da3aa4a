"""Predicted against measured kernels, for people: goals, tables, classes, transfers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from clustersim.report.page import (
    Cell,
    put_line,
    put_paragraph,
    put_section,
    said_or_dash,
    said_share,
)

Found = Mapping[str, Any]

#: What a class is of → the title of its table.
CLASSES = {
    "kernel": "By kernel",
    "gpu": "By GPU",
    "library": "By library",
    "size": "By measured time",
    "load": "By load of the experts",
}


def show_kernel_validation(found: Found, console: Console) -> None:
    """Prints what `study.validate_kernels.validate_kernels` gives."""
    put_line(console, "kernels: predicted against measured", "bold")
    for sentence in sentences(found):
        put_paragraph(console, "  ", sentence)
    _judged(found, console)
    _keys(found, console)
    for what, title in CLASSES.items():
        rows = [
            [one["operator"], Text(str(one[what])), *errors(one)]
            for one in found["classes"][what]
            if one[what]
        ]
        put_section(console, title, ("", *ERRORS), rows)
    _skew(found, console)
    _transfer(found, console)
    _not_fitted(found, console)
    put_line(console, "")
    put_line(console, "within the stated errors" if found["kept"] else "OUTSIDE of the stated errors", "bold")


def sentences(found: Found) -> list[str]:
    """How the errors were found, and the goals."""
    if found["judged_by"] == "left_out":
        how = (
            "Every call is priced by a fit that has not seen its shape: parameters are fitted without a part "
            "of the shapes, and curves are laid without each shape in turn."
        )
    else:
        how = (
            "Quick: calls are priced as they ship, by curves that go through them. That checks the tables; "
            "it is no forecast."
        )
    goals = "; ".join(
        f"{name} median within {goal['median']:.0%} and 90th percentile within {goal['p90']:.0%}"
        for name, goal in found["goals"].items()
        if goal
    )
    without = ", ".join(name for name, goal in found["goals"].items() if not goal)
    return [how, f"Goals: {goals}. None for {without}: a launch each, a few percent of a pass."]


ERRORS = ("calls", "median", "p90", "ratio")


def errors(one: Found) -> list[str]:
    """Calls, median, p90 and ratio for people."""
    return [
        f"{one['rows']:,}",
        said_or_dash(said_share, one["median"]),
        said_or_dash(said_share, one["p90"]),
        said_or_dash(lambda ratio: f"{ratio:.2f}", one["ratio"]),
    ]


def verdict(one: Found) -> str:
    """Whether a goal is met, and why not."""
    if not one["goal"]:
        return ""
    if one["met"]:
        return "goal met"
    return f"goal missed: {one['why_missed']}" if one["kept"] and one["why_missed"] else "GOAL MISSED"


def _judged(found: Found, console: Console) -> None:
    rows: list[list[Cell]] = [
        [
            one["file"] or "all files",
            Text(f"{one['operator']} {one['load']}".strip()),
            *errors(one),
            Text(verdict(one)),
        ]
        for one in found["judged"]
    ]
    put_section(console, "By file: absolute relative error, predicted / measured", ("", *ERRORS, ""), rows)


def _keys(found: Found, console: Console) -> None:
    rows: list[list[Cell]] = [
        [
            one["kernel"],
            Text(one["gpu"]),
            Text(one["format"]),
            Text(one["library"]),
            *errors(one["formula"])[:3],
            *errors(one["left_out"])[1:3],
            *errors(one["shipped"])[1:3],
        ]
        for one in found["keys"]
    ]
    title = "By table: the formula alone, shapes left out, and as shipped"
    columns = ("", "", "", "calls", "formula", "p90", "left out", "p90", "shipped", "p90")
    put_section(console, title, columns, rows)


def skew_rows(found: Found) -> list[list[str]]:
    """Ratio of uneven to even load, class, calls, measured ratio, errors and verdict, for people."""
    return [
        [
            one["name"],
            one["class"],
            f"{one['rows']:,}",
            f"{one['measured']:.2f}",
            *errors(one)[1:],
            said_share(one["within"]),
            ("goal met" if one["met"] else "GOAL MISSED") if one["goal"] else "",
        ]
        for one in found["skew"]["ratios"]
    ]


def skew_sentences(found: Found) -> list[str]:
    """What the ratios are, from which batch on skew costs, and what is known of their misses."""
    skew = found["skew"]
    share = said_share(skew["goal"])
    crossings = [
        f"{one['name']}: the batch from which on skew costs more than {skew['felt'] - 1:.0%} is off by "
        f"{one['octaves']:.1f} powers of two (median of {one['lines']} layers and EP; of {one['one_sided']} "
        "more either the measured or the predicted times have such a batch, not both)."
        for one in skew["crossings"]
    ]
    about = (
        "Time of the hottest rank under uneven load / under even load, predicted against measured. Goal: "
        f"median within {share}; `within` is the share of calls that are. Each call is one random draw of "
        "the benchmark, which scatters by 3 to 8 %. Ratios to another library's balanced layers also hold "
        "how their kernels differ."
    )
    return [about, *crossings, *skew["remarks"]]


SKEW = ("", "calls", "measured", "median", "p90", "ratio", "within", "")


def _skew(found: Found, console: Console) -> None:
    if not found["skew"]["ratios"]:
        return
    rows: list[list[Cell]] = [[row[0], *(Text(cell) for cell in row[1:])] for row in skew_rows(found)]
    put_section(console, "What skew costs: uneven / even load", SKEW, rows)
    for sentence in skew_sentences(found):
        put_paragraph(console, "  ", sentence)


def _transfer(found: Found, console: Console) -> None:
    rows: list[list[Cell]] = [
        [one["kernel"], Text(one["format"]), Text(one["of"]), Text(said_by(one)), *errors(one)]
        for one in found["transfer"]
    ]
    title = "Calls of one GPU by what was measured on another, for information"
    put_section(console, title, ("", "GPU", "priced by", *ERRORS), rows)


def said_by(one: Found) -> str:
    """The GPU whose tables priced another, and whether the catalogue calls it the other's relative."""
    return f"{one['by']} (relative)" if one["relative"] else str(one["by"])


def _not_fitted(found: Found, console: Console) -> None:
    for one in found["not_fitted"]:
        put_paragraph(
            console, "  ", f"not fitted: {one['file']}, {one['kernel']}, {one['rows']:,}: {one['why']}"
        )
