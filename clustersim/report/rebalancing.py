"""What `clustersim rebalance` found, for people at a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from clustersim.report.page import (
    put_line,
    put_paragraph,
    put_section,
    put_title,
    said_count,
    said_or_dash,
    said_size,
    said_time,
)

Found = Mapping[str, Any]

_PLAN = {"anew": "made anew", "amended": "amended"}
_TRANSFER = {"stop": "while passes stop", "background": "beside the passes"}


def show_head(head: Found, notes: Sequence[str], console: Console) -> None:
    """Prints what is going to be tried, and what should be known of it."""
    put_line(console, f"{head['name']}: experts placed anew, or left where they are", "bold")
    seeds = head["seeds"]
    said = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    put_paragraph(
        console,
        "  ",
        f'policy "{head["policy"]}", popularity {head["motion"]}, {head["steps"]:,} steps, {said}; plans '
        f"{_PLAN[head['plan']]} by the loads of {head['window']} steps, planning takes "
        f"{said_time(head['planning_time'])}, weights move {_TRANSFER[head['transfer']]}",
    )
    for note in notes:
        put_paragraph(console, "  - ", note)


def show_rebalancing(found: Found, console: Console, folder: Path | None = None) -> None:
    """Prints what `study.rebalancing.answer` gives; the answer itself stands last."""
    rows = [case for case in found["cases"] if case["tokens_per_second"] is not None]
    kind = "token" if any(case["token"] for case in rows) else "ttft"
    name = "token" if kind == "token" else "TTFT"
    columns = ("spare", "tokens/s", "gain", "load", "moved", "weights", "stopped", f"p99 {name}", "longest")
    title = "Every so many steps" + ("" if found["complete"] else ", so far")
    put_section(console, title, columns, [_row(case, kind) for case in rows])
    if rows:
        put_paragraph(console, "  ", _LEGEND[kind])
    failed = [case for case in found["cases"] if case["error"]]
    if failed:
        put_title(console, "Not run")
        for case in failed:
            put_paragraph(console, "  - ", f"{_every(case)}, {case['spare']} spare: {case['error']}")
    if found["idle"]:
        put_title(console, "Why nothing moved")
        for sentence in found["idle"]:
            put_paragraph(console, "  - ", sentence)
    put_title(console, "Is it worth it?")
    put_paragraph(console, "  ", found["answer"])
    if folder is not None:
        put_line(console, "")
        put_line(console, f"Result: {folder}")


_GAIN = (
    "gain: tokens/s against the best row that never moves anything; load: busiest / mean rank; moved: of so "
    "many plans; "
)
_LEGEND = {
    "token": f"{_GAIN}p99 token, longest: from one output token of a sequence to its next, stops included",
    "ttft": f"{_GAIN}p99 TTFT, longest: from arrival to the first token, stops included",
}


def _every(case: Found) -> str:
    if case["stated"]:
        return f"never, {case['policy']}"
    return f"{case['every']:,}" if case["every"] else "never"


def _row(case: Found, kind: str) -> list[str]:
    tail = case[kind] or {"p99": None, "max": None}
    moved = f"{case['moved']:.3g} of {case['planned']:.3g}" if case["every"] else "-"
    return [
        _every(case),
        str(case["spare"]),
        said_count(case["tokens_per_second"]),
        _gain(case),
        f"{case['imbalance']['mean']:.2f} x",
        moved,
        said_size(case["bytes"]),
        said_time(case["stopped"]),
        said_or_dash(said_time, tail["p99"]),
        said_or_dash(said_time, tail["max"]),
    ]


def _gain(case: Found) -> str:
    gain = case["gain"]
    if gain is None or not any(gain["each"]):
        # Itself, or a row that moved nothing: the same run, not a gain of nothing.
        return "-" if gain is None else "0"
    margin = "" if gain["margin"] is None else f" ± {gain['margin']:.1%}"
    # Adding nothing takes the sign from what rounds to nothing.
    return f"{round(gain['mean'], 3) + 0.0:+.1%}{margin}"
