"""One question: what happened in a run, and why? Answered with one page that needs nothing else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from clustersim.analysis import over_time
from clustersim.analysis.critical_path import Path as CriticalPath
from clustersim.analysis.critical_path import Paths
from clustersim.analysis.expert_map import expert_map
from clustersim.analysis.expert_queues import copies
from clustersim.analysis.latency import numbers, samples, words
from clustersim.analysis.prices import by_operator
from clustersim.analysis.recomputing import Graph
from clustersim.analysis.slices import slice_of
from clustersim.analysis.stragglers import stragglers
from clustersim.analysis.utilization import STATES
from clustersim.analysis.what_if import bounds_of
from clustersim.errors import NotRecordedError, ResultError
from clustersim.report.html_content import Bounds, Content, Load, OneStep
from clustersim.report.html_parts import Missing
from clustersim.report.html_report import report_page
from clustersim.study.inspecting import Opened
from clustersim.study.views import rank_of
from clustersim.trace.record import Columns, Text, Trace

#: The name of a report in its result folder.
REPORT = "report.html"

#: Cells of all heat maps of GPUs together, rows and columns of one: what a page can hold and a screen show.
_CELLS, _MOST_ROWS, _MOST_BINS = 300_000, 1024, 500
#: A step that takes more of a run than this is seen well enough in the whole run.
_OF_THE_RUN = 0.5
#: GPUs of a timeline, those of them that were held up, and pieces that are drawn one by one.
_RANKS, _HELD_UP, _PIECES = 8, 2, 6000

_DESCRIPTION = re.compile(r'^description = (".*")$', re.M)

Found = TypeVar("Found")


def write_report(
    opened: Opened, out: Path | None = None, step: int | None = None, gpus: Sequence[str] = ()
) -> Path:
    """Writes the report of a result, whole or not at all.

    out      the file; None is report.html in the result folder
    step     whose timeline is drawn; None is the slowest that was recorded
    gpus     ranks or vertices whose timeline is drawn; () are those that explain the step
    Returns  where it lies
    Raises   ClustersimError where there is no such step or GPU, or the file cannot be written
    """
    place = opened.folder / REPORT if out is None else out
    _check_place(place)
    page = report_page(content_of(opened, step, gpus))
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        beside.write_text(page, encoding="utf-8", newline="\n")
        os.replace(beside, place)
    except OSError as error:
        raise _unwritable(place, error) from error
    finally:
        beside.unlink(missing_ok=True)
    return place


def _check_place(place: Path) -> None:
    """Raises ResultError where something else than a page lies, or no file can."""
    try:
        if place.is_dir():
            raise ResultError(f"{place}: is a folder; name a file, such as {place / REPORT}")
        if not place.parent.is_dir():
            raise ResultError(f"{place}: there is no folder {place.parent}")
        if place.exists():
            with place.open("rb") as file:
                begin = file.read(9)
            if begin and begin.lower() != b"<!doctype":
                raise ResultError(f"{place}: is no page, and is not replaced by a report")
    except OSError as error:
        raise _unwritable(place, error) from error


def _unwritable(place: Path, error: OSError) -> ResultError:
    return ResultError(f"{place}: cannot be written: {error.strerror or error}")


def content_of(opened: Opened, step: int | None = None, gpus: Sequence[str] = ()) -> Content:
    """What the report of a result shows; otherwise as `write_report`."""
    trace, summary = opened.trace, opened.summary
    chosen = _step(trace, step, [rank_of(trace, name) for name in gpus])
    found = expert_map(trace)
    none = Missing("No expert was at work in this run.")
    return Content(
        name=str(summary["name"]),
        folder=opened.folder.name,
        about=_description(opened),
        gpu=str(trace.facts.get("gpu_model") or ""),
        summary=summary,
        scenario=opened.scenario_text,
        samples=samples(trace),
        shares=_or_missing(lambda: _shares(trace)),
        bounds=_or_missing(lambda: _bounds(trace)),
        step=chosen,
        load=_or_missing(lambda: _load(trace, chosen)),
        links=_or_missing(lambda: over_time.link_use(trace, _MOST_BINS)),
        waits=_waits(trace.tables["token_waits"]),
        experts=none if found is None else (found, copies(trace)),
        stragglers=stragglers(trace),
        prices=by_operator(trace),
        faults=_rows(trace.tables["faults"]),
        outages=_outages(trace),
        rebalances=_rows(trace.tables["rebalances"]),
        placements=_placements(trace),
    )


def _or_missing(ask: Callable[[], Found]) -> Found | Missing:
    """The answer, or what the result lacks for it."""
    try:
        return ask()
    except NotRecordedError as error:
        said = str(error)
        return Missing(said[:1].upper() + said[1:] + ("" if said.endswith(".") else "."))


def _description(opened: Opened) -> str:
    """What the scenario says it is; its text is TOML of our own writing, in which text is as in JSON."""
    found = _DESCRIPTION.search(opened.scenario_text)
    try:
        return str(json.loads(found.group(1))) if found else ""
    except ValueError:
        return ""


def _shares(trace: Trace) -> Mapping[str, Any]:
    found = Paths(trace).shares()
    if found is None:
        raise NotRecordedError("no step was recorded to its end, so none has a critical path")
    return found


def _bounds(trace: Trace) -> Bounds:
    graph = Graph(trace)
    return Bounds(bounds_of(graph), graph.unexplained())


# ---- one step -----------------------------------------------------------------------------------


def _step(trace: Trace, asked: int | None, gpus: Sequence[int]) -> OneStep | Missing:
    """The step that was asked for, else the slowest of those whose last pass has spans."""
    if asked is None:
        return _or_missing(lambda: _told(trace, _slowest(trace), "the slowest", gpus))
    return _told(trace, asked, "as asked for", gpus)


def _slowest(trace: Trace) -> int:
    steps, known = trace.tables["steps"], Paths(trace).recorded_steps()
    if not known:
        raise NotRecordedError("no spans of a finished step were recorded, so none can be drawn")
    number, took = numbers(steps, "step"), numbers(steps, "end") - numbers(steps, "start")
    some = np.flatnonzero(np.isin(number, known))
    return int(number[some[int(np.argmax(took[some]))]])


def _told(trace: Trace, number: int, chosen: str, gpus: Sequence[int]) -> OneStep:
    path = Paths(trace).step(number)
    if not path.latency > 0:
        raise NotRecordedError(f"step {number} took no time, so there is nothing to draw")
    steps = trace.tables["steps"]
    row = int(np.argmax(numbers(steps, "step") == number))
    ranks = list(dict.fromkeys(gpus)) or _explaining(trace, path)
    pieces = [
        piece for piece in slice_of(trace, ranks, (path.start, path.end)) if piece["end"] > piece["start"]
    ]
    merged = len(pieces) > _PIECES
    names = _names(trace)
    said = {rank: f"rank {rank} ({names[rank]})" for rank in ranks}
    pieces = _merged(pieces) if merged else pieces
    return OneStep(path, str(words(steps, "phase")[row]), chosen, said, pieces, merged)


def _explaining(trace: Trace, path: CriticalPath) -> list[int]:
    """The ranks that are longest on the path, of every stage one if there is room, and those that waited
    longest; in the order of stages and ranks."""
    table = trace.tables["ranks"]
    stage_of = dict(zip(numbers(table, "rank").tolist(), numbers(table, "stage").tolist(), strict=True))
    on_path: dict[int, float] = {}
    for part in path.parts:
        if part.rank >= 0:
            on_path[part.rank] = on_path.get(part.rank, 0.0) + part.seconds
    order = sorted(on_path, key=lambda rank: (-on_path[rank], rank))
    best_of_stage = list({stage_of[rank]: rank for rank in reversed(order)}.values())
    waited = over_time.gpu_use(trace, 1, (path.start, path.end)).shares[:, 0, STATES.index("wait")]
    held_up = np.argsort(-np.nan_to_num(waited), kind="stable")
    first = list(dict.fromkeys([*sorted(best_of_stage, key=order.index), *order]))[: _RANKS - _HELD_UP]
    others = [int(rank) for rank in held_up if int(rank) in stage_of and int(rank) not in first]
    chosen = [*first, *others[: _RANKS - len(first)]]
    return sorted(chosen, key=lambda rank: (stage_of[rank], rank))


def _merged(pieces: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Pieces of a stream that follow each other in one state and layer as one."""

    def place(piece: Mapping[str, Any]) -> tuple[Any, ...]:
        return piece["rank"], piece["stream"]

    def alike(piece: Mapping[str, Any]) -> tuple[Any, ...]:
        return piece["state"], piece["layer"], piece["token_batch"]

    found = []
    ordered = sorted(pieces, key=lambda piece: (*place(piece), piece["start"], piece["end"]))
    for _, stream in groupby(ordered, key=place):
        for _, run in groupby(stream, key=alike):
            held = list(run)
            name = (
                held[0]["operator"] if len(held) == 1 else f"{held[0]['operator']} to {held[-1]['operator']}"
            )
            found.append({**held[0], "operator": name, "end": held[-1]["end"]})
    return found


