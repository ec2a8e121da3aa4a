"""What links did: exchanges on the links that were narrowest for them, outages, and utilization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from clustersim.analysis.chosen import Part
from clustersim.analysis.columns import ratio, text
from clustersim.analysis.latency import numbers, words
from clustersim.analysis.timeline_parts import Counters, Slices, lanes, nanoseconds, steps_of
from clustersim.trace.record import Text, Trace

#: (row of the table `links`, lane) → number of its track
LinkPlace = tuple[int, int]

_CATEGORIES = ("exchange on link", "outage")


def homes(trace: Trace) -> np.ndarray:
    """int64[K] the server that each link belongs to, -1 for those between servers.

    A GPU is in its server, and so is a vertex next to GPUs of that one alone; a link is in the server of
    an end.
    """
    ranks, links = trace.tables["ranks"], trace.tables["links"]
    server = dict(zip(words(ranks, "gpu"), numbers(ranks, "server").tolist(), strict=True))
    beside: dict[str, set[int]] = {}
    ends = list(zip(words(links, "source"), words(links, "target"), strict=True))
    for a, b in [*ends, *((b, a) for a, b in ends)]:
        if a in server and b not in server:
            beside.setdefault(b, set()).add(server[a])
    inside = {**server, **{vertex: next(iter(of)) for vertex, of in beside.items() if len(of) == 1}}
    return np.array([inside.get(a, inside.get(b, -1)) for a, b in ends], dtype=np.int64)


def link_slices(trace: Trace, part: Part, links: np.ndarray) -> tuple[Slices, list[LinkPlace]]:
    """Slices whose `track` is yet the place in the list returned.

    An exchange is on a link from when the first of the ranks for which that link was narrowest began to
    exchange until the last of them was done.

    links    bool[K] those that are drawn
    """
    exchanges, outages = _exchanges(trace, part), _outages(trace, part)
    columns = [np.concatenate(pair) for pair in zip(exchanges, outages, strict=True)]
    drawn = links[columns[0].astype(np.int64)]
    link, begin, finish, operator, layer, batch, size = (column[drawn] for column in columns)
    link, start, end = link.astype(np.int64), nanoseconds(begin), nanoseconds(finish)
    lane = lanes(link, start, end)
    most = int(lane.max(initial=0)) + 1
    distinct, where = np.unique(link * most + lane, return_inverse=True)
    where = where.ravel()
    order = np.lexsort((end, start, where))
    known = text(trace.tables["spans"], "operator").words
    codes = operator[order].astype(np.int32)
    slices = Slices(
        where[order],
        start[order],
        end[order],
        Text(codes, (*known, "down", "slow")),
        Text((codes >= len(known)).astype(np.int32), _CATEGORIES),
        {
            "layer": layer[order].astype(np.int64),
            "token batch": batch[order].astype(np.int64),
            "bytes": np.where(codes >= len(known), np.nan, size[order]),
            "bandwidth left, bytes/s": np.where(codes >= len(known), size[order], np.nan),
        },
    )
    return slices, [(int(one) // most, int(one) % most) for one in distinct]


#: Columns of what is on a link: link, start s, end s, code of the operator, layer, token batch, bytes.
_Columns = list[np.ndarray]


def _exchanges(trace: Trace, part: Part) -> _Columns:
    spans, table = trace.tables["spans"], trace.tables["span_links"]
    number = numbers(spans, "span")[part.rows]
    of = np.argsort(number, kind="stable")
    wanted = numbers(table, "span")
    if not len(of) or not len(wanted):
        return [np.empty(0)] * 7
    at = np.minimum(np.searchsorted(number, wanted, sorter=of), len(of) - 1)
    some = number[of[at]] == wanted
    rows = part.rows[of[at[some]]]
    link = _rows_of(trace, numbers(table, "link")[some])
    code = text(spans, "operator").codes[rows]
    key = np.stack([link, code, *(numbers(spans, n)[rows] for n in ("token_batch", "layer", "stage"))])
    distinct, where = np.unique(key, axis=1, return_inverse=True)
    where, count = where.ravel(), distinct.shape[1]
    start, end, size = np.full(count, np.inf), np.full(count, -np.inf), np.zeros(count)
    np.minimum.at(start, where, numbers(spans, "met")[rows])
    np.maximum.at(end, where, numbers(spans, "end")[rows])
    np.maximum.at(size, where, numbers(table, "all")[some])
    return [distinct[0], start, end, distinct[1], distinct[3], distinct[2], size]


def _outages(trace: Trace, part: Part) -> _Columns:
    """Bandwidth that is left stands for the bytes."""
    table = trace.tables["outages"]
    start, end, left = (numbers(table, name) for name in ("start", "end", "bandwidth"))
    some = np.flatnonzero((start < part.window[1]) & (end > part.window[0]))
    last = float(trace.facts["simulated_seconds"])
    names = len(text(trace.tables["spans"], "operator").words)
    code = names + (left[some] > 0)
    none = np.full(len(some), -1)
    link = _rows_of(trace, numbers(table, "link")[some])
    return [link, start[some], np.minimum(end[some], last), code, none, none, left[some]]


def _rows_of(trace: Trace, link: np.ndarray) -> np.ndarray:
    """int64[n] the row of the table `links` in which each link stands."""
    known = numbers(trace.tables["links"], "link")
    order = np.argsort(known, kind="stable")
    found: np.ndarray = order[np.searchsorted(known, link, sorter=order)]
    return found


def carrying(trace: Trace, part: Part) -> np.ndarray:
    """bool[K] which links carried something in the window."""
    table = trace.tables["link_use"]
    found = np.zeros(len(numbers(trace.tables["links"], "link")), dtype=bool)
    some = (numbers(table, "start") < part.window[1]) & (numbers(table, "end") > part.window[0])
    found[_rows_of(trace, numbers(table, "link")[some])] = True
    return found


def use_points(trace: Trace, part: Part, tracks: Mapping[int, int]) -> Counters:
    """Utilization of links, % of nominal bandwidth, in each interval of the table `link_use`.

    tracks   row of the table `links` → track
    """
    table, links = trace.tables["link_use"], trace.tables["links"]
    every = _rows_of(trace, numbers(table, "link"))
    number = np.full(len(numbers(links, "link")), -1)
    number[list(tracks)] = list(tracks.values())
    some = np.flatnonzero(number[every] >= 0)
    link = every[some]
    start, end = numbers(table, "start")[some], numbers(table, "end")[some]
    order = np.lexsort((start, link))
    some, link, start, end = some[order], link[order], start[order], end[order]
    # The run is over before its last interval is.
    finish = np.minimum(end, float(trace.facts["simulated_seconds"]))
    able = numbers(links, "bandwidth")[link] * np.maximum(finish - start, 0.0)
    share = 100.0 * ratio(numbers(table, "bytes")[some], able)
    gap = np.ones(len(link), dtype=bool)
    gap[:-1] = (link[1:] != link[:-1]) | (start[1:] > end[:-1])
    # Where the next interval has no row, nothing was carried in it.
    track = np.concatenate([number[link], number[link[gap]]])
    time = np.concatenate([start, finish[gap]])
    value = np.concatenate([share, np.zeros(int(gap.sum()))])
    return steps_of(track, time, value, part.window)


def drawn_links(trace: Trace, part: Part, ranks: Sequence[int] | None) -> np.ndarray:
    """bool[K] links that are drawn: of chosen GPUs' servers, and those that were narrowest for the GPUs."""
    if ranks is None:
        return np.ones(len(numbers(trace.tables["links"], "link")), dtype=bool)
    table = trace.tables["ranks"]
    servers = numbers(table, "server")[np.isin(numbers(table, "rank"), np.asarray(ranks))]
    found: np.ndarray = np.isin(homes(trace), servers)
    found[_exchanges(trace, part)[0].astype(np.int64)] = True
    return found
