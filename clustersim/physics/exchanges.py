"""An exchange laid on links: its rounds as flows, ready for the network, and what each link carries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clustersim.physics.network import Flows
from clustersim.plan.collectives import Collective, Round, collective
from clustersim.plan.layout import Layout
from clustersim.plan.paths import Paths
from clustersim.plan.stepgraph import Exchange
from clustersim.spec.deployment import Algorithms

#: Flows kept laid on links for exchanges that come again; bounds the memory of long runs.
_ROUTED_FLOWS = 400_000


@dataclass(frozen=True, slots=True, eq=False)
class RoutedRound:
    """Flows of one round of all groups, sorted by sender. Members are numbered group * n + position.

    flows    what the network is given
    source   int64[F] sending member, ascending; target int64[F] receiving member
    first    int64[M + 1] member m sends flows first[m] … first[m + 1] - 1
    pending  int64[M] flows that each member sends or receives
    repeat   equal rounds that these flows stand for; each costs the latency of the path
    together the flows of a group begin together, after the latency of the farthest
    """

    flows: Flows
    source: np.ndarray
    target: np.ndarray
    first: np.ndarray
    pending: np.ndarray
    repeat: int = 1
    together: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class RoutedExchange:
    """One exchange of all its groups.

    ranks    int32[M] rank of each member
    members  per group
    rounds   in order; rounds without a byte are left out
    meets    as in plan.collectives.Collective
    carried  float64[K] bytes over each link, all rounds
    """

    ranks: np.ndarray
    members: int
    rounds: tuple[RoutedRound, ...]
    meets: str
    carried: np.ndarray


def route(
    exchange: Exchange, algorithms: Algorithms, paths: Paths, links: int, launch: float
) -> RoutedExchange:
    """Rounds of an exchange on the links of the topology.

    links    how many links there are
    launch   time before the first byte of the first round may move, s
    """
    groups = exchange.groups
    how: Collective = collective(exchange.kind, algorithms)
    n = groups.shape[1]
    ranks = groups.ravel()
    carried = np.zeros(links)
    rounds: list[RoutedRound] = []
    for one_round in how.rounds(n, exchange.size) if n > 1 else []:
        if not one_round.size.any():
            continue
        routed = _route_round(one_round, ranks, n, paths, launch if not rounds else 0.0)
        rounds.append(routed)
        path = routed.flows.links
        sizes = np.broadcast_to(routed.flows.size[:, None], path.shape)
        carried += np.bincount(path[path >= 0], weights=sizes[path >= 0], minlength=links)
    return RoutedExchange(ranks, n, tuple(rounds), how.meets, carried)


def _route_round(one_round: Round, ranks: np.ndarray, n: int, paths: Paths, launch: float) -> RoutedRound:
    source, target, size = _members(one_round, n)
    table = paths.between(ranks[source], ranks[target])
    # Equal rounds one behind the other: each waits its latency, and all bytes cross the same links.
    latency = table.latency * one_round.repeat + launch
    weight = np.ones(len(size))
    if one_round.interleaved:
        weight = size / size.mean()
        # Interleaved sends of a group get going together, when the farthest of its peers can answer.
        farthest = np.zeros(len(ranks) // n)
        np.maximum.at(farthest, source // n, latency)
        latency = farthest[source // n]
    members = len(ranks)
    return RoutedRound(
        flows=Flows(size * one_round.repeat, weight, table.links, latency),
        source=source,
        target=target,
        first=np.searchsorted(source, np.arange(members + 1)),
        pending=np.bincount(source, minlength=members) + np.bincount(target, minlength=members),
        repeat=one_round.repeat,
        together=one_round.interleaved,
    )


def _members(one_round: Round, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sending and receiving member and bytes of every flow that has any, sorted by sender."""
    first = np.arange(len(one_round.size))[:, None] * n
    source = (first + one_round.source).ravel()
    target = (first + one_round.target).ravel()
    size = one_round.size.ravel()
    order = np.argsort(source, kind="stable")
    order = order[size[order] > 0]
    return source[order], target[order], size[order]


class Routes:
    """Exchanges laid on links, remembered by content as long as they are few enough."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._held: dict[tuple[str, tuple[int, ...], bytes, bytes], RoutedExchange] = {}
        self._flows = 0

    def of(self, exchange: Exchange) -> RoutedExchange:
        """The exchange's rounds of flows on links; equal exchanges share them."""
        # The same ranks in other groups have the same bytes; only the shape tells them apart.
        groups = exchange.groups
        key = (exchange.kind, groups.shape, groups.tobytes(), exchange.size.tobytes())
        held = self._held.get(key)
        if held is None:
            layout = self._layout
            held = route(
                exchange,
                layout.deployment.algorithms,
                layout.paths,
                len(layout.topology.links.bandwidth),
                layout.topology.gpu.launch_latency,
            )
            self._flows += sum(len(r.source) for r in held.rounds)
            if self._flows > _ROUTED_FLOWS:
                self._held.clear()
                self._flows = sum(len(r.source) for r in held.rounds)
            self._held[key] = held
        return held
