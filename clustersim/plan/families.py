"""Families of machines: parameters → vertices and cables, before they become a graph.

Parts that share traffic evenly, whatever the traffic, are drawn as one with their bandwidths added
up: the cards of one GPU with their rails, because a flow is striped over them; and, where packets are
sprayed, planes and the spines of a leaf. `parts` and `cables` say how many each stands for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, combinations
from typing import Any, NamedTuple

import networkx as nx

from clustersim.errors import ClustersimError, nearest
from clustersim.spec.fabrics import LeafSpine, boxes, boxes_per_leaf, links_per_pair, uplinks
from clustersim.spec.hardware import (
    Dragonfly,
    FatTree,
    Gpu,
    Nvl72,
    RailFatTree,
    Server,
    SingleServer,
    VertexByVertex,
)

#: As many as a vertex-by-vertex file may describe; a family's parameters can wish for far more.
MOST_VERTICES = 200_000
MOST_LINKS = 2_000_000


class Vertex(NamedTuple):
    """One vertex of a machine.

    server  the box it stands in, -1 outside of servers
    group   of a dragonfly's router, else -1
    parts   equal parts that it stands for
    """

    name: str
    kind: str
    server: int = -1
    group: int = -1
    parts: int = 1


class Cable(NamedTuple):
    """Two directed links, or only the one from `first` to `second`.

    bandwidth  of all cables together, bytes/s
    cables     equal ones in parallel that it stands for
    """

    first: str
    second: str
    bandwidth: float
    latency: float
    one_way: bool = False
    cables: int = 1


class Drawing(NamedTuple):
    """What a family says of its machine; `domain` and `rail` are over its GPUs, in rank order.

    routing  minimal, or valiant: through a third group of routers
    """

    gpu: Gpu
    vertices: Sequence[Vertex]
    cables: Sequence[Cable]
    domain: Sequence[int]
    rail: Sequence[int]
    routing: str = "minimal"


# ---- parts the families share -------------------------------------------------------------------


def _check_divides(key: str, part: int, whole: int) -> None:
    if whole % part:
        fits = [n for n in range(1, whole + 1) if whole % n == 0]
        near = {max(n for n in fits if n < part), min((n for n in fits if n > part), default=whole)}
        raise ClustersimError(
            f"topology.{key} = {part} does not divide {whole} servers; "
            f"try {' or '.join(map(str, sorted(near)))}"
        )


def _check_size(vertices: int, cables: int) -> None:
    """Before anything is drawn: a slip of a few zeros must not fill the memory."""
    for number, most, what in ((vertices, MOST_VERTICES, "vertices"), (2 * cables, MOST_LINKS, "links")):
        if number > most:
            raise ClustersimError(f"topology: {number} {what} are too many; there may be {most}")


class _Span(NamedTuple):
    """Equal parts with consecutive numbers, drawn as one: `3`, or `3-5`."""

    first: int
    number: int = 1

    def __str__(self) -> str:
        return f"{self.first}-{self.first + self.number - 1}" if self.number > 1 else str(self.first)


def _spans(number: int, pooled: bool) -> list[_Span]:
    """Parts 0 … number - 1 drawn one by one, or all as one."""
    return [_Span(0, number)] if pooled and number else [_Span(n) for n in range(number)]


class _Cards(NamedTuple):
    """One card with the GPUs that share it, or all cards of one GPU.

    gpus  positions in the server
    """

    span: _Span
    gpus: Sequence[int]


def _cards(server: Server) -> list[_Cards]:
    """The cards of a server: a flow is striped over those of a GPU, as NCCL's channels are."""
    gpus, nics = server.gpus, server.nics
    if nics < gpus:
        return [_Cards(_Span(c), [g for g in range(gpus) if g * nics // gpus == c]) for c in range(nics)]
    first = [-(-g * nics // gpus) for g in range(gpus + 1)]
    return [_Cards(_Span(first[g], first[g + 1] - first[g]), [g]) for g in range(gpus)]


class _Boxes(NamedTuple):
    """Servers of one kind and what their cards hang on.

    switch          name of the NVLink plane of each box
    ports           for each box and each of its `_cards`: the switches that these have a port in
    ports_per_card  how many there are; a drawn one stands for an equal part of them
    """

    server: Server
    switch: Sequence[str]
    ports: Sequence[Sequence[Sequence[str]]]
    ports_per_card: int = 1


def _drawn(
    boxes: _Boxes, switches: Sequence[Vertex], between: Sequence[Cable], rail: Sequence[int] = ()
) -> Drawing:
    """GPUs are numbered box by box; a domain is the boxes with the same NVLink plane.

    between  cables between switches
    rail     of each GPU of a box; nothing without rails
    """
    server, numbers = boxes.server, range(len(boxes.switch))
    number = {switch: n for n, switch in enumerate(dict.fromkeys(boxes.switch))}
    return Drawing(
        gpu=server.gpu,
        vertices=(
            *chain(*(_box_vertices(server, box) for box in numbers)),
            *_planes(boxes.switch),
            *switches,
        ),
        cables=(
            *chain(*(_nvlinks(server, box, boxes.switch[box]) for box in numbers)),
            *chain(*(_card_cables(boxes, box) for box in numbers)),
            *between,
        ),
        domain=[number[switch] for switch in boxes.switch for _ in range(server.gpus)],
        rail=list(rail or [-1] * server.gpus) * len(numbers),
    )


def _box_vertices(server: Server, box: int) -> Iterator[Vertex]:
    first = box * server.gpus
    yield from (Vertex(f"gpu{first + g}", "gpu", box) for g in range(server.gpus))
    for cards in _cards(server):
        yield Vertex(f"server{box}/nic{cards.span}", "nic", box, parts=cards.span.number)


def _planes(switch: Sequence[str]) -> Iterator[Vertex]:
    """The NVSwitches; one that serves several boxes stands in none of them."""
    boxes = Counter(switch)
    for box, name in enumerate(switch):
        if boxes[name] == 1:
            yield Vertex(name, "nvswitch", box)
    yield from (Vertex(name, "nvswitch") for name, shared in boxes.items() if shared > 1)


def _nvlinks(server: Server, box: int, switch: str) -> Iterator[Cable]:
    # Half of GPU to GPU on the way to the switch, half on the way from it.
    for g in range(box * server.gpus, (box + 1) * server.gpus):
        yield Cable(f"gpu{g}", switch, server.nvlink_bandwidth, server.nvlink_latency / 2)


def _card_cables(boxes: _Boxes, box: int) -> Iterator[Cable]:
    """GPU to card and card to switch; a quarter of GPU to switch to GPU on each."""
    server, first = boxes.server, box * boxes.server.gpus
    latency = server.nic_latency / 4
    for span, gpus in _cards(server):
        for g in gpus:
            bandwidth = span.number * server.pcie_bandwidth
            yield Cable(f"gpu{first + g}", f"server{box}/nic{span}", bandwidth, latency, cables=span.number)
    for (span, _), ports in zip(_cards(server), boxes.ports[box], strict=True):
        bandwidth = span.number * server.nic_bandwidth / len(ports)
        cables = span.number * boxes.ports_per_card // len(ports)
        for switch in ports:
            yield Cable(f"server{box}/nic{span}", switch, bandwidth, latency, cables=cables)


# ---- families -----------------------------------------------------------------------------------


def _single_server(spec: SingleServer) -> Drawing:
    """No card is drawn: nothing lies beyond it."""
    server, switch = spec.server, "server0/nvswitch"
    _check_size(server.gpus + 1, server.gpus)
    gpus = [Vertex(f"gpu{g}", "gpu", 0) for g in range(server.gpus)]
    return Drawing(
        gpu=server.gpu,
        vertices=(*gpus, Vertex(switch, "nvswitch", 0)),
        cables=tuple(_nvlinks(server, 0, switch)),
        domain=[0] * server.gpus,
        rail=[-1] * server.gpus,
    )


def _rail_fat_tree(spec: RailFatTree) -> Drawing:
    per_pod = boxes_per_leaf(spec)
    _check_divides("servers_per_pod", per_pod, spec.servers)
    if per_pod < spec.servers and not spec.spines and spec.oversubscription is None:
        raise ClustersimError(
            f"topology.spines = 0 leaves {spec.servers // per_pod} pods apart; give each rail a "
            f"spine, or put all {spec.servers} servers into one pod with servers_per_pod = 0"
        )
    return _leaf_spine(spec, lambda box: f"server{box}/nvswitch")


def _nvl72(spec: Nvl72) -> Drawing:
    """Without spines the leaf of a rail joins all racks; with them each rack is a pod of its own."""
    return _leaf_spine(spec, lambda box: f"rack{box // spec.trays}/nvswitch")


def _fat_tree(spec: FatTree) -> Drawing:
    _check_divides("servers_per_leaf", spec.servers_per_leaf, spec.servers)
    return _leaf_spine(spec, lambda box: f"server{box}/nvswitch")


class _Rail(NamedTuple):
    """What the names of a rail's switches begin with, and how many rails are drawn as one."""

    name: str
    parts: int


def _leaf_spine(spec: LeafSpine, switch: Callable[[int], str]) -> Drawing:
    """On rails equal cards of the boxes of a pod share a leaf, and a rail has its own spines.

    switch  box → name of its NVLink plane
    """
    _check_leaf_spine(spec, boxes(spec))
    server, everywhere = spec.server, range(boxes(spec))
    cards, railed = _cards(server), not isinstance(spec, FatTree)
    rails = [_Rail(f"rail{c.span}/", c.span.number) for c in cards] if railed else [_Rail("", 1)]
    leaves = _leaves(spec, rails)
    # Without rails there is one leaf of a pod and plane, and all cards hang on it.
    rail_of = range(len(cards)) if railed else [0] * len(cards)
    pods = [
        [[plane[pod][rail][0].name for plane in leaves] for rail in rail_of] for pod in range(len(leaves[0]))
    ]
    return _drawn(
        _Boxes(
            server=server,
            switch=[switch(box) for box in everywhere],
            ports=[pods[box // boxes_per_leaf(spec)] for box in everywhere],
            ports_per_card=spec.planes,
        ),
        switches=_switches(leaves),
        between=_uplinks(spec, leaves),
        rail=[c.span.first for c in cards for _ in c.gpus] if railed else (),
    )


#: Leaves by plane, pod and rail, each with the spines above it.
_Leaves = Sequence[Sequence[Sequence[tuple[Vertex, Sequence[Vertex]]]]]


def _leaves(spec: LeafSpine, rails: Sequence[_Rail]) -> _Leaves:
    sprayed = spec.load_balancing == "spray"
    planes, spines = _spans(spec.planes, sprayed), _spans(uplinks(spec).spines, sprayed)

    def leaf(plane: _Span, pod: int, rail: _Rail) -> tuple[Vertex, Sequence[Vertex]]:
        parts = plane.number * rail.parts
        before = f"plane{plane}/" if spec.planes > 1 else ""
        name = f"pod{pod}/{rail.name}leaf" if rail.name else f"leaf{pod}"
        above = [Vertex(f"{before}{rail.name}spine{s}", "spine", parts=parts * s.number) for s in spines]
        return Vertex(f"{before}{name}", "leaf", parts=parts), above

    pods = range(boxes(spec) // boxes_per_leaf(spec))
    return [[[leaf(plane, pod, rail) for rail in rails] for pod in pods] for plane in planes]


def _switches(leaves: _Leaves) -> Sequence[Vertex]:
    found = [pair for plane in leaves for pod in plane for pair in pod]
    return [*(leaf for leaf, _ in found), *dict.fromkeys(chain(*(above for _, above in found)))]


def _uplinks(spec: LeafSpine, leaves: _Leaves) -> Sequence[Cable]:
    one, latency = uplinks(spec).bandwidth, spec.uplink_latency / 2
    return [
        # Of as many spines as are drawn as one, each has a cable to its leaf.
        Cable(leaf.name, spine.name, spine.parts * one, latency, cables=spine.parts)
        for plane in leaves
        for pod in plane
        for leaf, above in pod
        for spine in above
    ]


def _check_leaf_spine(spec: LeafSpine, servers: int) -> None:
    server, spines = spec.server, uplinks(spec).spines
    rails = 1 if isinstance(spec, FatTree) else server.nics
    pods = servers // boxes_per_leaf(spec)
    switches, between = rails * (pods + spines), rails * pods * spines
    ports = max(server.gpus, server.nics) + server.nics * spec.planes
    _check_size(
        servers * (server.gpus + server.nics + 1) + switches * spec.planes,
        servers * (server.gpus + ports) + between * spec.planes,
    )


def _dragonfly(spec: Dragonfly) -> Drawing:
    server, groups, routers = spec.server, spec.groups, spec.routers
    per_pair = links_per_pair(spec)
    servers, local = groups * routers * spec.servers_per_router, groups * routers * (routers - 1) // 2
    _check_size(
        servers * (server.gpus + server.nics + 1) + groups * routers,
        servers * (server.gpus + max(server.gpus, server.nics) + server.nics)
        + local
        + groups * (groups - 1) // 2 * per_pair,
    )
    names = [[f"group{g}/router{r}" for r in range(routers)] for g in range(groups)]
    where = [name for group in names for name in group for _ in range(spec.servers_per_router)]
    cards = len(_cards(server))
    drawing = _drawn(
        _Boxes(
            server=server,
            switch=[f"server{box}/nvswitch" for box in range(servers)],
            ports=[[[name]] * cards for name in where],
        ),
        switches=[Vertex(name, "router", group=g) for g, group in enumerate(names) for name in group],
        between=[*_local_links(spec, names), *_global_links(spec, names, per_pair)],
    )
    return drawing._replace(routing=spec.routing)


def _local_links(spec: Dragonfly, names: Sequence[Sequence[str]]) -> Iterator[Cable]:
    for group in names:
        for a, b in combinations(group, 2):
            yield Cable(a, b, spec.local_bandwidth, spec.local_latency)


def _global_links(spec: Dragonfly, names: Sequence[Sequence[str]], per_pair: int) -> Iterator[Cable]:
    """The circulant arrangement; several links between the same two routers are drawn as one.

    Source  Hastings et al.: Comparing global link arrangements for dragonfly networks, CLUSTER 2015.
    """
    groups = spec.groups
    for g in range(groups):
        # Seen from the other end, the link to the group `away` further on goes groups - away further.
        ahead = [away for away in range(1, groups) if g < (g + away) % groups]
        for away in ahead:
            other = (g + away) % groups
            ends = Counter((_router(spec, away, n), _router(spec, groups - away, n)) for n in range(per_pair))
            for (here, there), links in ends.items():
                bandwidth = links * spec.global_bandwidth
                yield Cable(names[g][here], names[other][there], bandwidth, spec.global_latency, cables=links)


def _router(spec: Dragonfly, away: int, nth: int) -> int:
    """The router that holds the nth global link to the group `away` further on."""
    return (nth * (spec.groups - 1) + away - 1) // spec.global_links


def _explicit(spec: VertexByVertex) -> Drawing:
    """GPUs take their rank from the order in which they are listed."""
    _check_names(spec)
    _check_cables(spec)
    outside = ("leaf", "spine", "router")
    gpus = [v.name for v in spec.vertices if v.kind == "gpu"]
    return Drawing(
        gpu=spec.gpu,
        vertices=[Vertex(v.name, v.kind, -1 if v.kind in outside else v.server) for v in spec.vertices],
        cables=[Cable(*c.ends, c.bandwidth, c.latency, c.one_way) for c in spec.cables],
        domain=_nvlink_domains(spec, gpus),
        rail=[-1] * len(gpus),
    )


def _check_names(spec: VertexByVertex) -> None:
    twice = [name for name, times in Counter(v.name for v in spec.vertices).items() if times > 1]
    if twice:
        raise ClustersimError(f'topology.vertices: "{twice[0]}" stands there more than once')
    if not any(v.kind == "gpu" for v in spec.vertices):
        raise ClustersimError('topology.vertices: no vertex is a GPU; give at least one kind = "gpu"')


def _check_cables(spec: VertexByVertex) -> None:
    known = {v.name for v in spec.vertices}
    joined: set[tuple[str, str]] = set()
    for number, cable in enumerate(spec.cables):
        place, (a, b) = f"topology.cables[{number}]", cable.ends
        for end in cable.ends:
            if end not in known:
                raise ClustersimError(f'{place}: no vertex is called "{end}"{nearest(end, known)}')
        if a == b:
            raise ClustersimError(f'{place}: joins "{a}" to itself')
        ways = {(a, b)} if cable.one_way else {(a, b), (b, a)}
        if ways & joined:
            raise ClustersimError(
                f'{place}: "{a}" and "{b}" are joined already; give one cable their bandwidth together'
            )
        joined |= ways


def _nvlink_domains(spec: VertexByVertex, gpus: Sequence[str]) -> list[int]:
    """GPUs joined by cables and NVSwitches alone share a domain; numbered by their first GPU."""
    near = nx.Graph()
    near.add_nodes_from(v.name for v in spec.vertices if v.kind in ("gpu", "nvswitch"))
    near.add_edges_from(c.ends for c in spec.cables if c.ends[0] in near and c.ends[1] in near)
    part = {name: n for n, names in enumerate(nx.connected_components(near)) for name in names}
    number = {p: n for n, p in enumerate(dict.fromkeys(part[gpu] for gpu in gpus))}
    return [number[part[gpu]] for gpu in gpus]


#: Family → how its machine is drawn.
FAMILIES: dict[str, Callable[[Any], Drawing]] = {
    "single_server": _single_server,
    "rail_fat_tree": _rail_fat_tree,
    "fat_tree": _fat_tree,
    "nvl72": _nvl72,
    "dragonfly": _dragonfly,
    "explicit": _explicit,
}
