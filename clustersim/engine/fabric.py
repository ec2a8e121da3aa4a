"""Ranks meet, bytes move: exchanges of a running simulation, over one network model."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from math import inf

import numpy as np
import simpy

from clustersim.physics.exchanges import RoutedExchange, RoutedRound
from clustersim.physics.network import Flows, Network

#: Below so many finished flows a plain loop is faster than array operations; both do the same.
_FEW = 24


class Meeting:
    """One exchange while it happens. Members are numbered group * n + position.

    met       float s per member: when it could begin; the last to come lets its group begin
    released  per member: the member that was waited for last
    done      float s per member: when its last byte had left and arrived; NaN before
    ends      per round float64[F] s: when each flow's last byte arrived
    """

    def __init__(self, fabric: Fabric, routed: RoutedExchange) -> None:
        members = len(routed.ranks)
        self.routed = routed
        self.met = [float("nan")] * members
        self.released = list(range(members))
        self.done = [float("nan")] * members
        self.ends = [np.full(len(r.source), np.nan) for r in routed.rounds]
        self.starts = [np.full(len(r.source), np.nan) for r in routed.rounds]
        self._fabric = fabric
        self._pending = [r.pending.copy() for r in routed.rounds]
        self._round = [-1] * members
        self._missing = [routed.members] * (members // routed.members)
        self._events: list[simpy.Event | None] = [None] * members
        self._news: dict[int, simpy.Event] = {}

    def arrive(self, member: int) -> simpy.Event:
        """Member is ready. Returns the event of its being done."""
        event = self._done_event(member)
        if self.routed.meets == "each":
            self.met[member] = self._fabric.env.now
            self._begin([member])
            return event
        n = self.routed.members
        group = member // n
        self._missing[group] -= 1
        if self._missing[group] == 0:
            everybody = list(range(group * n, group * n + n))
            now = self._fabric.env.now
            for m in everybody:
                self.met[m] = now
                self.released[m] = member
            self._begin(everybody)
        return event

    def expect(self, member: int) -> simpy.Event:
        """A receiver that need not be there for others to send. Returns the event of its being done."""
        if self._round[member] < 0:
            self.met[member] = self._fabric.env.now
            self._begin([member])
        return self._done_event(member)

    def _done_event(self, member: int) -> simpy.Event:
        event = self._events[member]
        if event is None:
            event = self._events[member] = self._fabric.env.event()
            if self.done[member] == self.done[member]:
                event.succeed()
        return event

    def news(self, member: int) -> simpy.Event:
        """The next thing that happens to this member: its exchange begins, or some flow arrives."""
        return self._news.setdefault(member, self._fabric.env.event())

    def flow_done(self, at: int, positions: np.ndarray) -> None:
        """The network has delivered flows of round `at`."""
        one_round = self.routed.rounds[at]
        # The clock's own time: the network's may be an ulp later than when the receiver goes on.
        self.ends[at][positions] = self._fabric.env.now
        pending = self._pending[at]
        if len(positions) < _FEW:
            touched: set[int] = set()
            for p in positions.tolist():
                source, target = int(one_round.source[p]), int(one_round.target[p])
                pending[source] -= 1
                pending[target] -= 1
                touched.update((source, target))
                if self.routed.meets == "each":
                    self.released[target] = source
            ordered = sorted(touched)
        else:
            ends = np.concatenate([one_round.source[positions], one_round.target[positions]])
            counts = np.bincount(ends, minlength=len(pending))
            pending -= counts
            if self.routed.meets == "each":
                for p in positions.tolist():
                    self.released[int(one_round.target[p])] = int(one_round.source[p])
            ordered = np.flatnonzero(counts).tolist()
        if self._news:
            self._tell(ordered)
        self._advance([m for m in ordered if pending[m] == 0 and self._round[m] == at])

    def _tell(self, members: Sequence[int]) -> None:
        for member in members:
            event = self._news.pop(member, None)
            if event is not None:
                event.succeed()

    def _begin(self, members: list[int]) -> None:
        for member in members:
            self._round[member] = 0
        if self._news:
            self._tell(members)
        self._enter(members, 0)

    def _advance(self, members: list[int]) -> None:
        """Members are through their round and go on, each for itself."""
        by_round: dict[int, list[int]] = {}
        for member in members:
            self._round[member] += 1
            by_round.setdefault(self._round[member], []).append(member)
        for at, ready in by_round.items():
            self._enter(ready, at)

    def _enter(self, members: list[int], at: int) -> None:
        if at == len(self.routed.rounds):
            self._finish(members)
            return
        self._fabric.send(self, at, members)
        pending = self._pending[at]
        through = [m for m in members if pending[m] == 0]
        if through:
            self._advance(through)

    def _finish(self, members: list[int]) -> None:
        now = self._fabric.env.now
        for member in members:
            self.done[member] = now
            event = self._events[member]
            if event is not None:
                event.succeed()
        if self._news:
            self._tell(members)


class Fabric:
    """Hands flows of meetings to the network and the network's answers back to the meetings."""

    def __init__(self, env: simpy.Environment, network: Network) -> None:
        self.env = env
        self.now = 0.0
        self._network = network
        self._in_flight: dict[int, tuple[Meeting, int, np.ndarray | None, int]] = {}
        self._keys = 0
        self._due: dict[tuple[int, int], tuple[Meeting, int, list[int]]] = {}
        self._armed = inf
        self._timer: simpy.Event | None = None

    def send(self, meeting: Meeting, at: int, members: list[int]) -> None:
        """Starts what `members` send in round `at`, together with all that starts at this instant."""
        if not self._due:
            self.env.timeout(0).callbacks.append(lambda _: self._flush())
        entry = self._due.setdefault((id(meeting), at), (meeting, at, []))
        entry[2].extend(members)

    def set_capacity(self, link: int, bandwidth: float) -> None:
        """A link's bandwidth from now on."""
        self._network.set_capacity(link, bandwidth, self._tick())
        self._arm()

    def _tick(self) -> float:
        # The network may be an ulp ahead of the clock, which adds delays; it must never go back.
        self.now = max(self.now, self.env.now)
        return self.now

    def _flush(self) -> None:
        due, self._due = self._due, {}
        now = self._tick()
        for meeting, at, members in due.values():
            flows, positions = _flows_of(meeting.routed.rounds[at], sorted(members))
            if flows is None:
                continue
            where = slice(None) if positions is None else positions
            meeting.starts[at][where] = self.env.now
            self._in_flight[self._keys] = (meeting, at, positions, len(flows.size))
            self._network.start(flows, self._keys, now)
            self._keys += 1
        self._arm()

    def _arm(self) -> None:
        at = self._network.next_finish()
        if at < self._armed:
            self._armed = at
            self._timer = timer = self.env.timeout(max(0.0, at - self.env.now))
            timer.callbacks.append(lambda _: self._fire(timer, at))

    def _fire(self, timer: simpy.Event, at: float) -> None:
        # SimPy cannot take an event back: one that an earlier time has overtaken does nothing.
        if timer is not self._timer:
            return
        self._armed = inf
        self.now = max(self._tick(), at)
        for key, done in self._network.finish(self.now):
            assert isinstance(key, int)
            meeting, round_, positions, left = self._in_flight[key]
            if left == len(done):
                del self._in_flight[key]
            else:
                self._in_flight[key] = (meeting, round_, positions, left - len(done))
            meeting.flow_done(round_, done if positions is None else positions[done])
        self._arm()


def _flows_of(one_round: RoutedRound, members: list[int]) -> tuple[Flows | None, np.ndarray | None]:
    """The flows these members send, and their positions in the round (None for all of them)."""
    if len(members) == len(one_round.pending):
        return one_round.flows, None
    first = one_round.first
    parts = [np.arange(first[m], first[m + 1]) for m in members]
    positions = np.concatenate(parts)
    if not len(positions):
        return None, None
    if len(positions) == len(one_round.source):
        return one_round.flows, None
    whole = one_round.flows
    sub = Flows(
        whole.size[positions], whole.weight[positions], whole.links[positions], whole.latency[positions]
    )
    return sub, positions


Process = Generator[simpy.Event, object, None]
