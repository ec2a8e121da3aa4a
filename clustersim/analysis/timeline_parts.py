"""A run drawn over time: tracks, slices on them, arrows between slices, and counters.

Times are whole nanoseconds, each rounded to the nearest by itself. Rounding keeps order, so slices that
follow each other on a track never come to overlap; a duration is off by less than 1 ns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clustersim.trace.record import Text


@dataclass(frozen=True, slots=True)
class Track:
    """One line of the drawing, or a group of lines; its number is its place in the list of all.

    name    what it is called; tracks of one name and parent are drawn as one
    parent  number of the track it belongs to, -1 for none; always less than its own
    kind    process, group, slices or counter
    unit    of a counter
    about   what it shows, where the name does not say it
    """

    name: str
    parent: int
    kind: str
    unit: str = ""
    about: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Slices:
    """S slices, sorted by track and time; those of one track follow each other.

    track       int64[S] number of the track
    start, end  int64[S] ns
    name        Text[S]
    category    Text[S]
    about       what else is known → int64[S], where -1 is nothing; float64[S], where NaN is nothing; or
                Text[S], where code -1 is nothing
    """

    track: np.ndarray
    start: np.ndarray
    end: np.ndarray
    name: Text
    category: Text
    about: Mapping[str, np.ndarray | Text]

    def __len__(self) -> int:
        return len(self.track)


@dataclass(frozen=True, slots=True, eq=False)
class Counters:
    """Step functions: N points, sorted by track and time.

    track  int64[N] number of the track
    time   int64[N] ns
    value  float64[N] from then on, in the unit of its track
    """

    track: np.ndarray
    time: np.ndarray
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.track)


@dataclass(frozen=True, slots=True, eq=False)
class Arrows:
    """A arrows between slices of GPUs.

    source, target  int64[A] rows of the slices of GPU streams; the source begins before the target ends
    left            how many were left out, because they were too many
    """

    source: np.ndarray
    target: np.ndarray
    left: int = 0

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """What is drawn of a run.

    name      of the run
    tracks    parents before their children, siblings in their order
    streams   what GPUs did, one slice per span and one more for a wait before it
    links     exchanges on the links that were narrowest for them, and outages
    run       steps, token batches and faults
    arrows    between slices of `streams`
    counters  link utilization, tokens in expert queues, KV memory
    window    s, from and to
    spans     spans drawn
    notes     what was left out, and what to do about it: sentences without a full stop
    """

    name: str
    tracks: Sequence[Track]
    streams: Slices
    links: Slices
    run: Slices
    arrows: Arrows
    counters: Counters
    window: tuple[float, float]
    spans: int
    notes: Sequence[str]


def nanoseconds(seconds: np.ndarray) -> np.ndarray:
    """int64[n] the nearest whole nanosecond to each time, s."""
    found: np.ndarray = np.rint(np.asarray(seconds) * 1e9).astype(np.int64)
    return found


def lanes(place: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """int64[n] the lowest lane of its place on which each slice is free of the others.

    place       int[n] where it belongs
    start, end  int64[n] ns
    """
    order = np.lexsort((end, start, place))
    of, begin, finish = place[order], start[order], end[order]
    found = np.zeros(len(place), dtype=np.int64)
    crowded = np.unique(of[1:][(of[1:] == of[:-1]) & (begin[1:] < finish[:-1])])
    for one in crowded:
        rows = order[slice(*np.searchsorted(of, [one, one + 1]))]
        free: list[int] = []
        for row, since, until in zip(rows.tolist(), start[rows].tolist(), end[rows].tolist(), strict=True):
            lane = next((n for n, busy in enumerate(free) if busy <= since), len(free))
            free[lane:] = [until, *free[lane + 1 :]]
            found[row] = lane
    return found


def steps_of(track: np.ndarray, time: np.ndarray, value: np.ndarray, window: tuple[float, float]) -> Counters:
    """Points of step functions, as far as they count within a window.

    track   int[n] of each point
    time    float64[n] s; of points at one time the last in order counts
    window  s; what holds when it begins stands at its beginning
    """
    begin, finish = nanoseconds(np.array(window))
    at = np.maximum(nanoseconds(time), begin)
    order = np.lexsort((np.arange(len(at)), time, track))
    order = order[at[order] <= finish]
    track, at, value = track[order].astype(np.int64), at[order], value[order]
    last = np.ones(len(at), dtype=bool)
    last[:-1] = (track[1:] != track[:-1]) | (at[1:] != at[:-1])
    return Counters(track[last], at[last], value[last])


def spelled(values: Sequence[str]) -> Text:
    """Words row by row as a column; the distinct ones in the order in which they first stand."""
    known: dict[str, int] = {}
    codes = [known.setdefault(value, len(known)) for value in values]
    return Text(np.array(codes, dtype=np.int32), tuple(known))
