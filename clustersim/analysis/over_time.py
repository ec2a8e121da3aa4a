"""Busy GPUs, busy links and full queues over the time of a run: shares and means in bins of equal width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from clustersim.analysis.columns import is_word, ratio
from clustersim.analysis.latency import numbers, words
from clustersim.analysis.utilization import STATES
from clustersim.errors import NotRecordedError, ResultError
from clustersim.trace.record import Columns, Trace

Window = tuple[float, float]


@dataclass(frozen=True, slots=True, eq=False)
class GpuUse:
    """What every GPU did, bin by bin.

    edges   float64[B + 1] s
    shares  float64[R, B, 4] of each bin, in the order of utilization.STATES; the four add up to one;
            rank r is row r; NaN in bins of which not all spans were recorded
    """

    edges: np.ndarray
    shares: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class LinkUse:
    """What every link carried, bin by bin.

    edges     float64[B + 1] s
    bytes     float64[K, B] carried; link k is row k
    capacity  float64[K, B] bytes it could have carried, faults counted
    tiers     tier → int64[links of the tier], rows
    """

    edges: np.ndarray
    bytes: np.ndarray
    capacity: np.ndarray
    tiers: Mapping[str, np.ndarray]

    def utilization(self) -> np.ndarray:
        """float64[K, B] bytes ÷ capacity; 0 where there is none."""
        return ratio(self.bytes, self.capacity)

    def of_tier(self, tier: str) -> np.ndarray:
        """float64[B] bytes of a tier's links ÷ their capacity."""
        rows = self.tiers[tier]
        return ratio(self.bytes[rows].sum(axis=0), self.capacity[rows].sum(axis=0))

    def busiest_of_tier(self, tier: str) -> np.ndarray:
        """float64[B] utilization of the tier's busiest link, bin by bin."""
        rows = self.tiers[tier]
        most: np.ndarray = ratio(self.bytes[rows], self.capacity[rows]).max(axis=0)
        return most


@dataclass(frozen=True, slots=True, eq=False)
class QueueLengths:
    """Tokens that stand in expert queues, bin by bin.

    edges   float64[B + 1] s
    tokens  float64[R, B] mean over the bin, all queues of the rank together
    """

    edges: np.ndarray
    tokens: np.ndarray


def gpu_use(trace: Trace, bins: int, window: Window | None = None) -> GpuUse:
    """Shares of time that each GPU computes, exchanges, waits and is idle, by its compute stream's spans.

    bins     at least one
    window   s from and to; None is the whole run
    Raises   ResultError if no spans were recorded
    """
    edges = edges_of(trace, bins, window)
    spans = spans_of(trace)
    size = int(numbers(trace.tables["ranks"], "rank").max(initial=-1)) + 1
    chosen = is_word(spans, "stream", "compute")
    chosen &= (numbers(spans, "start") < edges[-1]) & (numbers(spans, "end") > edges[0])
    rank, start, met, end = (numbers(spans, name)[chosen] for name in ("rank", "start", "met", "end"))
    computes = is_word(spans, "kind", "compute")[chosen]
    width = np.diff(edges)
    shares = np.empty((size, bins, len(STATES)))
    # What computes may wait, too: for tokens that have not come.
    parts = {
        "compute": (computes, met, end),
        "exchange": (~computes, met, end),
        "wait": (slice(None), start, met),
    }
    for state, (rows, begin, finish) in parts.items():
        seconds = binned(rank[rows], begin[rows], finish[rows], 1.0, edges, size)
        shares[:, :, STATES.index(state)] = seconds / width
    idle = STATES.index("idle")
    shares[:, :, idle] = np.maximum(1.0 - shares[:, :, :idle].sum(axis=2), 0.0)
    shares[:, unrecorded(trace, edges)] = np.nan
    return GpuUse(edges, shares)


def unrecorded(trace: Trace, edges: np.ndarray) -> np.ndarray:
    """bool[B] bins of which not all spans were recorded.

    edges   float64[B + 1] s
    """
    begin, end = recorded(trace)
    found: np.ndarray = (edges[:-1] < begin) | (edges[1:] > end)
    return found


def recorded(trace: Trace) -> Window:
    """From when to when all spans were recorded, s; -inf to inf where all of the run were.

    The fact `recorded` of the trace says it; without it, it is what the spans themselves show.
    """
    spans = trace.tables["spans"]
    if len(numbers(spans, "rank")) == numbers(trace.tables["sums"], "count").sum():
        return -np.inf, np.inf
    if not len(numbers(spans, "rank")):
        return np.inf, -np.inf
    told = trace.facts.get("recorded")
    if told is not None:
        return float(told[0]), float(told[1])
    # What was recorded is all that touched some time, which so begins before the first of it ended.
    return float(numbers(spans, "end").min()), float(numbers(spans, "start").max())


