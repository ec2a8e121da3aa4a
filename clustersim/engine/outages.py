"""Links that are slow or down: what the machine knows of it, and which flows can go another way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import nan

import numpy as np

from clustersim.errors import StuckError
from clustersim.physics.exchanges import RoutedExchange, RoutedRound
from clustersim.physics.network import Flows
from clustersim.plan.detours import Detours, Ways
from clustersim.plan.paths import path_latency
from clustersim.plan.topology import Topology

#: Rounds kept with their detours for exchanges that come again while the same links are down.
_ROUNDS = 64


@dataclass(slots=True)
class Outage:
    """A time in which a link carries less than it should.

    bandwidth  meanwhile, bytes/s; 0: down
    start      s; end: NaN while it lasts; noticed: when flows were first sent around it, NaN if never
    moved      flows under way that left the link for another path, with moved_bytes still to go
    avoided    flows that began on another path because of it, of avoided_bytes
    stranded   flows that found no other path and waited
    """

    link: int
    start: float
    bandwidth: float
    end: float = nan
    noticed: float = nan
    moved: int = 0
    moved_bytes: float = 0.0
    avoided: int = 0
    avoided_bytes: float = 0.0
    stranded: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Around:
    """A round as it is sent while links are down.

    round     with other paths and latencies where flows take a detour
    blame     int[F] the dead link that sends a flow around it, or for which it has to wait; else -1
    detoured  bool[F]
    """

    round: RoutedRound
    blame: np.ndarray
    detoured: np.ndarray


class Outages:
    """What is wrong with which link now, and what was.

    past   every outage so far, in order of start
    known  down, and the machine has noticed: new flows go around these
    gone   down, and not planned ever to return
    after  s from going down to being noticed
    """

    def __init__(self, topology: Topology, on_down: str, after: float) -> None:
        links = topology.links
        number = {name: rank for rank, name in enumerate(topology.gpus)}
        self.past: list[Outage] = []
        self.known: frozenset[int] = frozenset()
        self.gone: frozenset[int] = frozenset()
        self.reroutes = on_down == "reroute"
        self.after = after
        self._now: dict[int, Outage] = {}
        self._nominal = links.bandwidth
        self._names = [f"{a}->{b}" for a, b in zip(links.source, links.target, strict=True)]
        self._latency = links.latency
        self._leaves = np.array([number.get(name, -1) for name in links.source] + [-1])
        self._enters = np.array([number.get(name, -1) for name in links.target] + [-1])
        self._detours = Detours(topology)
        self._held: dict[int, tuple[RoutedRound, Around]] = {}

    def change(self, link: int, bandwidth: float, last: bool, now: float) -> Outage | None:
        """A link's bandwidth from now on; last: for ever. Returns the outage that begins, if one does."""
        before = self._now.get(link)
        if before is not None and before.bandwidth == bandwidth:
            self.gone = self.gone | {link} if last and bandwidth == 0 else self.gone
            return None
        self._now.pop(link, None)
        if before is not None:
            before.end = now
        self._know(self.known - {link})
        self.gone = self.gone | {link} if last and bandwidth == 0 else self.gone - {link}
        if bandwidth >= self._nominal[link]:
            return None
        outage = self._now[link] = Outage(link, now, bandwidth)
        self.past.append(outage)
        return outage

    def notice(self, outage: Outage, now: float) -> None:
        """The machine has seen that a link is down."""
        outage.noticed = now
        self._know(self.known | {outage.link})

    def lasts(self, outage: Outage) -> bool:
        """Whether it is not over yet."""
        return self._now.get(outage.link) is outage

    def of(self, link: int) -> Outage:
        """What is wrong with a link now."""
        return self._now[link]

    def _know(self, known: frozenset[int]) -> None:
        if known != self.known:
            self.known = known
            self._held.clear()

    def blame(self, links: np.ndarray, dead: frozenset[int]) -> np.ndarray:
        """int[F]: the first dead link on each path int[F, P], -1 for none."""
        marked = np.zeros(len(self._latency) + 1, dtype=bool)  # the last is the padding of a path
        marked[sorted(dead)] = True
        crossed = marked[links]
        if not crossed.any():
            return np.full(len(links), -1)
        first = links[np.arange(len(links)), crossed.argmax(axis=1)]
        found: np.ndarray = np.where(crossed.any(axis=1), first, -1)
        return found

    def ways(
        self, routed: RoutedExchange, one_round: RoutedRound, flows: np.ndarray, dead: frozenset[int]
    ) -> Ways:
        """Detours of some flows of a round, int[A]. One that ends in a switch, or begins there, has none."""
        source, target = routed.ranks[one_round.source[flows]], routed.ranks[one_round.target[flows]]
        path = one_round.flows.links[flows]
        last = path[np.arange(len(path)), (path >= 0).sum(axis=1) - 1]
        whole = (self._leaves[path[:, 0]] == source) & (self._enters[last] == target)
        found = self._detours.around(source, target, dead)
        return replace(found, found=found.found & whole)

    def around(self, routed: RoutedExchange, one_round: RoutedRound) -> Around | None:
        """The round as it is sent now; None if no flow of it crosses a link that is known to be down."""
        held = self._held.get(id(one_round))
        if held is None:
            if len(self._held) >= _ROUNDS:
                self._held.clear()
            held = self._held[id(one_round)] = one_round, self._around(routed, one_round)
        around = held[1]
        return around if (around.blame >= 0).any() else None

    def _around(self, routed: RoutedExchange, one_round: RoutedRound) -> Around:
        flows = one_round.flows
        blame = self.blame(flows.links, self.known)
        affected = np.flatnonzero(blame >= 0)
        detoured = np.zeros(len(blame), dtype=bool)
        if not len(affected):
            return Around(one_round, blame, detoured)
        ways = self.ways(routed, one_round, affected, self.known)
        moved = affected[ways.found]
        detoured[moved] = True
        links = np.full((len(blame), max(flows.links.shape[1], ways.links.shape[1])), -1, dtype=np.int32)
        links[:, : flows.links.shape[1]] = flows.links
        links[moved] = -1
        links[moved, : ways.links.shape[1]] = ways.links[ways.found]
        latency = flows.latency + self._longer(routed, one_round, links)
        other = Flows(flows.size, flows.weight, links, np.maximum(latency, 0.0))
        return Around(replace(one_round, flows=other), blame, detoured)

    def _longer(self, routed: RoutedExchange, one_round: RoutedRound, links: np.ndarray) -> np.ndarray:
        """float64[F] s by which flows begin later on other paths int[F, P] than on their own."""
        before, after = (path_latency(path, self._latency) for path in (one_round.flows.links, links))
        if one_round.together:
            group = one_round.source // routed.members
            before, after = (_farthest(latency, group) for latency in (before, after))
        longer: np.ndarray = one_round.repeat * (after - before)
        return longer

    def check_hope(
        self, routed: RoutedExchange, one_round: RoutedRound, flows: np.ndarray, links: np.ndarray, what: str
    ) -> None:
        """Flows int[A] of a round, now on paths int[A, P], can still arrive.

        what     the exchange, for the message
        Raises   StuckError if one of them waits for a link that will never return
        """
        blame = self.blame(links, self.gone & self.known if self.reroutes else self.gone)
        lost = np.flatnonzero(blame >= 0)
        if self.reroutes and len(lost):
            lost = lost[~self.ways(routed, one_round, flows[lost], self.gone).found]
        if not len(lost):
            return
        flow, link = flows[lost[0]], int(blame[lost[0]])
        source, target = routed.ranks[one_round.source[flow]], routed.ranks[one_round.target[flow]]
        others = f" and {len(lost) - 1:,} more" if len(lost) > 1 else ""
        remedy = (
            "no other path is left"
            if self.reroutes
            else 'network.on_down = "reroute" would send it another way, if there is one'
        )
        since = f"{self._now[link].start:g} s"
        raise StuckError(
            f"the run cannot end: link {self._names[link]} is down for good since {since}, and "
            f"{what} waits for what rank {source} sends to rank {target} over it{others}; {remedy}"
        )


def _farthest(latency: np.ndarray, group: np.ndarray) -> np.ndarray:
    farthest = np.zeros(int(group.max()) + 1)
    np.maximum.at(farthest, group, latency)
    most: np.ndarray = farthest[group]
    return most
