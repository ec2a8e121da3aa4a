"""Chunk by chunk through queues: the slow reference that judges the faster models.

Every link serves one chunk at a time, first come first served, and stores it before it forwards it.
At the first link of a path the flows take turns: the link's next fresh chunk is taken from the flow
that has sent the fewest bytes per weight, a new flow counting from where the others are. So flows of
weight 1 alternate chunk by chunk, and flows that weigh as their bytes keep to the same fraction sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count

import numpy as np

from clustersim.physics.network import Finished, Flows

#: A flow is done when less is missing, bytes.
_DONE = 0.5


@dataclass(slots=True)
class _Flow:
    """One flow: bytes not yet sent from its source, bytes not yet arrived, and its turn."""

    key: Hashable
    position: int
    path: list[int]
    weight: float
    unsent: float
    missing: float
    turn: float = 0.0


@dataclass(slots=True)
class _Link:
    """One link: the chunk in service, those that queue, and the flows that begin here.

    capacity  bytes/s
    queue     (flow, hop, bytes) in order of arrival; None is a place for a fresh chunk, of whichever
              flow has its turn then; at most one is there at a time (`offered`)
    sources   heap of (turn, number, flow): those with fresh chunks for this link
    turn      where the flow stood whose fresh chunk was served last, bytes sent per weight
    serving   the chunk in service, None if idle; `left` bytes of it were left at `since`
    """

    capacity: float
    queue: deque[tuple[_Flow, int, float] | None] = field(default_factory=deque)
    sources: list[tuple[float, int, _Flow]] = field(default_factory=list)
    offered: bool = False
    turn: float = 0.0
    serving: tuple[_Flow, int, float] | None = None
    left: float = 0.0
    since: float = 0.0
    version: int = 0


class Chunked:
    """Flows move in chunks that queue at every link: store and forward."""

    def __init__(self, bandwidth: np.ndarray, chunk: float) -> None:
        """bandwidth float64[K] bytes/s; chunk: bytes of a chunk, the last of a flow is shorter."""
        assert chunk > 0
        self._links = [_Link(float(capacity)) for capacity in bandwidth]
        self._chunk = chunk
        self._events: list[tuple[float, int, _Flow | _Link, int]] = []
        self._counter = count()
        self._finished: Finished = []
        self._flows: dict[tuple[Hashable, int], _Flow] = {}

    def start(self, flows: Flows, key: Hashable, now: float) -> None:
        paths = [[link for link in path if link >= 0] for path in flows.links.tolist()]
        sizes, weights = flows.size.tolist(), flows.weight.tolist()
        for position, (path, size, weight) in enumerate(zip(paths, sizes, weights, strict=True)):
            flow = _Flow(key, position, path, weight, size, size if path else 0.0)
            self._flows[key, position] = flow
            self._push(now + float(flows.latency[position]), flow, 0)

    def set_capacity(self, link: int, bandwidth: float, now: float) -> None:
        state = self._links[link]
        if state.serving is not None:
            state.left = max(state.left - (now - state.since) * state.capacity, 0.0)
        state.capacity, state.since = bandwidth, now
        self._time(state)

    def next_finish(self) -> float:
        while self._events and self._void(*self._events[0]):
            heappop(self._events)
        return self._events[0][0] if self._events else np.inf

    def finish(self, now: float) -> Finished:
        while self.next_finish() <= now:
            time, _, what, _ = heappop(self._events)
            if isinstance(what, _Flow):
                self._begin(what, time)
            else:
                self._forward(what, time)
        finished, self._finished = self._finished, []
        return finished

    def stop(self, key: Hashable, positions: np.ndarray, now: float) -> np.ndarray:
        flows = [self._flows.pop((key, p)) for p in positions.tolist()]
        gone = {id(flow) for flow in flows}
        self._events = [event for event in self._events if id(event[2]) not in gone]
        heapify(self._events)
        for link in self._links:
            link.sources = [entry for entry in link.sources if id(entry[2]) not in gone]
            heapify(link.sources)
            link.queue = deque(c for c in link.queue if c is None or id(c[0]) not in gone)
            if link.offered and not link.sources:
                link.queue.remove(None)
                link.offered = False
            if link.serving is not None and id(link.serving[0]) in gone:
                link.serving = None
                link.version += 1
                self._serve(link, now)
        return np.array([flow.missing for flow in flows])

    def _push(self, time: float, what: _Flow | _Link, version: int) -> None:
        heappush(self._events, (time, next(self._counter), what, version))

    def _void(self, time: float, number: int, what: _Flow | _Link, version: int) -> bool:
        return isinstance(what, _Link) and what.version != version

    def _begin(self, flow: _Flow, now: float) -> None:
        """The latency is over: the flow takes its place among the sources of its first link."""
        if not flow.path:
            self._arrive(flow, 0.0)
            return
        link = self._links[flow.path[0]]
        flow.turn = link.turn
        self._line_up(link, flow)
        self._serve(link, now)

    def _line_up(self, link: _Link, flow: _Flow) -> None:
        """Its turn is the middle of its next chunk, so that light flows come neither first nor last."""
        half = min(self._chunk, flow.unsent) / 2 / flow.weight
        heappush(link.sources, (flow.turn + half, next(self._counter), flow))

    def _fresh(self, link: _Link) -> tuple[_Flow, int, float]:
        """The next chunk of the flow whose turn it is."""
        _, _, flow = heappop(link.sources)
        size = min(self._chunk, flow.unsent)
        link.turn = flow.turn
        flow.unsent -= size
        flow.turn += size / flow.weight
        if flow.unsent > 0:
            self._line_up(link, flow)
        link.offered = False
        return flow, 0, size

    def _offer(self, link: _Link) -> None:
        """Keeps a place in the queue for a fresh chunk, if there is one."""
        if link.sources and not link.offered:
            link.queue.append(None)
            link.offered = True

    def _serve(self, link: _Link, now: float) -> None:
        """Begins with the next chunk, unless one is in service."""
        self._offer(link)
        if link.serving is not None or not link.queue:
            return
        link.serving = _, _, link.left = link.queue.popleft() or self._fresh(link)
        link.since = now
        self._offer(link)
        self._time(link)

    def _time(self, link: _Link) -> None:
        """Notes when the chunk in service is through."""
        link.version += 1
        if link.serving is not None and link.capacity > 0:
            self._push(link.since + link.left / link.capacity, link, link.version)

    def _forward(self, link: _Link, now: float) -> None:
        assert link.serving is not None
        (flow, hop, size), link.serving = link.serving, None
        if hop + 1 < len(flow.path):
            following = self._links[flow.path[hop + 1]]
            following.queue.append((flow, hop + 1, size))
            self._serve(following, now)
        else:
            self._arrive(flow, size)
        self._serve(link, now)

    def _arrive(self, flow: _Flow, size: float) -> None:
        before, flow.missing = flow.missing, flow.missing - size
        if flow.missing < _DONE <= before or not flow.path:
            self._finished.append((flow.key, np.array([flow.position])))
            del self._flows[flow.key, flow.position]
