"""Chunk by chunk through queues: the slow reference that judges the faster models.

A flow is cut into chunks. Every link serves one chunk at a time; the others wait in its queue.

**Whose chunk is next.** `fair`: every flow has a queue of its own at each link of its path, and the
link takes the chunk of the flow it has served least, in bytes per weight; a flow that comes to the
link, or comes back to it, counts from where the others are. `fifo`: one queue per link, first come
first served; only at the first link of their paths do the flows take turns, as under `fair`.

**How much is under way.** A flow has at most `window` chunks per link of its path in the network;
the next one is sent when one has arrived. So what a flow cannot bring through its narrowest link
does not take bandwidth from others further up. Turns at every link and windows together make a
network max-min fair (Hahne, Round-robin scheduling for max-min fairness in data networks, IEEE
JSAC 9(7), 1991), as the fluid is; `fifo` shares by arrivals and is not.

**When a chunk goes on.** `store_and_forward`: when its last byte has come. `cut_through`: as soon as
its first byte has come and the next link can serve it without a gap. A next link that is no faster
begins at once; a faster one begins so late that its last byte leaves as the last byte comes, for a
link that waits for bytes would be lost to others meanwhile. So every link is busy size / bandwidth
with a chunk, and no link ends with a chunk before the link before it has.

**Full queues.** Under `fifo` a queue may be bounded by `buffer` bytes; then a link begins with a
chunk only when the next queue has room for all of it, which it keeps until it has left that link.
Until then the link stands still, and all that is behind the chunk with it, as in lossless fabrics.
Links that wait for each other in a circle would wait for ever: that is a `Deadlock`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count, pairwise
from math import ceil, inf
from typing import Any

import numpy as np

from clustersim.errors import ClustersimError, pick
from clustersim.physics.network import Finished, Flows
from clustersim.physics.queueing import QUEUEING, Chunk, Flow, Hop, Link
from clustersim.units import show

#: Chunks that are served in a run at most, counted at every link; at 3 to 5 us each, 1 to 2 minutes.
MOST_SERVICES = 20_000_000

#: A flow is done when less is missing, bytes.
_DONE = 0.5


class Deadlock(ClustersimError):
    """Links with full queues wait for each other in a circle. links: their numbers, in order."""

    def __init__(self, links: tuple[int, ...]) -> None:
        super().__init__(links)
        self.links = links

    def __str__(self) -> str:
        circle = " -> ".join(str(link) for link in (*self.links, self.links[0]))
        return f"the full queues of links {circle} wait for each other for ever; use larger buffers"


@dataclass(frozen=True, slots=True)
class Queues:
    """How links serve chunks, and how many of them may be about; the head of the module says more.

    queueing   "fair" or "fifo"
    switching  "store_and_forward" or "cut_through"
    window     chunks of a flow that may be under way per link of its path, at least 1
    buffer     bytes that a queue of "fifo" holds, 0: no bound; otherwise at least two chunks
    """

    queueing: str = "fair"
    switching: str = "store_and_forward"
    window: int = 2
    buffer: float = 0.0


#: What is taken where nothing is said; it judges the fluid.
USUAL = Queues()


_SWITCHING = {"store_and_forward": False, "cut_through": True}


def services(flows: Flows, chunk: float) -> float:
    """How often a chunk of these flows is served by a link; chunk: bytes."""
    chunks = np.maximum(np.ceil((flows.size - _DONE) / chunk), 1)
    return float((chunks * (flows.links >= 0).sum(axis=1)).sum())


def refuse_beyond(expected: float, chunk: float) -> None:
    """Raises ClustersimError if so many services are more than MOST_SERVICES."""
    if expected > MOST_SERVICES:
        raise ClustersimError(
            f"network.chunk = {show(chunk, 'size')}: links would serve at least {expected:,.0f} chunks, "
            f'at most {MOST_SERVICES:,} are; take larger chunks, less traffic, or fidelity = "fluid"'
        )


class Chunked:
    """Flows move in chunks that queue at every link."""

    def __init__(self, bandwidth: np.ndarray, chunk: float, queues: Queues = USUAL) -> None:
        """bandwidth float64[K] bytes/s; chunk: bytes of a chunk, the last of a flow is shorter."""
        assert chunk > 0 and queues.window > 0 and (not queues.buffer or queues.buffer >= 2 * chunk)
        bounded = queues.queueing == "fifo" and queues.buffer > 0
        discipline = pick(QUEUEING, queues.queueing, "network.queueing")
        self._cut_through = pick(_SWITCHING, queues.switching, "network.switching")
        self._counter = count()
        self._links = [
            Link(n, float(capacity), discipline(self._counter), queues.buffer if bounded else inf)
            for n, capacity in enumerate(bandwidth)
        ]
        self._chunk = chunk
        self._window = queues.window
        self._events: list[tuple[float, int, Callable[[float, Any, Any], None], Any, Any]] = []
        self._flows: dict[Hashable, dict[int, Flow]] = {}
        self._finished: Finished = []
        self._now = -inf
        self._services = 0.0

    def start(self, flows: Flows, key: Hashable, now: float) -> None:
        """Raises ClustersimError when it would have more chunks to serve than MOST_SERVICES."""
        self._services += services(flows, self._chunk)
        refuse_beyond(self._services, self._chunk)
        self._flows[key] = started = {}
        paths = [[self._links[link] for link in path if link >= 0] for path in flows.links.tolist()]
        sizes, weights, latency = flows.size.tolist(), flows.weight.tolist(), flows.latency.tolist()
        for position, (path, size, weight) in enumerate(zip(paths, sizes, weights, strict=True)):
            chunks = max(ceil((size - _DONE) / self._chunk), 1)
            last, room = size - (chunks - 1) * self._chunk, self._window * len(path)
            flow = Flow(key, position, weight, chunks, last, size, room)
            flow.hops = [Hop(flow, number, link) for number, link in enumerate(path)]
            for hop, after in pairwise(flow.hops):
                hop.after = after
            started[position] = flow
            self._push(now + latency[position], self._begin, flow, None)

    def set_capacity(self, link: int, bandwidth: float, now: float) -> None:
        self._run(now)
        state = self._links[link]
        if state.serving is not None:
            state.left = max(state.left - (now - state.since) * state.capacity, 0.0)
        state.capacity, state.since = bandwidth, now
        self._time(state)

    def stop(self, key: Hashable, positions: np.ndarray, now: float) -> np.ndarray:
        self._run(now)
        found = [self._forget(key, position) for position in positions.tolist()]
        flows = [flow for flow in found if flow is not None]
        for flow in flows:
            self._drop(flow, now)
        for link in {hop.link.number: hop.link for flow in flows for hop in flow.hops}.values():
            self._wake(link, now)
            self._serve(link, now)
        return np.array([0.0 if flow is None else flow.missing for flow in found])

    def depths(self, end: float) -> tuple[np.ndarray, np.ndarray]:
        """How many bytes waited for each link over time, without those at the source of their flow.

        end      when the run is over, s
        Returns  int[N] link, float64[N, 4] begin s, end s, mean bytes, most bytes
        """
        found = [link.depth.intervals(end) for link in self._links]
        return np.repeat(np.arange(len(found)), [len(rows) for rows in found]), np.concatenate(found)

    def next_finish(self) -> float:
        if self._finished:
            return self._now
        while self._events and self._void(*self._events[0]):
            heappop(self._events)
        return self._events[0][0] if self._events else inf

    def finish(self, now: float) -> Finished:
        self._run(now)
        finished, self._finished = self._finished, []
        return finished

    def _push(self, time: float, act: Callable[[float, Any, Any], None], what: Any, detail: Any) -> None:
        heappush(self._events, (time, next(self._counter), act, what, detail))

    def _void(self, time: float, number: int, act: object, what: Any, detail: Any) -> bool:
        return isinstance(what, Link) and what.version != detail

    def _run(self, now: float) -> None:
        events = self._events
        while events and events[0][0] <= now:
            time, _, act, what, detail = heappop(events)
            act(time, what, detail)
        self._now = now

    def _begin(self, now: float, flow: Flow, _: None) -> None:
        """The latency is over: the flow sends its first chunk."""
        if flow.stopped:
            return
        if not flow.hops:
            self._arrive(flow, flow.missing, now)
            return
        self._send(flow)
        self._serve(flow.hops[0].link, now)

    def _send(self, flow: Flow) -> None:
        """Has one fresh chunk wait at the flow's first link, if the flow may send one."""
        first = flow.hops[0]
        if flow.unsent > 0 and flow.room > 0 and not first.waiting:
            flow.unsent -= 1
            flow.room -= 1
            # The last chunk is what is left, and up to half a byte more than the others.
            size = self._chunk if flow.unsent else flow.last
            first.link.queue.add(first, Chunk(size))

    def _come(self, hop: Hop, chunk: Chunk, now: float) -> None:
        """A chunk comes to another link than its flow's first."""
        chunk.come = hop.number + 1
        hop.link.queue.add(hop, chunk)
        hop.link.depth.change(chunk.size, now)
        self._serve(hop.link, now)

    def _serve(self, link: Link, now: float) -> None:
        """Begins with the next chunk, unless one is in service or the next buffer is full."""
        if link.serving is not None or link.blocked is not None:
            return
        entry = link.queue.first()
        if entry is None:
            return
        hop, chunk = entry
        after = hop.after
        if after is not None and after.link.room < inf:
            if after.link.room < chunk.size:
                self._block(link, after.link)
                return
            after.link.room -= chunk.size
            after.occupied += chunk.size
        link.queue.take()
        link.serving, link.left, link.since = entry, chunk.size, now
        if hop.number:
            link.depth.change(-chunk.size, now)
        else:
            self._send(hop.flow)
        self._time(link)
        if self._cut_through and after is not None:
            self._go_ahead(link, after, chunk, now)

    def _forget(self, key: Hashable, position: int) -> Flow | None:
        """No longer knows the flow. Returns None if it ended at this very instant and nobody was told."""
        flow = self._flows.get(key, {}).pop(position, None)
        if flow is None:
            self._finished = [(k, p) for k, p in self._finished if (k, int(p[0])) != (key, position)]
        elif not self._flows[key]:
            del self._flows[key]
        return flow

    def _block(self, link: Link, full: Link) -> None:
        """The link waits for room. Raises Deadlock if that would be for ever."""
        link.blocked = full
        full.waiting.append(link)
        circle, other = [link.number], full
        while other is not link:
            if other.blocked is None:
                return
            circle.append(other.number)
            other = other.blocked
        raise Deadlock(tuple(circle))

    def _wake(self, link: Link, now: float) -> None:
        """There is more room: those that wait for it try again, the longest waiting first."""
        for _ in range(len(link.waiting)):
            other = link.waiting.popleft()
            other.blocked = None
            self._serve(other, now)

    def _drop(self, flow: Flow, now: float) -> None:
        """Forgets a flow and its chunks wherever they are."""
        flow.stopped = True
        for hop in flow.hops:
            link, dropped = hop.link, hop.link.queue.drop(hop)
            if hop.number:
                link.depth.change(-dropped, now)
            if link.serving is not None and link.serving[0] is hop:
                link.serving = None
                link.version += 1
            link.room += hop.occupied
            hop.occupied = 0.0

    def _time(self, link: Link) -> None:
        """Notes when the chunk in service is through."""
        link.version += 1
        if link.serving is not None and link.capacity > 0:
            self._push(link.since + link.left / link.capacity, self._through, link, link.version)

    def _go_ahead(self, link: Link, after: Hop, chunk: Chunk, now: float) -> None:
        """Lets a chunk come to the next link when that can serve it without a gap."""
        if not link.capacity:
            return
        needed = chunk.size / after.link.capacity if after.link.capacity else inf
        begin = now + chunk.size / link.capacity - needed
        if begin <= now:
            self._come(after, chunk, now)
        else:
            self._push(begin, self._ahead, after, chunk)

    def _ahead(self, now: float, hop: Hop, chunk: Chunk) -> None:
        if not hop.flow.stopped and chunk.come == hop.number:
            self._come(hop, chunk, now)

    def _through(self, now: float, link: Link, version: int) -> None:
        if link.version != version:
            return
        assert link.serving is not None
        hop, chunk = link.serving
        link.serving, chunk.served = None, max(chunk.served, hop.number + 1)
        # If the link before it became slower meanwhile, its last byte is still to come.
        if chunk.left == hop.number:
            self._leave(hop, chunk, now)
        self._serve(link, now)

    def _leave(self, hop: Hop, chunk: Chunk, now: float) -> None:
        """The last byte has left a link."""
        after, chunk.left = hop.after, hop.number + 1
        if after is None:
            self._arrive(hop.flow, chunk.size, now)
        elif chunk.come == chunk.left:
            self._come(after, chunk, now)
        elif chunk.served > chunk.left:
            self._leave(after, chunk, now)
        if hop.occupied:
            hop.occupied -= chunk.size
            hop.link.room += chunk.size
            self._wake(hop.link, now)

    def _arrive(self, flow: Flow, size: float, now: float) -> None:
        flow.missing -= size
        flow.room += 1
        if flow.missing < _DONE:
            self._forget(flow.key, flow.position)
            self._finished.append((flow.key, np.array([flow.position])))
        elif flow.unsent > 0:
            self._send(flow)
            self._serve(flow.hops[0].link, now)
