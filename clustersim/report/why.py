"""Critical paths and bounds, for people at a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from clustersim.analysis.critical_path import CAUSES, Part, Path
from clustersim.analysis.path_groups import GROUPS, by_words, in_order
from clustersim.analysis.what_if import Bound
from clustersim.report.page import (
    Cell,
    put_line,
    put_paragraph,
    put_section,
    put_title,
    said_ratio,
    said_share,
    said_time,
)

#: Lines of a path in order of time, and of what stands out in it.
_LINES, _OUTSTANDING = 48, 8
#: Causes or operators named in a line.
_NAMED = 3


def show_path(path: Path, by: str, whole: bool, console: Console) -> None:
    """Prints what `critical_path` gives: by cause, what stands out, and in order of time.

    by       a key of path_groups.GROUPS, or "" for the order of time
    whole    every part on its own line
    """
    put_line(console, f"{path.what} {path.number}: why it took {said_time(path.latency)}", "bold")
    put_line(console, f"  from {said_time(path.start)} to {said_time(path.end)}; the parts add up to it")
    seconds = path.seconds()
    rows: list[list[Cell]] = [
        [cause, said_time(seconds[cause]), said_share(_share(seconds[cause], path)), Text(CAUSES[cause])]
        for cause in sorted(seconds, key=lambda cause: -seconds[cause])
    ]
    put_section(console, "By cause", ["time", "share", "what it is"], rows)
    if "bubble" in seconds:
        put_paragraph(console, "  ", f"in bubbles other stages did: {_named(path.in_bubbles())}")
    if whole:
        _show_parts(path, console)
        return
    if by:
        _show_groups(path, by, console)
        return
    told = by_words(path)[:_OUTSTANDING]
    if told:
        put_title(console, "What was waited for longest")
        for line in told:
            often = f" ({line.parts} x)" if line.parts > 1 else ""
            put_paragraph(console, "  - ", f"{said_time(line.seconds)}: {line.words}{often}")
    lines = in_order(path, _LINES)
    rows = [
        [_since(line.start, path), said_time(line.seconds), Text(line.where), Text(_named(line.causes))]
        for line in lines
    ]
    put_section(console, "In order", ["time", "where", "what"], rows)


def _show_groups(path: Path, by: str, console: Console) -> None:
    lines = GROUPS[by](path)
    first = [_key(path, line.where, by) for line in lines]
    rows: list[list[Cell]] = [
        [
            name, said_time(line.seconds), said_share(_share(line.seconds, path)), str(line.parts),
            Text(_named(line.does if by == "cause" else line.causes)),
        ]
        for name, line in zip(first, lines, strict=True)
    ]  # fmt: skip
    put_section(console, f"By {by}", ["time", "share", "parts", "what"], rows)


def _key(path: Path, where: str, by: str) -> str:
    if by != "cause":
        return where
    return next(cause for cause, meaning in CAUSES.items() if meaning == where)


def _show_parts(path: Path, console: Console) -> None:
    rows: list[list[Cell]] = [
        [_since(part.start, path), said_time(part.seconds), str(part.rank), str(part.layer), *_told(part)]
        for part in path.parts
    ]
    put_section(console, "Every part", ["time", "rank", "layer", "cause", "what"], rows)


def _since(start: float, path: Path) -> str:
    return f"+{said_time(start - path.start)}"


def _told(part: Part) -> tuple[Text, Text]:
    return Text(part.cause), Text(part.words)


def _share(seconds: float, path: Path) -> float:
    return seconds / path.latency if path.latency > 0 else 0.0


def _named(seconds: Mapping[str, float]) -> str:
    first = list(seconds.items())[:_NAMED]
    more = sum(list(seconds.values())[_NAMED:])
    said = [f"{name or 'before the first step'} {said_time(time)}" for name, time in first]
    return ", ".join([*said, f"others {said_time(more)}"] if more else said)


def show_shares(found: Mapping[str, Any] | None, console: Console) -> None:
    """Prints what `shares` gives; nothing where there is nothing."""
    if found is None:
        return
    mean, p99 = found["mean"], found["p99"]

    def told(one: Mapping[str, Any], cause: str) -> list[Cell]:
        seconds = one["by"].get(cause, 0.0)
        return [said_time(seconds), said_share(seconds / one["seconds"])]

    rows: list[list[Cell]] = [
        [cause, *told(mean, cause), *told(p99, cause), Text(meaning)]
        for cause, meaning in CAUSES.items()
        if cause in mean["by"] or cause in p99["by"]
    ]
    rows.append(["all", said_time(mean["seconds"]), "", said_time(p99["seconds"]), "", Text("")])
    put_section(
        console,
        "The critical path by cause",
        ["mean step", "share", f"p99 (step {p99['step']})", "share", ""],
        rows,
    )


def show_bounds(bounds: Sequence[Bound], unexplained: float, console: Console) -> None:
    """Prints what `bounds` gives.

    unexplained  s by which recorded times are off from what the graph says, at most
    """
    put_line(console, "Bounds: how much faster steps could be at most, were one thing away", "bold")
    kept = f"; what the graph does not explain keeps its length, {said_time(unexplained)} at most"
    about = "reckoned over the recorded graph, each by itself; no prediction of what a changed run would do"
    put_paragraph(console, "  ", about + (kept if unexplained > 0 else ""))
    rows = [
        [
            *(one.name, said_time(one.seconds), said_ratio(one.speedup), said_share(one.faster)),
            *(said_time(one.p99), said_share(one.of_p99)),
        ]
        for one in bounds
    ]
    columns = ["mean step", "speed-up", "at most faster", "p99 step", "at most faster"]
    put_section(console, "If it were away", columns, rows)
    put_title(console, "What they mean")
    for one in bounds:
        put_paragraph(console, "  - ", f"{one.name}: {one.words}.")


def show_checks(checks: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints what `study.bound_checks.check_bounds` gives."""
    put_line(console, "Bounds held against runs without what they take away", "bold")
    rows: list[list[Cell]] = [
        [
            one["name"], said_time(one["recorded"]), said_time(one["bound"]), said_time(one["run"]),
            f"{one['run'] / one['bound'] - 1:+.2%}", f"-{one['tolerance']:.0%}",
            Text("holds" if one["holds"] else "BROKEN"), Text(one["how"]),
        ]
        for one in checks
    ]  # fmt: skip
    columns = ["recorded", "bound", "run without", "above the bound", "allowed", "", "how it was run"]
    put_section(console, "Mean step", columns, rows)
