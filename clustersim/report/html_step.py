"""One step of a report: what some GPUs did in it, and its critical path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from clustersim.analysis.critical_path import Part
from clustersim.analysis.path_groups import by_words, in_order
from clustersim.report.html_content import Content, OneStep
from clustersim.report.html_parts import Figure, Missing, Section, Table, label, paragraph, time
from clustersim.report.html_plots import bars_in_time
from clustersim.report.page import said_share

#: Cause → what it is called in a figure.
CAUSE_NAMES = {
    "compute": "computing",
    "launch": "launching",
    "imbalance": "straggler: more work",
    "slow_gpu": "straggler: slow GPU",
    "queue": "behind other experts",
    "exchange": "bytes on links",
    "startup": "startup of exchanges",
    "bubble": "pipeline bubble",
    "admission": "admission",
    "unrecorded": "not recorded",
}
#: What a GPU does → its name in the legend, its colour, and the share of its row that it fills: told apart
#: also where colours are not.
_STATES = {
    "compute": ("computing", "compute", 0.8),
    "exchange": ("exchanging", "exchange", 0.8),
    "wait": ("waiting for others", "wait", 0.3),
}
_PATH = "critical path"
#: Lines of the path in the order of time, and of what was waited for.
_LINES, _OUTSTANDING = 40, 8
#: Parts of a path that are drawn one by one.
_PARTS = 2000


def one_step(content: Content) -> Section:
    """The section of the chosen step."""
    step = content.step
    if isinstance(step, Missing):
        return Section("step", "One step, GPU by GPU", [step])
    path = step.path
    title = f"Step {path.number}, GPU by GPU"
    parts: list[str | Table | Figure | Missing] = [
        paragraph(
            f"Step {path.number} ({step.phase}), {step.chosen}: from {time(path.start)} to {time(path.end)}, "
            f"that is {time(path.latency)}."
        ),
        _timeline(step),
    ]
    told = by_words(path)[:_OUTSTANDING]
    if told:
        rows = [
            [line.where, time(line.seconds), said_share(line.seconds / path.latency), f"{line.parts:,}"]
            for line in told
        ]
        parts += [
            "<h3>What was waited for longest</h3>",
            Table(["what", "time", "of the step", "how often"], rows),
        ]
    return Section("step", title, parts)


def _timeline(step: OneStep) -> Figure:
    path = step.path
    pieces = [*_on_gpus(step), *_on_path(path.parts, path.start)]
    rows = [_PATH, *dict.fromkeys(piece["row"] for piece in pieces if piece["row"] != _PATH)]
    seconds = path.seconds()
    longest = sorted(seconds, key=lambda cause: -seconds[cause])[:3]
    said = ", ".join(f"{CAUSE_NAMES[cause]} {said_share(seconds[cause] / path.latency)}" for cause in longest)
    merged = " Operators of a layer that follow each other are one bar." if step.merged else ""
    lines = in_order(path, _LINES)
    table = Table(
        ["since the beginning", "time", "where", "what stood in the way"],
        [
            [
                time(line.start - path.start),
                time(line.seconds),
                line.where,
                ", ".join(f"{CAUSE_NAMES[c]} {time(s)}" for c, s in list(line.causes.items())[:3]),
            ]
            for line in lines
        ],
        left=(0, 2, 3),
    )
    return Figure(
        "timeline",
        "What GPUs did, and the critical path",
        f"On top the critical path by cause ({said}); below what {len(step.ranks)} GPUs did: those most on "
        f"the path, and those that waited longest.{merged}",
        bars_in_time(pieces, rows, path.latency),
        table,
        zooms=True,
    )


def _on_path(parts: Sequence[Part], start: float) -> list[dict[str, Any]]:
    if len(parts) > _PARTS:
        runs = [list(run) for _, run in groupby(parts, key=lambda part: (part.cause, part.layer))]
    else:
        runs = [[part] for part in parts]
    return [
        {
            "row": _PATH,
            "name": f"{CAUSE_NAMES[run[0].cause]} ",
            # Computing and bytes on links have the colours of GPUs that compute and exchange.
            "told": run[0].cause not in _STATES,
            "colour": run[0].cause,
            "width": 0.8,
            "start": run[0].start - start,
            "seconds": sum(part.seconds for part in run),
            "words": _clause(max(run, key=lambda part: part.seconds)),
        }
        for run in runs
    ]


def _clause(part: Part) -> str:
    where = f"{part.operator}, layer {part.layer}" if part.layer >= 0 else part.operator
    rank = f", rank {part.rank}" if part.rank >= 0 else ""
    return label(f"{CAUSE_NAMES[part.cause]}: {where}{rank}")


def _on_gpus(step: OneStep) -> list[dict[str, Any]]:
    start, end = step.path.start, step.path.end
    order = {rank: place for place, rank in enumerate(step.ranks)}
    found = []
    for piece in sorted(step.pieces, key=lambda one: (order[one["rank"]], one["stream"] != "compute")):
        begin, finish = max(piece["start"], start), min(piece["end"], end)
        if finish <= begin:
            continue
        name, tint, width = _STATES[piece["state"]]
        beside = "" if piece["stream"] == "compute" else f", {piece['stream']}"
        found.append(
            {
                "row": label(f"{step.ranks[piece['rank']]}{beside}"),
                "name": name,
                "told": True,
                "colour": tint,
                "width": width,
                "start": begin - start,
                "seconds": finish - begin,
                "words": _said(piece),
            }
        )
    return found


def _said(piece: Mapping[str, Any]) -> str:
    layer = f", layer {piece['layer']}" if piece["layer"] >= 0 else ""
    awaited = piece["rank_awaited"]
    why = (
        "" if piece["state"] != "wait" else " waits" + (f" for rank {awaited}" if awaited is not None else "")
    )
    return label(f"{piece['operator']}{why}{layer}, token batch {piece['token_batch']}")
