"""Flows that wait for flows, played through any network model."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from clustersim.physics import sharing
from clustersim.physics.kernel import GATE, State, new_state
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


def replay_fluid(traffic: Traffic, tolerance: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """What `replay` gives with the fluid model, all of it in machine code.

    tolerance  as in Fluid
    """
    count, hops = traffic.links.shape
    state = new_state(traffic.bandwidth, count, max(hops, 1), tolerance)
    following = _Following(traffic)
    gates = np.zeros(count + 1, GATE)
    gates["first"] = following.first
    gates["missing"][:-1], gates["start"][:-1] = following.missing, traffic.start
    gates["latency"][:-1], gates["release"][:-1] = traffic.latency, traffic.start
    state = state._replace(gates=gates, following=following.followers)
    state.path[:, :hops] = np.where((traffic.size > 0)[:, None], traffic.links, -1)
    state.flows["load"], state.flows["weight"] = traffic.size, 1.0
    _announce(state, following.free(), traffic.start + traffic.latency)
    sharing.advance(*state, np.inf)
    finish = np.full(count, np.nan)
    done = int(state.totals["done"][0])
    finish[state.agenda["done"][:done]] = state.agenda["done_at"][:done]
    return gates["release"][:-1].copy(), finish


def _announce(state: State, flows: np.ndarray, begin: np.ndarray) -> None:
    """Flows that begin whatever else happens, at float64[F] times; those of one time hang together."""
    order = flows[np.argsort(begin[flows], kind="stable")]
    times = begin[order]
    same = np.append(times[1:] == times[:-1], False)
    state.flows["chain"][order] = np.where(same, np.append(order[1:], -1), -1)
    heads = np.flatnonzero(~np.append(False, same[:-1])) if len(order) else order
    # What is sorted is a heap.
    agenda = state.agenda[: len(heads)]
    agenda["time"], agenda["slot"], agenda["number"] = times[heads], order[heads], np.arange(len(heads))
    state.totals["coming"] = state.totals["number"] = len(heads)


def _flows(traffic: Traffic, chosen: np.ndarray) -> Flows:
    """These flows, each of weight 1. What has no bytes crosses no link: it only waits for its latency."""
    size = traffic.size[chosen]
    links = np.where((size > 0)[:, None], traffic.links[chosen], np.int32(-1))
    return Flows(np.where(size > 0, size, 1.0), np.ones(len(size)), links, traffic.latency[chosen])


class _Following:
    """Who waits for whom, seen from those that are waited for.

    missing    int64[F] how many flows each waits for
    followers  int64[A] those that wait for flow f are followers[first[f]:first[f + 1]]
    """

    def __init__(self, traffic: Traffic) -> None:
        flows = len(traffic.size)
        self.missing = np.diff(traffic.after_first)
        order = np.argsort(traffic.after, kind="stable")
        self.followers = np.repeat(np.arange(flows), self.missing)[order]
        counts = np.bincount(traffic.after, minlength=flows)
        self.first = np.concatenate([[0], np.cumsum(counts)])

    def free(self) -> np.ndarray:
        """The flows that wait for none."""
        return np.flatnonzero(self.missing == 0)

    def released_by(self, done: np.ndarray) -> np.ndarray:
        """The flows that wait for none any more now that these are done."""
        first = self.first[done]
        counts = self.first[done + 1] - first
        if not counts.any():
            return np.empty(0, dtype=np.int64)
        before = np.cumsum(counts) - counts
        freed = self.followers[np.repeat(first - before, counts) + np.arange(counts.sum())]
        np.subtract.at(self.missing, freed, 1)
        return np.unique(freed[self.missing[freed] == 0])


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
