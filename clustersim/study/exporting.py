"""One question: what does a result look like to other programs? Timelines and tables as files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustersim.analysis.chosen import Chosen, part_of, tables_of
from clustersim.analysis.latency import numbers
from clustersim.analysis.over_time import recorded, spans_of
from clustersim.analysis.timeline import timeline
from clustersim.analysis.timeline_parts import Timeline
from clustersim.errors import ClustersimError, ResultError, pick
from clustersim.report.timeline_chrome import chrome
from clustersim.report.timeline_perfetto import perfetto
from clustersim.study.inspecting import Opened
from clustersim.study.views import Times, rank_of, window_of
from clustersim.trace.csv import check_folder, check_place, write_folder, write_pieces
from clustersim.trace.record import Trace
from clustersim.units import show

#: Spans in one file, if nothing else is said: what viewers still move through without delay.
MOST = 1_000_000

_WHOLE = Times()
_RANGE = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be exported, as a user writes it.

    format  a key of FORMATS; "" is told by the end of the file's name, else perfetto
    times   from when to when
    gpus    ranks, ranges of ranks and vertices; none is all
    steps   numbers and ranges; none is all
    most    spans at most
    """

    format: str = ""
    times: Times = _WHOLE
    gpus: Sequence[str] = ()
    steps: Sequence[str] = ()
    most: int = MOST


def export(opened: Opened, wanted: Wanted, out: Path | None = None) -> dict[str, Any]:
    """Writes a file (csv: a folder), whole or not at all.

    out      where; None is a name of the result's own in the folder one is in
    Returns  path, format, window (s), bytes, what there is of everything, notes: what was left out
    Raises   ClustersimError for a wish that cannot be fulfilled; nothing is written then
    """
    form = _format(wanted.format, out)
    place = Path(f"{opened.folder.resolve().name}{_ENDINGS[form]}") if out is None else out
    if opened.folder.resolve() in (place.resolve(), *place.resolve().parents):
        raise ResultError(f"{place}: lies in the result that is read; name a place outside")
    chosen = _chosen(opened.trace, wanted)
    if form != "csv":
        # A timeline without spans shows nothing; the tables hold the sums all the same.
        spans_of(opened.trace)
    found = FORMATS[form](opened.trace, chosen, place)
    found["notes"] = [*found["notes"], *_unrecorded(opened.trace, found["window"])]
    size = sum(path.stat().st_size for path in ([*place.iterdir()] if place.is_dir() else [place]))
    return {"path": str(place), "format": form, "folder": str(opened.folder), "bytes": size, **found}


def _drawn(encode: Callable[[Timeline], Iterator[bytes]]) -> Callable[[Trace, Chosen, Path], dict[str, Any]]:
    """Writes a timeline in one file."""

    def write(trace: Trace, chosen: Chosen, place: Path) -> dict[str, Any]:
        check_place(place)
        drawn = timeline(trace, chosen)
        write_pieces(place, encode(drawn))
        return {
            "window": list(drawn.window),
            "spans": drawn.spans,
            "slices": len(drawn.run) + len(drawn.streams) + len(drawn.links),
            "arrows": len(drawn.arrows),
            "points": len(drawn.counters),
            "notes": list(drawn.notes),
        }

    return write


def _tables(trace: Trace, chosen: Chosen, place: Path) -> dict[str, Any]:
    """Writes a folder with one file per table."""
    check_folder(place, trace.tables)
    part = part_of(trace, chosen)
    tables, notes = tables_of(trace, chosen, part)
    write_folder(place, tables)
    rows = {table: len(next(iter(columns.values()))) for table, columns in tables.items()}
    return {"window": list(part.window), "spans": rows["spans"], "rows": rows, "notes": notes}


#: How a result may be exported.
FORMATS: Mapping[str, Callable[[Trace, Chosen, Path], dict[str, Any]]] = {
    "perfetto": _drawn(perfetto),
    "chrome": _drawn(chrome),
    "csv": _tables,
}
#: Format → what is put behind the result's name where no other is given.
_ENDINGS = {"perfetto": ".pftrace.gz", "chrome": ".json.gz", "csv": "-csv"}


def _format(name: str, out: Path | None) -> str:
    if name:
        pick(FORMATS, name, "--format")
        return name
    return "chrome" if out is not None and out.name.endswith((".json", ".json.gz")) else "perfetto"


def _chosen(trace: Trace, wanted: Wanted) -> Chosen:
    ranks = [rank for word in _words(wanted.gpus) for rank in _ranks(trace, word)]
    steps = [step for word in _words(wanted.steps) for step in _steps(trace, word)]
    return Chosen(
        window_of(trace, wanted.times),
        sorted(set(ranks)) or None,
        sorted(set(steps)) or None,
        wanted.most,
    )


def _words(lists: Sequence[str]) -> list[str]:
    return [word.strip() for one in lists for word in one.split(",") if word.strip()]


def _ranks(trace: Trace, word: str) -> list[int]:
    """Ranks of `0-7`, `3`, or a vertex."""
    span = _RANGE.fullmatch(word)
    if not span:
        return [rank_of(trace, word, "--gpus")]
    first, last = (rank_of(trace, number, "--gpus") for number in span.groups())
    if first > last:
        raise ClustersimError(f"--gpus: {word} is empty; write {last}-{first}")
    known = numbers(trace.tables["ranks"], "rank")
    return [int(rank) for rank in known[(known >= first) & (known <= last)]]


def _steps(trace: Trace, word: str) -> list[int]:
    """Steps of `0-7` or `3`."""
    known = numbers(trace.tables["steps"], "step").tolist()
    span = _RANGE.fullmatch(word)
    numbers_ = span.groups() if span else (word,)
    for number in numbers_:
        if not number.isdecimal() or int(number) not in known:
            there = f"0 to {max(known)}" if len(known) > 1 else "step 0 alone"
            raise ClustersimError(f"--steps: there is no step {number}; there is {there}, written 0,2 or 0-3")
    first, last = int(numbers_[0]), int(numbers_[-1])
    if first > last:
        raise ClustersimError(f"--steps: {word} is empty; write {last}-{first}")
    return list(range(first, last + 1))


def _unrecorded(trace: Trace, window: Sequence[float]) -> list[str]:
    """What is missing because it was never recorded."""
    notes = []
    begin, end = recorded(trace)
    if begin >= end:
        notes.append("no spans were recorded: run the scenario with --set trace.level=spans")
    elif begin > window[0] or window[1] > end:
        first, last = (show(time, "time") for time in (max(begin, 0.0), min(end, window[1])))
        notes.append(f"spans were recorded from {first} to {last} only (trace.steps, trace.window)")
    if numbers(trace.tables["links"], "bytes").any() and not len(numbers(trace.tables["link_use"], "link")):
        notes.append(
            "an older version recorded this result, without link utilization over time and KV memory"
        )
    return notes
