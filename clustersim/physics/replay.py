"""Flows that wait for flows, played through any network model."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from clustersim.physics.network import Flows, Network


@dataclass(frozen=True, eq=False, slots=True)
class Traffic:
    """F flows over K links. A flow is released at its start, or when all it waits for are done, if later.

    bandwidth    float64[K] bytes/s, > 0
    size         float64[F] bytes, >= 0; a flow without bytes is done after its latency
    start        float64[F] s
    latency      float64[F] s, summed over the path
    links        int32[F, P] link numbers in path order, padded with -1; a flow may cross none
    after_first  int64[F + 1]
    after        int64[A] flow f waits for the flows after[after_first[f]:after_first[f + 1]]; no circle
    """

    bandwidth: np.ndarray
    size: np.ndarray
    start: np.ndarray
    latency: np.ndarray
    links: np.ndarray
    after_first: np.ndarray
    after: np.ndarray


def replay(traffic: Traffic, network: Network) -> tuple[np.ndarray, np.ndarray]:
    """When each flow is released and when it is done.

    network  without traffic, over the links of `traffic`
    Returns  release, finish: float64[F] s; what is released at one moment is started together
    """
    following = _Following(traffic)
    agenda = _Agenda(traffic.start, following.free())
    release, finish = np.full((2, len(traffic.size)), np.nan)
    starts: list[np.ndarray] = []
    while (now := min(agenda.next(), network.next_finish())) < np.inf:
        for key, positions in network.finish(now):
            assert isinstance(key, int)
            done = starts[key][positions]
            finish[done] = now
            agenda.add(following.released_by(done))
        ready = agenda.take(now)
        if len(ready):
            release[ready] = now
            network.start(_flows(traffic, ready), len(starts), now)
            starts.append(ready)
    return release, finish


def _flows(traffic: Traffic, chosen: np.ndarray) -> Flows:
    """These flows, each of weight 1. What has no bytes crosses no link: it only waits for its latency."""
    size = traffic.size[chosen]
    links = np.where((size > 0)[:, None], traffic.links[chosen], np.int32(-1))
    return Flows(np.where(size > 0, size, 1.0), np.ones(len(size)), links, traffic.latency[chosen])


class _Following:
    """Who waits for whom, seen from those that are waited for."""

    def __init__(self, traffic: Traffic) -> None:
        flows = len(traffic.size)
        self._missing = np.diff(traffic.after_first)
        order = np.argsort(traffic.after, kind="stable")
        self._followers = np.repeat(np.arange(flows), self._missing)[order]
        counts = np.bincount(traffic.after, minlength=flows)
        self._first = np.concatenate([[0], np.cumsum(counts)])

    def free(self) -> np.ndarray:
        """The flows that wait for none."""
        return np.flatnonzero(self._missing == 0)

    def released_by(self, done: np.ndarray) -> np.ndarray:
        """The flows that wait for none any more now that these are done."""
        first = self._first[done]
        counts = self._first[done + 1] - first
        if not counts.any():
            return np.empty(0, dtype=np.int64)
        before = np.cumsum(counts) - counts
        freed = self._followers[np.repeat(first - before, counts) + np.arange(counts.sum())]
        np.subtract.at(self._missing, freed, 1)
        return np.unique(freed[self._missing[freed] == 0])


class _Agenda:
    """Flows that wait for nothing but their start."""

    def __init__(self, start: np.ndarray, flows: np.ndarray) -> None:
        self._start = start
        self._sorted = flows[np.argsort(start[flows], kind="stable")]
        self._times = start[self._sorted]
        self._at = 0
        self._later: list[tuple[float, int]] = []

    def next(self) -> float:
        """When the next of them starts, s; inf if there is none."""
        first = float(self._times[self._at]) if self._at < len(self._times) else np.inf
        return min(first, self._later[0][0]) if self._later else first

    def add(self, flows: np.ndarray) -> None:
        """More of them; their start may be over."""
        for flow in flows.tolist():
            heappush(self._later, (float(self._start[flow]), flow))

    def take(self, now: float) -> np.ndarray:
        """Those whose start has come, in the order of their numbers."""
        end = self._at + int(np.searchsorted(self._times[self._at :], now, side="right"))
        ready = self._sorted[self._at : end]
        self._at = end
        late = []
        while self._later and self._later[0][0] <= now:
            late.append(heappop(self._later)[1])
        return np.sort(np.concatenate([ready, np.array(late, dtype=np.int64)]))
