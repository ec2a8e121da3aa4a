"""Ranks meet, bytes move: exchanges of a running simulation, over one network model."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from math import inf
from typing import NamedTuple

import numpy as np
import simpy

from clustersim.engine.outages import Around, Outage, Outages
from clustersim.physics.exchanges import RoutedExchange, RoutedRound, over_links
from clustersim.physics.network import Flows, Network
from clustersim.physics.sharing import DONE

#: Below so many finished flows a plain loop is faster than array operations; both do the same.
_FEW = 24

#: Times that a flow leaves links that will return. On links that flap faster than their latency it would
#: begin for ever; so it stays where it is, and waits.
_MOST_MOVES = 16


class Shift(NamedTuple):
    """Flows int[A] of round `at` that took other links: float64[A] bytes from int[A, P] to int[A, Q]."""

    at: int
    flows: np.ndarray
    size: np.ndarray
    before: np.ndarray
    after: np.ndarray


class Meeting:
    """One exchange while it happens. Members are numbered group * n + position.

    met       float s per member: when it could begin; the last to come lets its group begin
    released  per member: the member that was waited for last
    done      float s per member: when its last byte had left and arrived; NaN before
    ends      per round float64[F] s: when each flow's last byte arrived
    what      operator, layer and token batch, for messages
    shifts    flows that left the links they were laid on
    """

    def __init__(
        self, fabric: Fabric, routed: RoutedExchange, what: tuple[str, int, int] = ("exchange", -1, 0)
    ) -> None:
        members = len(routed.ranks)
        self.routed = routed
        self.what = what
        self.met = [float("nan")] * members
        self.released = list(range(members))
        self.done = [float("nan")] * members
        self.ends = [np.full(len(r.source), np.nan) for r in routed.rounds]
        self.starts = [np.full(len(r.source), np.nan) for r in routed.rounds]
        self._fabric = fabric
        self._pending = [r.pending.tolist() for r in routed.rounds]
        self._round = [-1] * members
        self._missing = [routed.members] * (members // routed.members)
        self._events: list[simpy.Event | None] = [None] * members
        self._news: dict[int, simpy.Event] = {}
        self._shifted: np.ndarray | None = None
        self.shifts: list[Shift] = []

    @property
    def carried(self) -> np.ndarray:
        """float64[2, K] as in RoutedExchange, by the paths that were taken; known when it is over."""
        return self.routed.carried if self._shifted is None else self.routed.carried + self._shifted

    def span(self) -> tuple[float, float]:
        """When its first flow was handed to the network, and when its last byte arrived, s.

        Known when it is over, of an exchange with flows.
        """
        start = min(float(starts.min()) for starts in self.starts)
        return start, max(float(ends.max()) for ends in self.ends)

    def shift(
        self, at: int, flows: np.ndarray, size: np.ndarray, before: np.ndarray, after: np.ndarray
    ) -> None:
        """Flows int[A] of round `at` take other links, int[A, Q], than before, int[A, P], with float64[A]
        bytes on the wire and their share of payload."""
        one_round = self.routed.rounds[at]
        payload = size * (one_round.payload / one_round.flows.size)[flows]
        links = self.routed.carried.shape[1]
        for path, sign in ((before, -1.0), (after, 1.0)):
            moved = np.stack([over_links(sign * part, path, links) for part in (size, payload)])
            self._shifted = moved if self._shifted is None else self._shifted + moved
        self.shifts.append(Shift(at, flows, size, before, after))

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
            senders, receivers = one_round.source[positions].tolist(), one_round.target[positions].tolist()
            for source, target in zip(senders, receivers, strict=True):
                pending[source] -= 1
                pending[target] -= 1
                touched.update((source, target))
                if self.routed.meets == "each":
                    self.released[target] = source
            ordered = sorted(touched)
        else:
            ends = np.concatenate([one_round.source[positions], one_round.target[positions]])
            counts = np.bincount(ends, minlength=len(pending))
            if self.routed.meets == "each":
                for p in positions.tolist():
                    self.released[int(one_round.target[p])] = int(one_round.source[p])
            ordered = np.flatnonzero(counts).tolist()
            for member, count in zip(ordered, counts[ordered].tolist(), strict=True):
                pending[member] -= count
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


class _Sent:
    """Flows of a round that were handed to the network together.

    positions  int[F] in the round, None for all of it
    left       how many the network has not delivered
    began      s; moves: how often they had been under way before
    away       bool[F] taken out of the network again; stranded: counted as such; None: nobody so far
    """

    __slots__ = ("at", "away", "began", "flows", "left", "meeting", "moves", "positions", "stranded")

    def __init__(
        self, meeting: Meeting, at: int, positions: np.ndarray | None, flows: Flows, began: float, moves: int
    ) -> None:
        self.meeting = meeting
        self.at = at
        self.positions = positions
        self.flows = flows
        self.left = len(flows.size)
        self.began = began
        self.moves = moves
        self.away: np.ndarray | None = None
        self.stranded: np.ndarray | None = None

    def in_round(self, rows: np.ndarray) -> np.ndarray:
        """Positions in the round of some of the flows."""
        return rows if self.positions is None else self.positions[rows]

    def under_way(self) -> np.ndarray:
        """bool[F]: in the network still."""
        ends = self.meeting.ends[self.at]
        found: np.ndarray = np.isnan(ends if self.positions is None else ends[self.positions])
        return found if self.away is None else found & ~self.away


class Fabric:
    """Hands flows of meetings to the network and the network's answers back to the meetings.

    outages  links that are slow or down, and the ways around them; None where no link ever is
    """

    def __init__(self, env: simpy.Environment, network: Network, outages: Outages | None = None) -> None:
        self.env = env
        self.now = 0.0
        self._network = network
        self._outages = outages
        self._in_flight: dict[int, _Sent] = {}
        self._keys = 0
        self._due: dict[tuple[int, int], tuple[Meeting, int, list[int]]] = {}
        self._armed = inf
        self._timer: simpy.Event | None = None
        self._reviewing = False

    def send(self, meeting: Meeting, at: int, members: list[int]) -> None:
        """Starts what `members` send in round `at`, together with all that starts at this instant."""
        if not self._due:
            self.env.timeout(0).callbacks.append(lambda _: self._flush())
        entry = self._due.setdefault((id(meeting), at), (meeting, at, []))
        entry[2].extend(members)

    def set_capacity(self, link: int, bandwidth: float, last: bool = False) -> None:
        """A link's bandwidth from now on; last: for ever."""
        self._network.set_capacity(link, bandwidth, self._tick())
        self._arm()
        if self._outages is None:
            return
        returned = link in self._outages.known
        outage = self._outages.change(link, bandwidth, last, self.env.now)
        if bandwidth == 0 and outage is not None and self._outages.reroutes:
            noticing = self.env.timeout(self._outages.after)
            noticing.callbacks.append(lambda _: self._notice(outage))
        elif returned or (last and bandwidth == 0):
            self._review_soon()

    def _notice(self, outage: Outage) -> None:
        assert self._outages is not None
        if self._outages.lasts(outage):
            self._outages.notice(outage, self.env.now)
            self._review_soon()

    def _review_soon(self) -> None:
        # A fault may befall many links at one instant: they are looked at together.
        if not self._reviewing:
            self._reviewing = True
            self.env.timeout(0).callbacks.append(lambda _: self._review())

    def _review(self) -> None:
        """Flows under way leave links that are known to be down, where they can."""
        self._reviewing = False
        outages = self._outages
        assert outages is not None
        self._drain()
        for key, sent in list(self._in_flight.items()):
            if outages.reroutes and outages.known:
                self._move(key, sent, outages)
            if outages.gone:
                self._check_hope(sent, outages)
        self._arm()

    def _move(self, key: int, sent: _Sent, outages: Outages) -> None:
        dead = outages.known if sent.moves < _MOST_MOVES else outages.known & outages.gone
        blame = outages.blame(sent.flows.links, dead)
        if not ((blame >= 0) & sent.under_way()).any():
            return
        self._drain()
        rows = np.flatnonzero((blame >= 0) & sent.under_way())
        if not len(rows):
            return
        meeting, one_round = sent.meeting, sent.meeting.routed.rounds[sent.at]
        ways = outages.ways(meeting.routed, one_round, sent.in_round(rows), outages.known)
        _strand(sent, rows[~ways.found], blame, outages)
        rows, path, latency = rows[ways.found], ways.links[ways.found], ways.latency[ways.found]
        if not len(rows):
            return
        left = self._network.stop(key, rows, self.now)
        # What was left of the start-up is still to be waited for, and the new path has its own latency.
        latency = latency + np.maximum(sent.flows.latency[rows] - (self.env.now - sent.began), 0.0)
        self._leave(key, sent, rows)
        meeting.shift(sent.at, sent.in_round(rows), left, sent.flows.links[rows], path)
        for link, count, size in _by_link(blame[rows], left):
            outages.of(link).moved += count
            outages.of(link).moved_bytes += size
        goes_on = left > DONE * sent.flows.size[rows]
        if goes_on.any():
            there = rows[goes_on]
            flows = Flows(left[goes_on], sent.flows.weight[there], path[goes_on], latency[goes_on])
            self._start(meeting, sent.at, sent.in_round(there), flows, sent.moves + 1)
        if not goes_on.all():
            meeting.flow_done(sent.at, sent.in_round(rows[~goes_on]))

    def _leave(self, key: int, sent: _Sent, rows: np.ndarray) -> None:
        if sent.away is None:
            sent.away = np.zeros(len(sent.flows.size), dtype=bool)
        sent.away[rows] = True
        sent.left -= len(rows)
        if sent.left == 0:
            del self._in_flight[key]

    def _check_hope(self, sent: _Sent, outages: Outages) -> None:
        rows = np.flatnonzero(sent.under_way())
        meeting, (name, layer, batch) = sent.meeting, sent.meeting.what
        outages.check_hope(
            meeting.routed,
            meeting.routed.rounds[sent.at],
            sent.in_round(rows),
            sent.flows.links[rows],
            f"{name} of layer {layer} in token batch {batch}",
        )

    def _tick(self) -> float:
        # The network may be an ulp ahead of the clock, which adds delays; it must never go back.
        self.now = max(self.now, self.env.now)
        return self.now

    def _flush(self) -> None:
        due, self._due = self._due, {}
        self._tick()
        outages = self._outages
        for meeting, at, members in due.values():
            one_round = meeting.routed.rounds[at]
            around = outages.around(meeting.routed, one_round) if outages and outages.known else None
            flows, positions = _flows_of(around.round if around else one_round, sorted(members))
            if flows is None:
                continue
            where = slice(None) if positions is None else positions
            meeting.starts[at][where] = self.env.now
            sent = self._start(meeting, at, positions, flows, 0)
            if outages is not None:
                if around is not None:
                    _avoid(sent, around, outages)
                if outages.gone:
                    self._check_hope(sent, outages)
        self._arm()

    def _start(
        self, meeting: Meeting, at: int, positions: np.ndarray | None, flows: Flows, moves: int
    ) -> _Sent:
        sent = self._in_flight[self._keys] = _Sent(meeting, at, positions, flows, self.env.now, moves)
        self._network.start(flows, self._keys, self.now)
        self._keys += 1
        return sent

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
        self._deliver()
        self._arm()

    def _drain(self) -> None:
        """Delivers until the network has nothing more to tell of now: what has arrived is not stopped."""
        self._deliver()
        while self._network.next_finish() <= self.now:
            self._deliver()

    def _deliver(self) -> None:
        """What the network has brought by now goes to its meetings."""
        for key, done in self._network.finish(self._tick()):
            assert isinstance(key, int)
            sent = self._in_flight[key]
            sent.left -= len(done)
            if sent.left == 0:
                del self._in_flight[key]
            sent.meeting.flow_done(sent.at, sent.in_round(done))


