"""An exchange laid on links: its rounds as flows, ready for the network, and what each link carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from clustersim.errors import ClustersimError
from clustersim.physics.choice import quickest
from clustersim.physics.network import Flows
from clustersim.physics.pricing import Measured, chosen, startup_of
from clustersim.physics.startup import Shape, Startup
from clustersim.plan.collectives import AUTO, COLLECTIVES, Collective, collective
from clustersim.plan.layout import Layout
from clustersim.plan.paths import PathTable
from clustersim.plan.rounds import DOWN, PEER, UP, Group, Round, backwards, domains_of
from clustersim.plan.stepgraph import Exchange

#: Flows kept laid on links for exchanges that come again; bounds the memory of long runs.
_ROUTED_FLOWS = 400_000


@dataclass(frozen=True, slots=True, eq=False)
class RoutedRound:
    """Flows of one round of all groups, sorted by sender. Members are numbered group * n + position.

    flows    what the network is given: bytes on the wire
    payload  float64[F] bytes of each flow that the exchange is about
    source   int64[F] sending member, ascending; target int64[F] receiving member
    via      int8[F] as in plan.rounds.Round
    first    int64[M + 1] member m sends flows first[m] … first[m + 1] - 1
    pending  int64[M] flows that each member sends or receives; one to or from a switch counts twice
    repeat   int64[F] equal rounds that each flow stands for; each costs the latency of the path
    together the flows of a group begin together, after the latency of the farthest
    """

    flows: Flows
    payload: np.ndarray
    source: np.ndarray
    target: np.ndarray
    via: np.ndarray
    first: np.ndarray
    pending: np.ndarray
    repeat: np.ndarray
    together: bool


@dataclass(frozen=True, slots=True, eq=False)
class RoutedExchange:
    """One exchange of all its groups.

    algorithm  the table entry that it follows
    ranks      int32[M] rank of each member
    members    per group
    rounds     in order; rounds without a byte are left out
    meets      as in plan.rounds.Collective
    carried    float64[2, K] bytes over each link, all rounds: on the wire; and of them what the exchange is
               about
    brought    int64[M, n] for an all-to-all: the flow (counted through all rounds) with which the last
               comes to a member of what each of its group sends it; -1 where nothing comes. None for others
    """

    algorithm: str
    ranks: np.ndarray
    members: int
    rounds: tuple[RoutedRound, ...]
    meets: str
    carried: np.ndarray
    brought: np.ndarray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Alike:
    """Groups of an exchange whose members sit alike: A of its G groups.

    rows     int64[A] which they are
    group    how they sit
    shape    the same for reckoning costs
    """

    rows: np.ndarray
    group: Group
    shape: Shape


@dataclass(frozen=True, slots=True, eq=False)
class _Laid:
    """One round of A groups that sit alike, on links.

    one      the round; F flows per group
    links    int32[A, F, P]
    latency  float64[A, F] s before the first byte, all repeats
    wire     float64[A, F] bytes on the wire, all repeats
    """

    one: Round
    links: np.ndarray
    latency: np.ndarray
    wire: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class _Flat:
    """Flows of one round in a row, those without bytes left out; arrays as in `RoutedRound`."""

    source: np.ndarray
    target: np.ndarray
    payload: np.ndarray
    wire: np.ndarray
    via: np.ndarray
    interleaved: np.ndarray
    repeat: np.ndarray
    links: np.ndarray
    latency: np.ndarray
    together: bool


def route(
    exchange: Exchange,
    layout: Layout,
    launch: float,
    costs: Measured | None = None,
    kinds: Sequence[Alike] = (),
) -> RoutedExchange:
    """Rounds of an exchange on the links of the topology.

    launch   time before the first byte of the first round may move where nobody has measured it, s
    costs    what exchanges cost beside their bytes; None where nobody knows that
    kinds    what `alike` says of its groups, where that is known already
    Raises   ClustersimError where the algorithm cannot be done by these groups
    """
    groups = exchange.groups
    n, kinds = groups.shape[1], kinds or alike(groups, layout)
    algorithm = exchange.algorithm or getattr(layout.deployment.algorithms, exchange.kind)
    if algorithm == AUTO:
        algorithm = _chosen(exchange, kinds, costs)
    how = collective(exchange.kind, algorithm)
    rounds: list[RoutedRound] = []
    if n > 1:
        extra = _startups(exchange, kinds, algorithm, costs)
        parts = [
            _priced(
                [_lay(one, kind, groups, layout) for one in _rounds(how, exchange, kind) if one.size.any()],
                [extra[row] for row in kind.rows],
                launch,
            )
            for kind in kinds
        ]
        for at in range(max(len(part) for part in parts)):
            laid = [
                _flat(part[at], kind.rows * n)
                for part, kind in zip(parts, kinds, strict=True)
                if at < len(part)
            ]
            rounds.append(_joined(laid, groups.size))
    links = len(layout.topology.links.bandwidth)
    carried = sum((_carried(one, links) for one in rounds), start=np.zeros((2, links)))
    brought = _brought(how, kinds, n, rounds) if exchange.kind == "all_to_all" else None
    return RoutedExchange(algorithm, groups.ravel(), n, tuple(rounds), how.meets, carried, brought)


def _carried(one: RoutedRound, links: int) -> np.ndarray:
    return np.stack([over_links(size, one.flows.links, links) for size in (one.flows.size, one.payload)])


def over_links(size: np.ndarray, path: np.ndarray, links: int) -> np.ndarray:
    """Bytes over each link, float64[K], of flows of float64[F] bytes on paths int[F, P]."""
    there = path >= 0
    sizes = np.broadcast_to(size[:, None], path.shape)
    return np.bincount(path[there], weights=sizes[there], minlength=links)


# ---- groups, and what they cost -----------------------------------------------------------------


def alike(groups: np.ndarray, layout: Layout) -> list[Alike]:
    """The groups of an exchange by how their members sit in NVLink domains.

    groups   int[G, n] ranks
    """
    domain = domains_of(groups, layout.topology.domain)
    kinds, which = np.unique(domain, axis=0, return_inverse=True)
    found = []
    for kind, row in enumerate(kinds):
        rows = np.flatnonzero(which.ravel() == kind)
        found.append(Alike(rows, Group(row), _shape(Group(row), groups[rows[0]], layout)))
    return found


def _shape(group: Group, ranks: np.ndarray, layout: Layout) -> Shape:
    """Bandwidth and latency of one group's members, as if all of them sent at once."""
    everybody = np.arange(group.n)
    near = group.at[group.domain, (group.rail + 1) % group.sizes[group.domain]]
    far = group.relay[everybody, (group.domain + 1) % group.domains]
    alone = (group.sizes[group.domain] == 1).all()
    near_bandwidth, near_latency, tier = _port(ranks, ranks[near], layout)
    far_bandwidth, far_latency, _ = (
        _port(ranks, ranks[far], layout) if group.domains > 1 else (np.inf, 0.0, "")
    )
    return Shape(
        members=group.n,
        domains=group.domains,
        nvlink_bandwidth=np.inf if alone else near_bandwidth,
        nvlink_latency=0.0 if alone else near_latency,
        network_bandwidth=far_bandwidth,
        network_latency=far_latency,
        in_switch=int(tier == "gpu-nvswitch" and group.sizes.min() > 1 and layout.topology.switch_reduces),
    )


