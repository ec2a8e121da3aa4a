"""What can be seen in a result: each view as JSON values in SI units, shares as fractions of one.

Nothing is run; a view reads the columns it needs from the result folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from clustersim.analysis import expert_queues, over_time
from clustersim.analysis import stragglers as blame
from clustersim.analysis.columns import text
from clustersim.analysis.latency import numbers, words
from clustersim.analysis.query import MOST_ROWS, SECONDS, named_tables, query
from clustersim.analysis.slices import slice_of
from clustersim.analysis.span_blocks import spans_of, whole_steps
from clustersim.analysis.utilization import STATES, busiest, gpus, links, tiers, worst
from clustersim.errors import ClustersimError, ResultError, UnitError, nearest, pick
from clustersim.study.inspecting import Opened
from clustersim.trace.files import read_facts
from clustersim.trace.plain import plain
from clustersim.trace.record import Trace
from clustersim.trace.results import TRACE
from clustersim.units import parse, show

#: Moments of waiting that are told at most.
_MOST_MOMENTS = 1000
#: Lines of single GPUs above which they are taken together, if nothing else is asked for.
_MOST_LINES = 64
#: Empty table → why, and what fills it.
_WHY_EMPTY = {
    "spans": "no spans were recorded: run the scenario with --set trace.level=spans",
    "span_links": "no spans were recorded: run the scenario with --set trace.level=spans",
    "flows": "no flows were recorded: run the scenario with --set trace.level=flows",
    "queues": "only links of the chunked network have queues: --set network.fidelity=chunked",
    "experts": "no expert was at work in this run",
}


@dataclass(frozen=True, slots=True)
class Times:
    """What part of a run is asked for, as a user writes it.

    start, end  times with unit, such as "1 ms"; "" is the run's own
    bins        in how many parts of equal length; 0: not over time
    """

    start: str = ""
    end: str = ""
    bins: int = 0


_WHOLE = Times()


def summary_view(opened: Opened) -> dict[str, Any]:
    """folder; summary: the content of summary.json; recorded: rows by table, and which steps have spans."""
    trace = opened.trace
    rows = {table: len(next(iter(columns.values()))) for table, columns in trace.tables.items()}
    version, _ = read_facts(opened.folder / TRACE)
    recorded = {
        "trace_version": version,
        "level": _level(rows),
        "steps": _recorded_steps(trace),
        "rows": rows,
    }
    return {"folder": str(opened.folder), "summary": opened.summary, "recorded": recorded}


def gpus_view(opened: Opened, by: str = "gpu", state: str = "", times: Times = _WHOLE) -> dict[str, Any]:
    """What GPUs did: shares of compute, exchange, wait and idle, the one longest without work first.

    by       gpu, server, stage or shard: what is taken together, as a mean; "" is what has few enough lines
    state    what lines over time show: one of STATES, or busy, that is computing or exchanging
    Returns  folder, window (s), by, gpus (or groups), over_time: None, or edges and lines
    """
    trace, window = opened.trace, window_of(opened.trace, times)
    ranks = trace.tables["ranks"]
    by = by or _fitting(trace)
    pick(_GROUPS, by, "--by")
    if state:
        pick(dict.fromkeys(_SHOWN), state, "--state")
    found = gpus(trace) if window is None else _within(trace, window)
    groups: dict[str, list[int]] = {}
    for name, rank in zip(_GROUPS[by](trace), numbers(ranks, "rank").tolist(), strict=True):
        groups.setdefault(name, []).append(rank)
    entries = worst(found, len(found)) if by == "gpu" else _together(found, groups, by)
    lines = None
    if times.bins:
        use = over_time.gpu_use(trace, times.bins, window)
        order = [entry["gpu"] if by == "gpu" else entry[by] for entry in entries]
        lines = {
            "edges": use.edges,
            "state": state or "busy",
            "lines": [_line(name, groups[name], use.shares) for name in order],
        }
    return _json(
        {"folder": str(opened.folder), "window": _said(trace, window), "by": by, "gpus": entries}
        | {"over_time": lines}
    )


def links_view(opened: Opened, tier: str = "", times: Times = _WHOLE, lines: int = 0) -> dict[str, Any]:
    """What links carried.

    tier     only its links
    lines    over time, also so many of the busiest links, not only the tiers
    Returns  folder, window (s), tiers, links (the busiest first), over_time: None, or edges and lines with
             bytes and utilization (mean and busiest link)
    """
    trace, window = opened.trace, window_of(opened.trace, times)
    if tier:
        pick(tiers(links(trace)), tier, "--tier")
    use = over_time.link_use(trace, times.bins or 1, window) if times.bins or window else None
    every = links(trace)
    if window is not None and use is not None:
        one = over_time.link_use(trace, 1, window)
        order = numbers(trace.tables["links"], "link").tolist()
        carried, used = one.bytes[:, 0], one.utilization()[:, 0]
        every = [
            {**link, "bytes": float(carried[number]), "utilization": float(used[number])}
            for number, link in zip(order, every, strict=True)
        ]
    chosen = [link for link in every if not tier or link["tier"] == tier]
    sorted_links = busiest(chosen, len(chosen))
    found = None
    if times.bins and use is not None:
        names = [tier] if tier else list(use.tiers)
        found = {
            "edges": use.edges,
            "tiers": [
                {
                    "tier": name,
                    "bytes": use.bytes[use.tiers[name]].sum(axis=0),
                    "mean": use.of_tier(name),
                    "max": use.busiest_of_tier(name),
                }
                for name in names
            ],
            "links": _link_lines(trace, use, [link["link"] for link in sorted_links[:lines]]),
        }
    return _json(
        {"folder": str(opened.folder), "window": _said(trace, window), "tiers": tiers(chosen)}
        | {"links": sorted_links, "over_time": found}
    )


def experts_view(
    opened: Opened, layer: int | None = None, gpu: str = "", times: Times = _WHOLE, order: str = ""
) -> dict[str, Any]:
    """What came to expert copies and how long it waited there, by layer and by copy.

    layer, gpu  only these
    order       of `expert_queues.ORDERS`: which copies stand first, and which ranks over time
    Returns     folder, order, layers, copies, over_time: None, or edges and lines of the mean number of
                tokens that wait on each rank
    """
    trace = opened.trace
    if order:
        pick({name: name for name in expert_queues.ORDERS if name}, order, "--sort")
    every = expert_queues.layers(trace)
    if not every:
        raise ResultError(f"{opened.folder}: {_WHY_EMPTY['experts']}")
    found = expert_queues.copies(trace, order)
    rank = rank_of(trace, gpu) if gpu else None
    if layer is not None:
        known = [entry["layer"] for entry in every]
        if layer not in known:
            raise ClustersimError(f"--layer: {layer} has no experts; those that have: {_ranges(known)}")
        every = [entry for entry in every if entry["layer"] == layer]
    found = [
        copy
        for copy in found
        if (layer is None or copy["layer"] == layer) and (rank is None or copy["rank"] == rank)
    ]
    if rank is not None and not found:
        where = "" if layer is None else f" of layer {layer}"
        raise ClustersimError(f"--gpu: {gpu} holds no experts{where}")
    lines = None
    if times.bins:
        queues = over_time.queue_lengths(trace, times.bins, window_of(trace, times))
        holders = [copy["rank"] for copy in found]
        names = _names(trace)
        lines = {
            "edges": queues.edges,
            "lines": [
                {"rank": one, "gpu": names[one], "tokens": queues.tokens[one]}
                for one in dict.fromkeys(holders)
            ],
        }
    return _json(
        {"folder": str(opened.folder), "order": order, "layers": every, "copies": found, "over_time": lines}
    )


def stragglers_view(opened: Opened, operator: str = "") -> dict[str, Any]:
    """Which ranks made others wait, where, how long and when.

    operator  only this exchange
    Returns   folder, steps, seconds (all waiting for ranks), operators, ranks (who cost most first), next
              (the rank that would be waited for if the first were as fast as others; None with an
              operator), moments (the longest first, at most a thousand; None where no spans were
              recorded), moments_all (how many there were), note
    """
    trace = opened.trace
    places = blame.waits_by_operator(trace)
    if operator:
        known = {entry["operator"]: entry for entry in places}
        if operator not in known:
            _check_operator(trace, operator, known)
        places = [known[operator]] if operator in known else []
    moments, note = None, ""
    try:
        moments = blame.moments(trace, operator or None)
    except ResultError as error:
        note = str(error)
    return _json(
        {
            "folder": str(opened.folder),
            "steps": len(numbers(trace.tables["steps"], "step")),
            "seconds": sum(entry["seconds"] for entry in places),
            "operators": places,
            "ranks": blame.stragglers(trace, operator or None),
            "next": None if operator else blame.next_straggler(trace),
            "moments": None if moments is None else moments[:_MOST_MOMENTS],
            "moments_all": None if moments is None else len(moments),
            "note": note,
        }
    )


def slice_view(opened: Opened, asked: Sequence[str], times: Times, operator: str = "") -> dict[str, Any]:
    """What some GPUs did between two times.

    asked     ranks or vertices
    operator  only its spans
    Returns   folder, window (s), gpus (rank, gpu, server, stage and streams), pieces as `slices.slice_of`,
              whole: whether all spans of that time were recorded
    """
    trace = opened.trace
    if operator:
        _check_operator(trace, operator)
    ranks = list(dict.fromkeys(rank_of(trace, name) for name in asked))
    window = window_of(trace, times) or _all(trace)
    pieces = slice_of(trace, ranks, window, operator or None)
    table, names = trace.tables["ranks"], _names(trace)
    rows = {int(rank): row for row, rank in enumerate(numbers(table, "rank"))}
    streams = text(trace.tables["spans"], "stream").words
    about = [
        {
            "rank": rank,
            "gpu": names[rank],
            "server": int(numbers(table, "server")[rows[rank]]),
            "stage": int(numbers(table, "stage")[rows[rank]]),
            "streams": [
                stream
                for stream in streams
                if stream == "compute" or any(p["rank"] == rank and p["stream"] == stream for p in pieces)
            ],
        }
        for rank in ranks
    ]
    whole = not over_time.unrecorded(trace, np.array(window)).any()
    return _json(
        {"folder": str(opened.folder), "window": window, "gpus": about, "whole": whole, "pieces": pieces}
    )


def sql_view(
    opened: Opened, sql: str, rows: int | None = None, seconds: float | None = None
) -> dict[str, Any]:
    """The answer to a query over the tables.

    rows     at most so many; None is a million
    seconds  it may take; None is a minute
    Returns  columns, types, rows (lists), cut: whether there were more, notes: why a table named is empty
    """
    most, limit = MOST_ROWS if rows is None else rows, SECONDS if seconds is None else seconds
    answer = query(opened.folder / TRACE, sql, most, limit)
    notes = [
        f"{table} is empty: {_WHY_EMPTY[table]}"
        for table in named_tables(sql)
        if table in _WHY_EMPTY and not len(next(iter(opened.trace.tables[table].values())))
    ]
    return {
        "columns": answer.columns,
        "types": answer.types,
        "rows": [[_value(value) for value in row] for row in answer.rows],
        "cut": answer.cut,
        "notes": notes,
    }


def rank_of(trace: Trace, name: str, where: str = "--gpu") -> int:
    """The rank of a GPU.

    name     its rank as a number, or its vertex of the topology
    where    option that named it, for the message
    Raises   ClustersimError with the nearest ones
    """
    known = numbers(trace.tables["ranks"], "rank").tolist()
    if name.strip().isdecimal():
        rank = int(name)
        if rank in known:
            return rank
        near = min(known, key=lambda other: abs(other - rank), default=None)
        nearby = "" if near is None else f" (the nearest is {near})"
        raise ClustersimError(f"{where}: there is no rank {rank}{nearby}; there are {_ranges(known)}")
    vertices = {vertex: rank for rank, vertex in _names(trace).items()}
    if name in vertices:
        return vertices[name]
    example = next(iter(vertices), "none")
    raise ClustersimError(
        f'{where}: there is no GPU "{name}"{nearest(name, vertices)}; give a rank, {_ranges(known)}, or a '
        f"vertex of the topology, such as {example}"
    )


# ---- times --------------------------------------------------------------------------------------


def _all(trace: Trace) -> tuple[float, float]:
    return 0.0, float(trace.facts["simulated_seconds"])


def _said(trace: Trace, window: tuple[float, float] | None) -> tuple[float, float]:
    return _all(trace) if window is None else window


def window_of(trace: Trace, times: Times) -> tuple[float, float] | None:
    """From and to, s; None where neither was given."""
    if not times.start and not times.end:
        return None
    begin, finish = _all(trace)
    start = _time(times.start, "--from") if times.start else begin
    end = _time(times.end, "--to") if times.end else finish
    if start >= finish:
        raise ClustersimError(f"--from: {times.start} is not before the run's end, {show(finish, 'time')}")
    if start >= end:
        raise ClustersimError(f"--from {show(start, 'time')} --to {show(end, 'time')}: nothing lies between")
    return start, min(end, finish)


def _time(words_: str, where: str) -> float:
    try:
        return parse(words_, "time")
    except UnitError as error:
        raise ClustersimError(f"{where}: {error}") from None


# ---- GPUs ---------------------------------------------------------------------------------------


def _names(trace: Trace) -> dict[int, str]:
    ranks = trace.tables["ranks"]
    return dict(zip(numbers(ranks, "rank").tolist(), words(ranks, "gpu").tolist(), strict=True))


def _column(name: str) -> Callable[[Trace], list[str]]:
    return lambda trace: [str(value) for value in numbers(trace.tables["ranks"], name).tolist()]


#: What GPUs may be taken together by → the name of the group of each row of the table `ranks`.
_GROUPS: Mapping[str, Callable[[Trace], list[str]]] = {
    "gpu": lambda trace: words(trace.tables["ranks"], "gpu").tolist(),
    "server": _column("server"),
    "stage": _column("stage"),
    "shard": _column("shard"),
}
_SHOWN = ("busy", *STATES)


def _fitting(trace: Trace) -> str:
    """The finest grouping of GPUs that gives not too many lines."""
    fits = (by for by in ("gpu", "server", "stage") if len(set(_GROUPS[by](trace))) <= _MOST_LINES)
    return next(fits, "stage")


def _within(trace: Trace, window: tuple[float, float]) -> list[dict[str, Any]]:
    """As `utilization.gpus`, of a part of the run: without MFU and whom was waited for."""
    shares = over_time.gpu_use(trace, 1, window).shares[:, 0]
    if np.isnan(shares).any():
        raise ResultError(
            "not all spans of that time were recorded, so what GPUs did in it is not known; "
            "ask for the time of the steps that were (trace.steps, trace.window), or of the whole run"
        )
    ranks = trace.tables["ranks"]
    columns = [numbers(ranks, name).tolist() for name in ("rank", "server", "stage")]
    return [
        {
            "gpu": gpu,
            "rank": rank,
            "server": server,
            "stage": stage,
            **dict(zip(STATES, shares[rank].tolist(), strict=True)),
            "mfu": None,
            "waited_for": None,
        }
        for gpu, rank, server, stage in zip(words(ranks, "gpu").tolist(), *columns, strict=True)
    ]


def _together(
    found: Sequence[Mapping[str, Any]], groups: Mapping[str, list[int]], by: str
) -> list[dict[str, Any]]:
    """Means over each group, and its GPU that was longest without work."""
    of = {entry["rank"]: entry for entry in found}
    entries = []
    for name, ranks in groups.items():
        members = [of[rank] for rank in ranks]
        entries.append(
            {
                by: name,
                "gpus": len(members),
                **{state: sum(m[state] for m in members) / len(members) for state in STATES},
                "mfu": None if members[0]["mfu"] is None else sum(m["mfu"] for m in members) / len(members),
                "worst": worst([dict(m) for m in members], 1)[0]["gpu"],
            }
        )
    return sorted(entries, key=lambda entry: (-(entry["wait"] + entry["idle"]), -entry["wait"]))


def _line(name: str, ranks: Sequence[int], shares: np.ndarray) -> dict[str, Any]:
    mean = shares[np.asarray(ranks)].mean(axis=0)
    return {"name": name, "gpus": len(ranks), **{state: mean[:, n] for n, state in enumerate(STATES)}}


def _link_lines(trace: Trace, use: over_time.LinkUse, names: Sequence[str]) -> list[dict[str, Any]]:
    table = trace.tables["links"]
    ends = zip(words(table, "source"), words(table, "target"), strict=True)
    row_of = dict(zip((f"{a}->{b}" for a, b in ends), numbers(table, "link").tolist(), strict=True))
    shares = use.utilization()
    return [
        {"link": name, "bytes": use.bytes[row_of[name]], "utilization": shares[row_of[name]]}
        for name in names
    ]


# ---- what was recorded --------------------------------------------------------------------------


def _level(rows: Mapping[str, int]) -> str:
    return "flows" if rows["flows"] else "spans" if rows["spans"] else "sums"


def _recorded_steps(trace: Trace) -> dict[str, int]:
    """all: steps of the run; spans: those of which all spans were recorded."""
    some = len(numbers(trace.tables["spans"], "span")) > 0
    return {
        "all": len(numbers(trace.tables["steps"], "step")),
        "spans": len(whole_steps(trace, spans_of(trace).passes)) if some else 0,
    }


def _check_operator(trace: Trace, operator: str, offered: Iterable[str] | None = None) -> None:
    """Raises ClustersimError where no operator has that name.

    offered  those that are worth asking for; None is all
    """
    known = list(dict.fromkeys(words(trace.tables["sums"], "operator").tolist()))
    if operator in known:
        return
    names = known if offered is None else list(offered)
    alike = [SequenceMatcher(None, operator, name).ratio() for name in names]
    ordered = [name for _, name in sorted(zip(alike, names, strict=True), key=lambda pair: -pair[0])]
    where = "there are" if offered is None else "ranks waited for others in"
    raise ClustersimError(
        f'--operator: there is no "{operator}"{nearest(operator, names)}; '
        f"{where} {', '.join(ordered) or 'none'}"
    )


def _ranges(values: Sequence[int]) -> str:
    """ "0 to 7" where nothing is missing between, else the first few."""
    ordered = sorted(set(values))
    if len(ordered) > 2 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{ordered[0]} to {ordered[-1]}"
    more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""
    return ", ".join(map(str, ordered[:8])) + more


def _value(value: Any) -> Any:
    """A value of a query in JSON's types: what has none there is text."""
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_value(entry) for entry in value]
    return str(value)


def _json(found: Mapping[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = plain(found)
    return content
