"""What links carry: over time, in equal intervals, and which of them the last flow of a rank waited for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from clustersim.engine.fabric import Meeting

#: Intervals at most, and cells (links x intervals): 8 MB.
_BINS = 512
_CELLS = 1 << 20
#: Length of an interval at first, s: a power of two, so that bounds stay exact when pairs are merged.
_WIDTH = 2.0**-40


class LinkUse:
    """Bytes over K links in equal intervals from 0 on; a run that grows longer merges them in pairs."""

    def __init__(self, links: int) -> None:
        bins = min(_BINS, _CELLS // max(links, 1))
        self._cells = np.zeros((max(1 << (bins.bit_length() - 1), 2), links))
        self._width = _WIDTH

    def add(self, carried: np.ndarray, start: float, end: float) -> None:
        """Spreads float64[K] bytes evenly over the time from start to end, s."""
        while end > len(self._cells) * self._width:
            self._merge()
        first = min(int(start / self._width), len(self._cells) - 1)
        last = max(first, int(np.ceil(end / self._width)) - 1)
        if first == last:
            self._cells[first] += carried
            return
        bounds = np.clip(np.arange(first, last + 2) * self._width, start, end)
        shares = np.diff(bounds) / (end - start)
        self._cells[first : last + 1] += shares[:, None] * carried

    def _merge(self) -> None:
        half = len(self._cells) // 2
        self._cells[:half] = self._cells[0::2] + self._cells[1::2]
        self._cells[half:] = 0.0
        self._width *= 2

    def rows(self) -> dict[str, np.ndarray]:
        """Columns of the table `link_use`, by link and time."""
        link, bin_ = np.nonzero(self._cells.T)
        return {
            "link": link,
            "start": bin_ * self._width,
            "end": (bin_ + 1) * self._width,
            "bytes": self._cells[bin_, link],
        }


@dataclass(frozen=True, slots=True, eq=False)
class Narrowest:
    """Per member of an exchange: the link with least room on the path of the flow that ended last for it.

    link  int64[M]; -1 where nothing was sent to or from the member over any link
    own   float64[M] bytes that flows of the member, both ways, put on that link
    all   float64[M] bytes that the whole exchange put on it
    payload  float64[M] of these, what is not added by protocols
    """

    link: np.ndarray
    own: np.ndarray
    all: np.ndarray
    payload: np.ndarray


def narrowest(meeting: Meeting, bandwidth: np.ndarray) -> Narrowest:
    """Of an exchange with flows that is over. bandwidth: float64[K] bytes/s that links had meanwhile."""
    rounds, members = meeting.routed.rounds, len(meeting.routed.ranks)
    link, own = np.full(members, -1), np.zeros(members)
    ends = np.concatenate([one.source for one in rounds]), np.concatenate([one.target for one in rounds])
    paths = _paths(meeting)
    last = _last_flows(*ends, np.concatenate(meeting.ends), members)
    some = np.flatnonzero(last >= 0)
    carried = meeting.carried[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds = np.append(np.where(carried > 0, carried / bandwidth, 0.0), -1.0)
    path = paths[last[some]]
    link[some] = path[np.arange(len(some)), np.argmax(seconds[path], axis=1)]
    for rows, size, way in _crossings(meeting):
        for end in ends:
            member = end[rows]
            over = (way == np.where(link < 0, -2, link)[member, None]).any(axis=1)
            own += np.bincount(member[over], weights=size[over], minlength=members)
    of_all, payload = (np.where(link >= 0, meeting.carried[row][link], 0.0) for row in (0, 1))
    return Narrowest(link, own, of_all, payload)


def _paths(meeting: Meeting) -> np.ndarray:
    """int[F, P] the links that each flow of all rounds took at last, padded with -1."""
    parts = [one.flows.links for one in meeting.routed.rounds]
    most = max(part.shape[1] for part in (*parts, *(one.after for one in meeting.shifts)))
    if len(parts) == 1 and parts[0].shape[1] == most and not meeting.shifts:
        return parts[0]
    padded = [np.pad(p, ((0, 0), (0, most - p.shape[1])), constant_values=-1) for p in parts]
    paths = np.concatenate(padded)
    first = np.cumsum([0, *map(len, parts)])
    for one in meeting.shifts:
        rows = first[one.at] + one.flows
        paths[rows] = -1
        paths[rows, : one.after.shape[1]] = one.after
    return paths


def _crossings(meeting: Meeting) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """int[A] flows of all rounds, float64[A] bytes and int[A, P] the links that these crossed.

    Of a flow that left its links, what it had still to send is taken from them.
    """
    first = np.cumsum([0, *(len(one.source) for one in meeting.routed.rounds)])
    for at, one in enumerate(meeting.routed.rounds):
        yield np.arange(first[at], first[at + 1]), one.flows.size, one.flows.links
    for shift in meeting.shifts:
        rows = first[shift.at] + shift.flows
        yield rows, -shift.size, shift.before
        yield rows, shift.size, shift.after


def _last_flows(source: np.ndarray, target: np.ndarray, end: np.ndarray, members: int) -> np.ndarray:
    """int64[M] the flow to or from each member that ended last; of several one that came to it; -1: none."""
    latest = np.full(members, -np.inf)
    np.maximum.at(latest, source, end)
    np.maximum.at(latest, target, end)
    last = np.full(members, -1)
    for member in (source, target):
        # Backwards, so that the first of several is the one that stays.
        rows = np.flatnonzero(end == latest[member])[::-1]
        last[member[rows]] = rows
    return last