def _port(source: np.ndarray, target: np.ndarray, layout: Layout) -> tuple[float, float, str]:
    """Bytes/s of the worst off when each sends to its target, the longest latency, and the first tier."""
    away = source != target
    if not away.any():
        return np.inf, 0.0, ""
    links = layout.topology.links
    table = layout.paths.between(source[away], target[away])
    used = table.links[table.links >= 0]
    share = links.bandwidth / np.maximum(np.bincount(used, minlength=len(links.bandwidth)), 1)
    return float(share[used].min()), float(table.latency.max()), links.tier[table.links[0, 0]]


def nominal_size(kind: str, size: np.ndarray) -> np.ndarray:
    """The bytes by which an exchange is known, float64[G]: NCCL-tests' count of its buffer.

    all_reduce, broadcast, point_to_point: the vector; all_gather, reduce_scatter: all parts together;
    all_to_all: what a member sends in the mean, its own part counted as the mean of the others
    """
    if kind in ("all_gather", "reduce_scatter"):
        return np.asarray(size.sum(axis=1))
    if kind == "all_to_all":
        n = size.shape[1]
        own = np.trace(size, axis1=1, axis2=2)
        return np.asarray((size.sum(axis=(1, 2)) - own) / max(n - 1, 1))
    return size


def _chosen(exchange: Exchange, kinds: Sequence[Alike], costs: Measured | None) -> str:
    """What "auto" takes: one algorithm for all groups, by the most scattered and its largest exchange."""
    widest = max(kinds, key=lambda kind: kind.group.domains)
    size = nominal_size(exchange.kind, exchange.size[widest.rows])
    can = {
        "anything": True,
        "switches": all(kind.shape.in_switch for kind in kinds),
        "domain": widest.group.domains == 1,
    }
    among = [name for name, entry in COLLECTIVES[exchange.kind].items() if can[entry.needs]]
    if costs is None:
        return quickest(exchange.kind, widest.shape, float(size.max()), among)
    return chosen(costs, exchange, widest.shape, float(size.max()), among)