# ---- GPUs ---------------------------------------------------------------------------------------


def _load(trace: Trace, step: OneStep | Missing) -> Load:
    """GPUs over the run, and over the step where that is a small part of it."""
    end = float(trace.facts["simulated_seconds"])
    windows: dict[str, over_time.Window | None] = {"whole run": None}
    if not isinstance(step, Missing) and step.path.latency < _OF_THE_RUN * end:
        windows[f"step {step.path.number}"] = step.path.start, step.path.end
    ranks = trace.tables["ranks"]
    size = int(numbers(ranks, "rank").max(initial=-1)) + 1
    each = -(-size // _MOST_ROWS)
    rows = -(-size // each)
    bins = int(np.clip(_CELLS // (rows * len(windows)), 40, _MOST_BINS))
    uses = {name: _taken_together(over_time.gpu_use(trace, bins, at), each) for name, at in windows.items()}
    names = _names(trace)
    labels = [
        f"rank {row} ({names.get(row, '')})"
        if each == 1
        else f"ranks {row * each} to {min((row + 1) * each, size) - 1}"
        for row in range(rows)
    ]
    return Load(uses, labels, each, _stages(trace))


def _taken_together(use: over_time.GpuUse, each: int) -> over_time.GpuUse:
    """Means over so many rows that follow each other."""
    if each == 1:
        return use
    starts = np.arange(0, len(use.shares), each)
    sums = np.add.reduceat(use.shares, starts, axis=0)
    counts = np.diff(starts, append=len(use.shares))
    return over_time.GpuUse(use.edges, sums / counts[:, None, None])


def _stages(trace: Trace) -> list[tuple[float, str]]:
    """(rank behind which a stage ends, its name), where the ranks of every stage follow each other."""
    table = trace.tables["ranks"]
    order = np.argsort(numbers(table, "rank"))
    stage = numbers(table, "stage")[order]
    ends = np.append(np.flatnonzero(np.diff(stage)), len(stage) - 1)
    if not len(stage) or len(ends) != len(np.unique(stage)):
        return []
    return [(float(end) + 0.5, f"stage {int(stage[end])}") for end in ends]


def _names(trace: Trace) -> dict[int, str]:
    ranks = trace.tables["ranks"]
    return dict(zip(numbers(ranks, "rank").tolist(), words(ranks, "gpu").tolist(), strict=True))


# ---- tables -------------------------------------------------------------------------------------


def _waits(table: Columns) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    phase, wait, tokens = words(table, "phase"), numbers(table, "wait"), numbers(table, "tokens")
    return {
        str(name): (wait[rows], tokens[rows])
        for name in dict.fromkeys(phase)
        if tokens[rows := phase == name].sum() > 0
    }


def _rows(table: Columns) -> list[dict[str, Any]]:
    """A small table, row by row."""
    columns = {
        name: (column.rows() if isinstance(column, Text) else column).tolist()
        for name, column in table.items()
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _outages(trace: Trace) -> list[dict[str, Any]]:
    links = trace.tables["links"]
    ends = zip(words(links, "source"), words(links, "target"), strict=True)
    names = dict(zip(numbers(links, "link").tolist(), (f"{a}->{b}" for a, b in ends), strict=True))
    return [{**row, "link": names[row["link"]]} for row in _rows(trace.tables["outages"])]


def _placements(trace: Trace) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """When token batches began and how uneven they were, as placed and at the first places."""
    table, passes = trace.tables["placements"], trace.tables["token_batches"]
    mean = numbers(table, "mean")
    some = mean > 0
    if not some.any():
        return None
    batch, member = np.unique(numbers(table, "token_batch")[some], return_inverse=True)
    many = np.bincount(member)
    now, first = (
        np.bincount(member, weights=numbers(table, name)[some] / mean[some]) / many
        for name in ("busiest", "first")
    )
    number, start = numbers(passes, "token_batch"), numbers(passes, "start")
    order = np.argsort(number, kind="stable")
    at = np.searchsorted(number, batch, sorter=order).clip(max=len(number) - 1)
    known = number[order[at]] == batch
    return start[order[at]][known], now[known], first[known]
