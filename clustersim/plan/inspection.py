"""What a machine is worth before anything runs on it: bisection, oversubscription, ways, weak points."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from clustersim.plan.paths import Paths
from clustersim.plan.topology import Topology

#: Up to so many GPUs all pairs are looked at; beyond, the ways from so many GPUs to all others.
_ALL_PAIRS = 128
_LOOKOUTS = 16

#: Capacities become whole numbers of this many parts of a byte/s, because maximum flow in floats may not end.
_FINE = 1024


@dataclass(frozen=True, slots=True)
class Bisection:
    """The most that one half of the GPUs can send to the other.

    forward, back  from the first half to the second, and back, bytes/s
    first, second  how many GPUs each half has; the first GPUs in rank order are the first half
    """

    forward: float
    back: float
    first: int
    second: int


@dataclass(frozen=True, slots=True)
class Taper:
    """How much narrower a tier is towards the rest of the machine than towards its GPUs.

    at     domain, leaf, router or group: what is looked at
    count  how many of them there are, and the others are no narrower
    below  bandwidth towards the GPUs, bytes/s
    above  bandwidth towards the rest, bytes/s
    """

    at: str
    count: int
    below: float
    above: float

    @property
    def ratio(self) -> float:
        """The oversubscription: 1 where as much can leave as can come."""
        return self.below / self.above


@dataclass(frozen=True, slots=True)
class Way:
    """All paths that look alike.

    relation   of the two GPUs: same domain, same rail, or other
    kinds      of the vertices passed, GPUs included; "next group" before a router of another group
    share      of all paths looked at
    links      on the path
    latency    least and greatest, s
    bandwidth  of the narrowest link, the least of all paths, bytes/s
    """

    relation: str
    kinds: tuple[str, ...]
    share: float
    links: int
    latency: tuple[float, float]
    bandwidth: float


@dataclass(frozen=True, slots=True)
class WeakPoints:
    """What may be wrong with a machine that is connected, or what one loss would do.

    one_sided  links, "source->target", without one back of the same bandwidth and latency
    isolated   vertices without any link
    cutting    kind → parts whose loss alone cuts GPUs off from others
    """

    one_sided: tuple[str, ...]
    isolated: tuple[str, ...]
    cutting: dict[str, int]


def bisection(topology: Topology) -> Bisection:
    """Maximum flow between the halves of the GPUs in rank order, that is, server by server.

    It is not the least over all halvings, which would be too hard to find; servers are numbered in the
    order in which they are joined, so that this cut goes through as few leaves and groups as one can.
    """
    gpus = len(topology.gpus)
    half = np.arange(gpus) < gpus // 2
    return Bisection(cut(topology, half), cut(topology, ~half), gpus // 2, gpus - gpus // 2)


def cut(topology: Topology, half: NDArray[np.bool_]) -> float:
    """The most that some GPUs can send to the others, all together, bytes/s.

    half  bool[R]: who sends
    """
    if half.all() or not half.any():
        return 0.0
    side = {name: "first" if here else "second" for name, here in zip(topology.gpus, half, strict=True)}
    links = topology.links
    capacity: dict[tuple[str, str], int] = defaultdict(int)
    for source, target, bandwidth in zip(links.source, links.target, links.bandwidth.tolist(), strict=True):
        a, b = side.get(source, source), side.get(target, target)
        # What flows back to senders, or on from receivers, adds nothing.
        if a != b and b != "first" and a != "second":
            capacity[a, b] += max(1, round(bandwidth * _FINE))
    graph = _merged(_shortened(capacity))
    if "first" not in graph or "second" not in graph:
        return 0.0
    flow = nx.maximum_flow_value(graph, "first", "second", flow_func=nx.algorithms.flow.dinitz)
    return float(flow) / _FINE


def _shortened(capacity: dict[tuple[str, str], int]) -> nx.DiGraph:
    """The network with cards that lie between a half and one switch replaced by single links."""
    graph = nx.DiGraph()
    graph.add_edges_from((a, b, {"capacity": c}) for (a, b), c in capacity.items())
    for vertex in list(graph):
        if vertex in ("first", "second"):
            continue
        before, after = list(graph.predecessors(vertex)), list(graph.successors(vertex))
        if len(before) > 1 or len(after) > 1:
            ends = {*before, *after}
            # A two-way card of a half: in from it and its switch, out to its switch (or the other way round).
            if len(ends) != 2 or not ends & {"first", "second"} or {"first", "second"} == ends:
                continue
            before = [v for v in before if v == "first"] or [v for v in before if v != "second"]
            after = [v for v in after if v == "second"] or [v for v in after if v != "first"]
        if before and after and before != after:
            a, b = before[0], after[0]
            through = min(graph[a][vertex]["capacity"], graph[vertex][b]["capacity"])
            old = graph[a][b]["capacity"] if graph.has_edge(a, b) else 0
            graph.add_edge(a, b, capacity=old + through)
        graph.remove_node(vertex)
    return graph


def _merged(graph: nx.DiGraph) -> nx.DiGraph:
    """The network with twins made one: switches joined to the same others by the same capacities.

    Whatever flows through the one can be shared evenly among the twins, so the maximum flow is the same.
    """
    while True:
        twins: dict[object, list[str]] = defaultdict(list)
        for vertex in graph:
            out = frozenset((b, edge["capacity"]) for b, edge in graph[vertex].items())
            into = frozenset((a, edge["capacity"]) for a, edge in graph.pred[vertex].items())
            # A vertex that nothing leads to is no twin of the half that sends.
            twins[(out, into, vertex if vertex in ("first", "second") else "")].append(vertex)
        first = {vertex: alike[0] for alike in twins.values() for vertex in alike}
        if len(twins) == len(graph):
            return graph
        merged = nx.DiGraph()
        for a, b, capacity in graph.edges(data="capacity"):
            ends = first[a], first[b]
            old = merged.edges[ends]["capacity"] if merged.has_edge(*ends) else 0
            merged.add_edge(*ends, capacity=old + capacity)
        graph = merged


def tapers(topology: Topology) -> list[Taper]:
    """Oversubscription tier by tier, each at its narrowest part; tiers with nothing above are left out."""
    found = []
    for at, (below, above) in _BOUNDARIES.items():
        sums = _boundary(topology, below, above)
        worst = max((s for s in sums if s[1] > 0), key=lambda s: s[0] / s[1], default=None)
        if worst is not None and worst[0] > 0:
            found.append(Taper(at, len(sums), *worst))
    return found


#: What is looked at → tiers of links that leave it towards its GPUs, and towards the rest.
_BOUNDARIES: dict[str, tuple[str, str]] = {
    "domain": ("nvswitch-gpu", "nic-leaf nic-router"),
    "leaf": ("leaf-nic", "leaf-spine"),
    "router": ("router-nic", "router-router"),
    "group": ("router-nic", "group-group"),
}


def _boundary(topology: Topology, below: str, above: str) -> list[tuple[float, float]]:
    """Bandwidth of links below and above, bytes/s, of each part that has any below."""
    sums: dict[object, list[float]] = defaultdict(lambda: [0.0, 0.0])
    owner = _owner_of(topology, above)
    links = topology.links
    for source, tier, bandwidth in zip(links.source, links.tier, links.bandwidth.tolist(), strict=True):
        if tier in below.split() or tier in above.split():
            sums[owner(source)][tier in above.split()] += bandwidth
    return [(down, up) for down, up in sums.values() if down > 0]


def _owner_of(topology: Topology, above: str) -> Callable[[str], object]:
    """Vertex → the part it belongs to: an NVLink domain, a group of routers, or itself."""
    graph = topology.graph
    if above == "group-group":
        return lambda vertex: graph.nodes[vertex]["group"]
    if not above.startswith("nic"):
        return lambda vertex: vertex
    domain = dict(zip(topology.gpus, topology.domain.tolist(), strict=True))

    def of(vertex: str) -> object:
        return next((domain[v] for v in graph[vertex] if v in domain), vertex)

    return of


def ways(topology: Topology, paths: Paths) -> list[Way]:
    """How GPUs reach each other, nearest first; of a large machine as seen from some GPUs, evenly chosen."""
    source, target = _pairs(len(topology.gpus))
    table = paths.between(source, target)
    names = sorted(set(topology.links.tier))
    number = {tier: n for n, tier in enumerate(names)}
    tier = np.array([number[t] for t in topology.links.tier] + [-1])[table.links]
    relation = _relation(topology, source, target)
    narrowest = np.append(topology.links.bandwidth, np.inf)[table.links].min(axis=1, initial=np.inf)
    looks, which = np.unique(np.column_stack([relation, tier]), axis=0, return_inverse=True)
    which = which.ravel()
    found = []
    for n, look in enumerate(looks.tolist()):
        mine = which == n
        latency = table.latency[mine]
        tiers = [names[t] for t in look[1:] if t >= 0]
        found.append(
            Way(
                relation=_RELATIONS[look[0]],
                kinds=_kinds(tiers),
                share=float(mine.mean()),
                links=len(tiers),
                latency=(float(latency.min()), float(latency.max())),
                bandwidth=float(narrowest[mine].min()),
            )
        )
    return sorted(found, key=lambda way: (way.latency[1], way.links, way.kinds))


def _pairs(gpus: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    step = 1 if gpus <= _ALL_PAIRS else -(-gpus // _LOOKOUTS)
    source, target = np.meshgrid(np.arange(0, gpus, step), np.arange(gpus), indexing="ij")
    apart = source != target
    return source[apart], target[apart]


_RELATIONS = ("same domain", "same rail", "other")


def _relation(topology: Topology, source: NDArray[np.int64], target: NDArray[np.int64]) -> NDArray[np.int64]:
    domain, rail = topology.domain, topology.rail
    on_rail = (rail[source] == rail[target]) & (rail[source] >= 0)
    return np.where(domain[source] == domain[target], 0, np.where(on_rail, 1, 2))


def _kinds(tiers: Sequence[str]) -> tuple[str, ...]:
    steps = ("next group router" if tier == "group-group" else tier.split("-")[1] for tier in tiers)
    return ("gpu", *steps)


def weak_points(topology: Topology) -> WeakPoints:
    """Links that are not duplex alike, vertices nobody is joined to, and single points of failure."""
    links = topology.links
    values = {
        (a, b): (bandwidth, latency)
        for a, b, bandwidth, latency in zip(
            links.source, links.target, links.bandwidth.tolist(), links.latency.tolist(), strict=True
        )
    }
    return WeakPoints(
        one_sided=tuple(f"{a}->{b}" for (a, b), value in values.items() if values.get((b, a)) != value),
        isolated=tuple(name for name, degree in topology.graph.degree() if not degree),
        cutting=dict(Counter(topology.graph.nodes[name]["kind"] for name in _cutting(topology))),
    )


def _cutting(topology: Topology) -> Iterator[str]:
    """Vertices between GPUs and other GPUs; what stands for several parts is none, nor is a GPU itself."""
    graph = topology.graph.to_undirected()
    points = set(nx.articulation_points(graph))
    gpus = set(topology.gpus)
    tree = nx.Graph()  # blocks by number and the vertices at which they hang together
    weight: dict[object, int] = {point: int(point in gpus) for point in points}
    for number, block in enumerate(nx.biconnected_components(graph)):
        weight[number] = len((block & gpus) - points)
        tree.add_edges_from((number, point) for point in sorted(block & points))
    for root in [min(part, key=str) for part in nx.connected_components(tree)]:
        below = dict(weight)
        parent = dict(nx.dfs_predecessors(tree, root))
        order = list(nx.dfs_postorder_nodes(tree, root))
        for vertex in order[:-1]:
            below[parent[vertex]] += below[vertex]
        for point in order:
            if point not in points or point in gpus or graph.nodes[point]["parts"] > 1:
                continue
            branches = [below[v] for v in tree[point] if parent.get(v) == point]
            branches.append(below[root] - below[point])
            if sum(b > 0 for b in branches) > 1:
                yield point


def facts(topology: Topology) -> dict[str, Any]:
    """Counts: links by tier with their bandwidth each and together, GPUs per server and domain.

    Returns  tiers: tier → links, least and greatest bandwidth of one and of all together (bytes/s), latency
             (s); gpus_per_server, gpus_per_domain: how many of them hold so many
    """
    links = topology.links
    tiers: dict[str, dict[str, Any]] = {}
    each = links.bandwidth / links.cables
    tier = np.array(links.tier)
    for name in dict.fromkeys(links.tier):
        mine = tier == name
        tiers[name] = {
            "links": int(links.cables[mine].sum()),
            "each": [float(each[mine].min()), float(each[mine].max())],
            "together": float(links.bandwidth[mine].sum()),
            "latency": [float(links.latency[mine].min()), float(links.latency[mine].max())],
        }
    return {
        "tiers": tiers,
        "gpus_per_server": _sizes(topology.server),
        "gpus_per_domain": _sizes(topology.domain),
    }


def _sizes(member: NDArray[np.int32]) -> dict[int, int]:
    """Size → how many groups have it."""
    _, counts = np.unique(member, return_counts=True)
    sizes, times = np.unique(counts, return_counts=True)
    return dict(zip(sizes.tolist(), times.tolist(), strict=True))