def _startups(
    exchange: Exchange, kinds: Sequence[Alike], algorithm: str, costs: Measured | None
) -> list[Startup | None]:
    """Costs of every group beside its bytes; None where nobody knows them."""
    size = nominal_size(exchange.kind, exchange.size).tolist()
    found: list[Startup | None] = [None] * len(size)
    if costs is None:
        return found
    for kind in kinds:
        held: dict[float, Startup | None] = {}
        for row in kind.rows.tolist():
            if size[row] not in held:
                held[size[row]] = startup_of(costs, exchange, algorithm, kind.shape, size[row])
            found[row] = held[size[row]]
    return found


def _rounds(how: Collective, exchange: Exchange, kind: Alike) -> list[Round]:
    """The collective's rounds for groups that sit kind.

    Raises   ClustersimError where it needs what they lack
    """
    group, size = kind.group, exchange.size[kind.rows]
    if how.needs == "switches" and not kind.shape.in_switch:
        raise ClustersimError(
            f"deployment.algorithms.{exchange.kind}: switches are to add up, but in a group of {group.n} "
            "ranks some reach no other through an NVSwitch; "
            f'"hierarchical" and "{AUTO}" can be done by any group'
        )
    if how.deduplicated is None or exchange.distinct is None:
        return how.rounds(group, size)
    distinct = exchange.distinct[kind.rows, :, : group.domains]
    if exchange.back:
        return backwards(how.deduplicated(group, size.transpose(0, 2, 1), distinct))
    return how.deduplicated(group, size, distinct)


# ---- flows on links -----------------------------------------------------------------------------


def _lay(one: Round, kind: Alike, groups: np.ndarray, layout: Layout) -> _Laid:
    """One round of groups that sit alike on links, at no cost but the paths' latencies."""
    ranks, shape = groups[kind.rows], one.size.shape
    table = _paths(ranks[:, one.source].ravel(), ranks[:, one.target].ravel(), one, kind, ranks, layout)
    # Equal rounds one behind the other: each waits its latency, and all bytes cross the same links.
    latency = _one_behind_the_other(table.latency.reshape(shape) * one.repeat, one.behind)
    if _begins_as_one(one):
        latency = _of_the_farthest(latency, one.size > 0)
    return _Laid(one, table.links.reshape(*shape, -1), latency, one.size * one.repeat)