def link_use(trace: Trace, bins: int, window: Window | None = None) -> LinkUse:
    """Bytes that each link carried and could have carried.

    Bytes of an interval of the table `link_use` count as spread evenly over that part of it in which the run
    still went on.

    Raises   ResultError if the trace is of a version that did not record it
    """
    edges = edges_of(trace, bins, window)
    table, links = trace.tables["link_use"], trace.tables["links"]
    size = len(numbers(links, "link"))
    start, end = numbers(table, "start"), numbers(table, "end")
    if not len(start) and numbers(links, "bytes").any():
        raise NotRecordedError(
            "what links carried over time is not in this result, which an older version recorded; "
            "run the scenario again"
        )
    finish = float(trace.facts["simulated_seconds"])
    end = np.where(start < finish, np.minimum(end, finish), end)
    rate = ratio(numbers(table, "bytes"), end - start)
    carried = binned(numbers(table, "link"), start, end, rate, edges, size)
    order = np.argsort(numbers(links, "link"), kind="stable")
    tier = words(links, "tier")[order]
    tiers = {str(name): np.flatnonzero(tier == name) for name in dict.fromkeys(tier)}
    return LinkUse(edges, carried, _capacity(trace, edges, numbers(links, "bandwidth")[order]), tiers)


def _capacity(trace: Trace, edges: np.ndarray, bandwidth: np.ndarray) -> np.ndarray:
    """float64[K, B] bytes that links could carry: less while they were slow or down."""
    nominal = bandwidth[:, None] * np.diff(edges)
    outages = trace.tables["outages"]
    link = numbers(outages, "link")
    lost = bandwidth[link] - numbers(outages, "bandwidth")
    missing = binned(link, numbers(outages, "start"), numbers(outages, "end"), lost, edges, len(bandwidth))
    able: np.ndarray = np.maximum(nominal - missing, 0.0)
    return able


def queue_lengths(trace: Trace, bins: int, window: Window | None = None) -> QueueLengths:
    """Tokens that wait in the expert queues of each rank, mean over each bin.

    The token-seconds of a queue (table `experts`) are exact; they count as spread evenly from the first
    arrival until the queue was served, or, where tokens came after that, until it was done.
    """
    edges = edges_of(trace, bins, window)
    table = trace.tables["experts"]
    size = int(numbers(trace.tables["ranks"], "rank").max(initial=-1)) + 1
    some = numbers(table, "wait") > 0
    rank, wait, first, last, served, done = (
        numbers(table, name)[some]
        for name in ("rank", "wait", "first_arrival", "last_arrival", "served", "done")
    )
    until = np.where((served >= last) & (served > first), served, done)
    area = binned(rank, first, until, ratio(wait, until - first), edges, size)
    return QueueLengths(edges, area / np.diff(edges))


def edges_of(trace: Trace, bins: int, window: Window | None = None) -> np.ndarray:
    """float64[bins + 1] s: edges of bins of equal width over the window, or over the whole run."""
    begin, end = window or (0.0, float(trace.facts["simulated_seconds"]))
    if not end > begin:
        raise ResultError("the window is empty: nothing happened in it")
    return np.linspace(begin, end, bins + 1)


def spans_of(trace: Trace) -> Columns:
    """The table of spans.

    Raises   ResultError where none were recorded, with what to set
    """
    spans = trace.tables["spans"]
    if not len(spans["rank"]):
        raise NotRecordedError(
            "no spans were recorded in this result, so when each operator ran is not known; "
            "run the scenario with --set trace.level=spans"
        )
    return spans


def binned(
    place: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    rate: np.ndarray | float,
    edges: np.ndarray,
    places: int,
) -> np.ndarray:
    """What intervals bring to each place and bin: rate x the time that the interval and the bin share.

    place       int[n] row of each interval
    start, end  float64[n] s, in any order; what lies outside the edges does not count
    rate        per second, float64[n] or one for all
    edges       float64[B + 1] s, equally far apart
    Returns     float64[places, B]
    """
    bins = len(edges) - 1
    start, end = np.maximum(start, edges[0]), np.minimum(end, edges[-1])
    some = end > start
    start, end, place = start[some], end[some], place[some].astype(np.int64)
    rates = np.broadcast_to(np.asarray(rate, dtype=np.float64), some.shape)[some]
    first, last = _bin(start, edges), _bin(end, edges)
    # Partly covered bins at both ends, and whole ones between: no difference of large sums.
    alone = first == last
    head = np.where(alone, end - start, edges[first + 1] - start)
    tail = np.where(alone, 0.0, end - edges[last])
    amount = np.bincount(place * bins + first, weights=rates * head, minlength=places * bins)
    amount += np.bincount(place * bins + last, weights=rates * tail, minlength=places * bins)
    through = last - first > 1
    if through.any():
        wide = bins + 1
        row = place[through] * wide
        steps = np.bincount(row + first[through] + 1, weights=rates[through], minlength=places * wide)
        steps -= np.bincount(row + last[through], weights=rates[through], minlength=places * wide)
        whole = np.cumsum(steps.reshape(places, wide), axis=1)[:, :bins] * np.diff(edges)
        amount += whole.ravel()
    found: np.ndarray = amount.reshape(places, bins)
    return found


def _bin(time: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin that each time lies in; the last edge belongs to the last bin."""
    at: np.ndarray = np.clip(np.searchsorted(edges, time, side="right") - 1, 0, len(edges) - 2)
    return at