def _avoid(sent: _Sent, around: Around, outages: Outages) -> None:
    """Counts the flows that begin on a detour, and those that find none."""
    rows = sent.in_round(np.arange(len(sent.flows.size)))
    detoured, blame = around.detoured[rows], around.blame[rows]
    size, planned = sent.flows.size[detoured], sent.meeting.routed.rounds[sent.at].flows.links
    if detoured.any():
        there = rows[detoured]
        sent.meeting.shift(sent.at, there, size, planned[there], sent.flows.links[detoured])
    for link, count, sum_ in _by_link(blame[detoured], size):
        outages.of(link).avoided += count
        outages.of(link).avoided_bytes += sum_
    _strand(sent, np.flatnonzero((blame >= 0) & ~detoured), blame, outages)


def _strand(sent: _Sent, rows: np.ndarray, blame: np.ndarray, outages: Outages) -> None:
    """Counts flows that found no other path, each once."""
    if not len(rows):
        return
    if sent.stranded is None:
        sent.stranded = np.zeros(len(sent.flows.size), dtype=bool)
    fresh = rows[~sent.stranded[rows]]
    sent.stranded[fresh] = True
    for link, count, _ in _by_link(blame[fresh], sent.flows.size[fresh]):
        outages.of(link).stranded += count


def _by_link(blame: np.ndarray, size: np.ndarray) -> list[tuple[int, int, float]]:
    """Link, flows and bytes for every link that is to blame."""
    links, where = np.unique(blame, return_inverse=True)
    counts, sums = np.bincount(where), np.bincount(where, weights=size)
    return list(zip(links.tolist(), counts.tolist(), sums.tolist(), strict=True))


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