def _priced(rounds: list[_Laid], extra: list[Startup | None], launch: float) -> list[_Laid]:
    """With what the exchange costs beside its bytes.

    extra    per group
    launch   s that it waits before its first byte where nobody knows that

    All rounds together wait what the start-up says: latencies of paths are stretched to that.
    """
    longest = np.array([laid.latency.max(axis=1, initial=0.0, where=laid.wire > 0) for laid in rounds])
    whole = longest.sum(axis=0) if rounds else np.zeros(len(extra))
    stretch, added, first, wire = (np.full((len(extra), 1), x) for x in (1.0, 0.0, launch, 1.0))
    for row, cost in enumerate(extra):
        if cost is None:
            continue
        first[row], wire[row] = cost.launch, cost.wire
        if whole[row] > 0:
            stretch[row] = cost.latency / whole[row]
        else:
            added[row] = cost.latency / max(sum(laid.one.repeat for laid in rounds), 1)
    found = []
    for laid in rounds:
        latency = laid.latency * stretch + added * laid.one.repeat + first
        found.append(replace(laid, latency=latency, wire=laid.wire * wire))
        first = np.zeros_like(first)
    return found


def _flat(laid: _Laid, members: np.ndarray) -> _Flat:
    """The flows of a round in a row. members: int64[A] number of each group's first member."""
    one, some = laid.one, laid.one.size.ravel() > 0
    groups, first = len(members), members[:, None]
    via = np.zeros(len(one.source), dtype=np.int8) if one.via is None else one.via
    return _Flat(
        source=(first + one.source).ravel()[some],
        target=(first + one.target).ravel()[some],
        payload=(one.size * one.repeat).ravel()[some],
        wire=laid.wire.ravel()[some],
        via=np.tile(via, groups)[some],
        interleaved=np.full(int(some.sum()), one.sending != "apart"),
        repeat=np.full(int(some.sum()), one.repeat),
        together=_begins_as_one(one),
        links=laid.links.reshape(len(some), -1)[some],
        latency=laid.latency.ravel()[some],
    )


def _begins_as_one(one: Round) -> bool:
    return one.sending == "together" or one.behind is not None


def _of_the_farthest(latency: np.ndarray, some: np.ndarray) -> np.ndarray:
    """Sends of a group that are begun as one get going when the farthest of its peers can answer, and a
    pipeline's when its first piece has come all the way: then all of them are busy until the last has."""
    farthest = np.where(some, latency, 0.0).max(axis=1, initial=0.0)
    return np.broadcast_to(farthest[:, None], latency.shape)


def _one_behind_the_other(latency: np.ndarray, behind: np.ndarray | None) -> np.ndarray:
    """When the first byte of a flow arrives that follows the first of those it is behind. float64[A, F] s."""
    if behind is None:
        return latency
    arrives = latency
    while True:
        padded = np.pad(arrives, ((0, 0), (0, 1)))
        later = latency + padded[:, behind].max(axis=2)
        if np.array_equal(later, arrives):
            return arrives
        arrives = later


def _paths(
    source: np.ndarray, target: np.ndarray, one: Round, kind: Alike, ranks: np.ndarray, layout: Layout
) -> PathTable:
    """The links of every flow, group by group; to and from a switch it is half the way to a neighbour."""
    if one.via is None:
        return layout.paths.between(source, target)
    group, latency = kind.group, np.append(layout.topology.links.latency, 0.0)
    neighbour = group.at[group.domain, (group.rail + 1) % group.sizes[group.domain]]
    beside = ranks[:, neighbour[one.source]].ravel()
    via = np.tile(one.via, len(ranks))
    whole = layout.paths.between(source, np.where(via == UP, beside, target))
    down = layout.paths.between(beside, target).links
    last = np.take_along_axis(down, (down >= 0).sum(axis=1, keepdims=True) - 1, axis=1)
    links = np.where((via == PEER)[:, None], whole.links, -1)
    links[:, :1] = np.where((via == UP)[:, None], whole.links[:, :1], links[:, :1])
    links[:, :1] = np.where((via == DOWN)[:, None], last, links[:, :1])
    return PathTable(links, np.asarray(latency[links].sum(axis=1)))


