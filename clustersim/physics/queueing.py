"""What stands where in the chunked network: flows, their chunks, links, and whose chunk is next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from clustersim.physics.depths import Depth


@dataclass(slots=True, eq=False)
class Flow:
    """One flow.

    unsent   chunks not yet sent from its source, of which the last has `last` bytes
    missing  bytes not yet arrived
    room     chunks it may still send before one arrives
    hops     its place at every link of its path
    stopped  it was taken out; what is still noted of it says nothing
    """

    key: Hashable
    position: int
    weight: float
    unsent: int
    last: float
    missing: float
    room: int
    hops: list[Hop] = field(default_factory=list)
    stopped: bool = False


@dataclass(slots=True, eq=False)
class Hop:
    """A flow at one link of its path.

    number    of the link in the path, from 0
    after     the flow at the next link of the path, None at the last
    waiting   its chunks that wait here, if they do not stand in a common queue
    turn      bytes per weight that it has been served here, as the link counts
    occupied  bytes of the link's buffer that it holds
    """

    flow: Flow
    number: int
    link: Link
    after: Hop | None = None
    waiting: deque[Chunk] = field(default_factory=deque)
    turn: float = 0.0
    occupied: float = 0.0


@dataclass(slots=True, eq=False)
class Chunk:
    """Some bytes of a flow, and how many links of its path have what to do with them.

    come    links to which they have come; under cut-through perhaps their first byte only
    served  links that have spent size / bandwidth on them
    left    links that their last byte has left
    """

    size: float
    come: int = 1
    served: int = 0
    left: int = 0


class Turns:
    """The flows with chunks at a link, in the order of their turns: start-time fair queueing.

    now  where flows stood as they were served, the farthest of them

    The key is the middle of a flow's next chunk, so that light flows come neither first nor last.
    Source  Goyal, Vin, Cheng, Start-time fair queueing, ACM SIGCOMM 1996, with its start tags
            moved by half a chunk
    """

    def __init__(self, counter: count[int]) -> None:
        self._heap: list[tuple[float, int, Hop]] = []
        self._counter = counter
        self.now = 0.0

    def add(self, hop: Hop, chunk: Chunk) -> None:
        hop.waiting.append(chunk)
        if len(hop.waiting) == 1:
            hop.turn = max(hop.turn, self.now)
            self._line_up(hop, chunk)

    def _line_up(self, hop: Hop, chunk: Chunk) -> None:
        middle = hop.turn + chunk.size / 2 / hop.flow.weight
        heappush(self._heap, (middle, next(self._counter), hop))

    def first(self) -> tuple[Hop, Chunk] | None:
        """Whose turn it is, and its chunk."""
        while self._heap:
            hop = self._heap[0][2]
            if hop.waiting:
                return hop, hop.waiting[0]
            heappop(self._heap)
        return None

    def take(self) -> None:
        """Removes what `first` gave."""
        _, _, hop = heappop(self._heap)
        chunk = hop.waiting.popleft()
        self.now = max(self.now, hop.turn)
        hop.turn += chunk.size / hop.flow.weight
        if hop.waiting:
            self._line_up(hop, hop.waiting[0])

    def drop(self, hop: Hop) -> float:
        """Forgets a flow's chunks. Returns their bytes."""
        size = sum(chunk.size for chunk in hop.waiting)
        hop.waiting.clear()
        return size


class Line:
    """One queue for all, first come first served; the flows that begin here take turns for a place.

    A place for a fresh chunk, None, is taken by whichever flow has its turn then; there is at most
    one at a time.
    """

    def __init__(self, counter: count[int]) -> None:
        self._queue: deque[tuple[Hop, Chunk] | None] = deque()
        self._sources = Turns(counter)
        self._offered = False

    def add(self, hop: Hop, chunk: Chunk) -> None:
        if hop.number:
            self._queue.append((hop, chunk))
        else:
            self._sources.add(hop, chunk)
            self._offer()

    def _offer(self) -> None:
        if not self._offered and self._sources.first():
            self._queue.append(None)
            self._offered = True

    def first(self) -> tuple[Hop, Chunk] | None:
        while self._queue:
            found = self._queue[0] or self._sources.first()
            if found:
                return found
            # Who had taken the place has been dropped meanwhile.
            self._queue.popleft()
            self._offered = False
        return None

    def take(self) -> None:
        if self._queue.popleft() is None:
            self._sources.take()
            self._offered = False
        self._offer()

    def drop(self, hop: Hop) -> float:
        size = self._sources.drop(hop)
        size += sum(entry[1].size for entry in self._queue if entry and entry[0] is hop)
        self._queue = deque(entry for entry in self._queue if entry is None or entry[0] is not hop)
        return size


@dataclass(slots=True, eq=False)
class Link:
    """One link.

    capacity  bytes/s
    queue     what waits for it
    depth     how many bytes do, without those that wait at the source of their flow
    serving   whose chunk it serves, None: nobody's; `left` bytes of it were left at `since`
    room      bytes that its buffer has left, inf: no bound
    blocked   the link whose buffer has no room for the next chunk, None: none
    waiting   links that are blocked by this one
    """

    number: int
    capacity: float
    queue: Turns | Line
    room: float
    depth: Depth = field(default_factory=Depth)
    serving: tuple[Hop, Chunk] | None = None
    left: float = 0.0
    since: float = 0.0
    version: int = 0
    blocked: Link | None = None
    waiting: deque[Link] = field(default_factory=deque)


#: How links queue what they are to serve, by name.
QUEUEING: Mapping[str, Callable[[count[int]], Turns | Line]] = {"fair": Turns, "fifo": Line}