def _joined(laid: list[_Flat], members: int) -> RoutedRound:
    """The round of all groups, sorted by sender."""

    def column(of: Callable[[_Flat], np.ndarray]) -> np.ndarray:
        return np.concatenate([of(one) for one in laid])

    source = column(lambda one: one.source)
    order = np.argsort(source, kind="stable")
    source, target = source[order], column(lambda one: one.target)[order]
    size = column(lambda one: one.wire)[order]
    interleaved = column(lambda one: one.interleaved)[order]
    weight = np.ones(len(size))
    if interleaved.any():
        weight[interleaved] = size[interleaved] / size[interleaved].mean()
    width = max(one.links.shape[1] for one in laid)
    links = np.concatenate(
        [np.pad(one.links, ((0, 0), (0, width - one.links.shape[1])), constant_values=-1) for one in laid]
    )[order]
    return RoutedRound(
        flows=Flows(size, weight, links, column(lambda one: one.latency)[order]),
        payload=column(lambda one: one.payload)[order],
        source=source,
        target=target,
        via=column(lambda one: one.via)[order],
        first=np.searchsorted(source, np.arange(members + 1)),
        pending=np.bincount(source, minlength=members) + np.bincount(target, minlength=members),
        repeat=column(lambda one: one.repeat)[order],
        together=any(one.together for one in laid),
    )


def _brought(how: Collective, kinds: Sequence[Alike], n: int, rounds: list[RoutedRound]) -> np.ndarray:
    """int64[M, n] as in RoutedExchange: what is handed on comes in a later round than what goes straight."""
    members = sum(len(kind.rows) for kind in kinds) * n
    numbers = [np.full((members, n), -1, dtype=np.int64) for _ in ("straight", "handed on")]
    straight, handed_on = numbers
    before = 0
    for one in rounds:
        flow = before + np.arange(len(one.source))
        handed_on[one.target, one.source % n] = flow
        fresh = straight[one.target, one.source % n] < 0
        straight[one.target[fresh], one.source[fresh] % n] = flow[fresh]
        before += len(flow)
    if how.last_hop is None:
        return straight
    for kind in kinds:
        hop = how.last_hop(kind.group).T
        itself = hop == np.arange(n)
        for row in (kind.rows * n).tolist():
            here = slice(row, row + n)
            by_others = np.take_along_axis(handed_on[here], hop, axis=1)
            straight[here] = np.where(itself, straight[here], by_others)
    return straight


class Routes:
    """Exchanges laid on links, remembered by content as long as they are few enough."""

    def __init__(self, layout: Layout, costs: Measured | None = None) -> None:
        self._layout = layout
        self._costs = costs
        self._held: dict[tuple[object, ...], RoutedExchange] = {}
        self._kinds: dict[tuple[tuple[int, ...], bytes], list[Alike]] = {}
        self._flows = 0

    def of(self, exchange: Exchange) -> RoutedExchange:
        """The exchange's rounds of flows on links; equal exchanges share them."""
        # The same ranks in other groups have the same bytes; only the shape tells them apart.
        distinct = exchange.distinct
        about = (exchange.groups.shape, exchange.groups.tobytes())
        key = (
            *about,
            exchange.kind,
            exchange.algorithm,
            exchange.back,
            exchange.copies,
            exchange.size.tobytes(),
            None if distinct is None else distinct.tobytes(),
        )
        held = self._held.get(key)
        if held is None:
            layout = self._layout
            kinds = self._kinds.get(about) or alike(exchange.groups, layout)
            self._kinds[about] = kinds
            held = route(exchange, layout, layout.topology.gpu.launch_latency, self._costs, kinds)
            self._flows += sum(len(r.source) for r in held.rounds)
            if self._flows > _ROUTED_FLOWS:
                self._held.clear()
                self._flows = sum(len(r.source) for r in held.rounds)
            self._held[key] = held
        return held
