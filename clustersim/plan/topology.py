"""The machine as a graph: GPUs, NVSwitches, network cards, leaves and spines, joined by directed links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from clustersim.errors import ClustersimError, nearest, pick
from clustersim.spec.hardware import (
    FatTree,
    Gpu,
    Nvl72,
    RailFatTree,
    Server,
    SingleServer,
    TopologySpec,
    VertexByVertex,
)

#: As many as a vertex-by-vertex file may describe; a family's parameters can wish for far more.
MOST_VERTICES = 200_000
MOST_LINKS = 2_000_000

#: GPUs from which `summary` measures the longest path; the families look alike from everywhere.
_LOOKOUTS = 16


@dataclass(frozen=True, eq=False)
class Links:
    """Every directed link of the machine, as arrays over K links.

    source, target  vertex names
    tier            "gpu-nvswitch", "nic-leaf" …: the kinds of source and target
    bandwidth       float64[K] bytes/s
    latency         float64[K] s
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    tier: tuple[str, ...]
    bandwidth: NDArray[np.float64]
    latency: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Topology:
    """The machine as a frozen graph, with what the planner asks of it most as arrays over R GPUs.

    graph   vertices by name with `kind` and `server` (-1 outside of servers); edges with `link`,
            the number of a link
    gpu     what each GPU is; all are alike
    gpus    vertex names in rank order
    server  int32[R] the box a GPU sits in
    domain  int32[R] the NVLink domain: GPUs that reach each other without a network card
    rail    int32[R] position of the GPU's (first) card in its server where the cards form rails, else -1;
            where there are rails all servers are alike and the GPUs of one are numbered in a row
    links   the directed links
    """

    graph: nx.DiGraph
    gpu: Gpu
    gpus: tuple[str, ...]
    server: NDArray[np.int32]
    domain: NDArray[np.int32]
    rail: NDArray[np.int32]
    links: Links


class _Vertex(NamedTuple):
    name: str
    kind: str
    server: int = -1


class _Cable(NamedTuple):
    """Two directed links, or only the one from `first` to `second`."""

    first: str
    second: str
    bandwidth: float
    latency: float
    one_way: bool = False


class _Drawing(NamedTuple):
    """What a family says of its machine; `domain` and `rail` are over its GPUs, in rank order."""

    gpu: Gpu
    vertices: Sequence[_Vertex]
    cables: Sequence[_Cable]
    domain: Sequence[int]
    rail: Sequence[int]


def build(spec: TopologySpec) -> Topology:
    """The machine a topology table describes.

    Raises  ClustersimError if its numbers do not fit together, a link has no bandwidth, it is
            too large, or some GPU cannot reach another
    """
    family = pick(FAMILIES, spec.family, "topology.family")
    topology = _assembled(family(spec))
    _check_reach(topology)
    return topology


def summary(topology: Topology) -> dict[str, Any]:
    """Counts for people and for the summary of a run.

    Returns  servers; vertices by kind; links and their bandwidth (bytes/s, all directed links added up) by
             tier; longest_path: links between the GPUs furthest apart, as seen from a sample of GPUs
    """
    links = topology.links
    bandwidth: dict[str, float] = dict.fromkeys(links.tier, 0.0)
    for tier, value in zip(links.tier, links.bandwidth.tolist(), strict=True):
        bandwidth[tier] += value
    return {
        "servers": len(set(topology.server.tolist())),
        "vertices": dict(Counter(kind for _, kind in topology.graph.nodes(data="kind"))),
        "links": dict(Counter(links.tier)),
        "bandwidth": bandwidth,
        "longest_path": _longest_path(topology),
    }


def _longest_path(topology: Topology) -> int:
    step = -(-len(topology.gpus) // _LOOKOUTS)
    fields = (nx.single_source_shortest_path_length(topology.graph, gpu) for gpu in topology.gpus[::step])
    return int(max(field[gpu] for field in fields for gpu in topology.gpus))


# ---- the drawing becomes a graph ----------------------------------------------------------------


def _assembled(drawing: _Drawing) -> Topology:
    graph = nx.DiGraph()
    graph.add_nodes_from((v.name, {"kind": v.kind, "server": v.server}) for v in drawing.vertices)
    directed = [link for cable in drawing.cables for link in _directions(cable)]
    graph.add_edges_from((a, b, {"link": number}) for number, (a, b, *_) in enumerate(directed))
    gpus = [v for v in drawing.vertices if v.kind == "gpu"]
    return Topology(
        graph=nx.freeze(graph),
        gpu=drawing.gpu,
        gpus=tuple(v.name for v in gpus),
        server=_constant([v.server for v in gpus], np.int32),
        domain=_constant(drawing.domain, np.int32),
        rail=_constant(drawing.rail, np.int32),
        links=_links(graph, directed),
    )


def _directions(cable: _Cable) -> tuple[_Cable, ...]:
    back = cable._replace(first=cable.second, second=cable.first)
    return (cable,) if cable.one_way else (cable, back)


def _links(graph: nx.DiGraph, directed: Sequence[_Cable]) -> Links:
    for link in directed:
        if link.bandwidth <= 0:
            raise ClustersimError(
                f'topology: the link from "{link.first}" to "{link.second}" has no bandwidth; '
                "give it more than 0 B/s"
            )
    kind = graph.nodes(data="kind")
    return Links(
        source=tuple(link.first for link in directed),
        target=tuple(link.second for link in directed),
        tier=tuple(f"{kind[link.first]}-{kind[link.second]}" for link in directed),
        bandwidth=_constant([link.bandwidth for link in directed], np.float64),
        latency=_constant([link.latency for link in directed], np.float64),
    )


def _constant(values: Sequence[float], dtype: type) -> NDArray[Any]:
    array: NDArray[Any] = np.array(values, dtype=dtype)
    array.setflags(write=False)
    return array


def _check_reach(topology: Topology) -> None:
    """All GPUs reach each other just when one strongly connected component holds them all."""
    first = topology.gpus[0]
    for there, graph in ((True, topology.graph), (False, topology.graph.reverse(copy=False))):
        reached = nx.descendants(graph, first)
        for gpu in topology.gpus[1:]:
            if gpu not in reached:
                a, b = (first, gpu) if there else (gpu, first)
                raise ClustersimError(
                    f'topology: no links lead from GPU "{a}" to "{b}"; every GPU must reach every other'
                )


# ---- parts the families share -------------------------------------------------------------------


def _check_divides(key: str, part: int, whole: int) -> None:
    if whole % part:
        fits = [n for n in range(1, whole + 1) if whole % n == 0]
        near = {max(n for n in fits if n < part), min((n for n in fits if n > part), default=whole)}
        raise ClustersimError(
            f"topology.{key} = {part} does not divide {whole} servers; "
            f"try {' or '.join(map(str, sorted(near)))}"
        )


def _check_size(server: Server, boxes: int, switches: int, uplinks: int) -> None:
    """Before anything is drawn: a slip of a few zeros must not fill the memory.

    switches  leaves and spines
    """
    vertices = boxes * (server.gpus + server.nics + 1) + switches
    cables = boxes * (server.gpus + server.nics + max(server.gpus, server.nics)) + uplinks
    for number, most, what in ((vertices, MOST_VERTICES, "vertices"), (2 * cables, MOST_LINKS, "links")):
        if number > most:
            raise ClustersimError(f"topology: {number} {what} are too many; there may be {most}")


def _cards(server: Server) -> list[tuple[int, int]]:
    """(GPU, card) pairs that are joined, by their positions in the server."""
    gpus, nics = server.gpus, server.nics
    if nics < gpus:
        return [(g, g * nics // gpus) for g in range(gpus)]
    return [(c * gpus // nics, c) for c in range(nics)]


class _Plan(NamedTuple):
    """Boxes of one kind under leaves and spines.

    switch   name of the NVLink plane of each box
    leaves   for each box the names of the leaves of card 0, 1 …
    spines   names of the spines above each leaf, by leaf
    uplink   bandwidth (bytes/s) and latency (s) of a link between leaf and spine
    """

    server: Server
    switch: Sequence[str]
    leaves: Sequence[Sequence[str]]
    spines: Mapping[str, Sequence[str]]
    uplink: tuple[float, float]


def _drawn(plan: _Plan) -> _Drawing:
    """GPUs are numbered box by box; a domain is the boxes with the same NVLink plane."""
    server, boxes = plan.server, range(len(plan.switch))
    spines = dict.fromkeys(chain(*plan.spines.values()))
    number = {switch: n for n, switch in enumerate(dict.fromkeys(plan.switch))}
    return _Drawing(
        gpu=server.gpu,
        vertices=(
            *chain(*(_box_vertices(server, box) for box in boxes)),
            *_planes(plan.switch),
            *(_Vertex(leaf, "leaf") for leaf in plan.spines),
            *(_Vertex(spine, "spine") for spine in spines),
        ),
        cables=(
            *chain(*(_nvlinks(server, box, plan.switch[box]) for box in boxes)),
            *chain(*(_card_cables(server, box, plan.leaves[box]) for box in boxes)),
            *(_Cable(leaf, spine, *plan.uplink) for leaf, above in plan.spines.items() for spine in above),
        ),
        domain=[number[switch] for switch in plan.switch for _ in range(server.gpus)],
        rail=[-1] * (len(boxes) * server.gpus),
    )


def _box_vertices(server: Server, box: int) -> Iterator[_Vertex]:
    first = box * server.gpus
    yield from (_Vertex(f"gpu{first + g}", "gpu", box) for g in range(server.gpus))
    yield from (_Vertex(f"server{box}/nic{c}", "nic", box) for c in range(server.nics))


def _planes(switch: Sequence[str]) -> Iterator[_Vertex]:
    """The NVSwitches; one that serves several boxes stands in none of them."""
    boxes = Counter(switch)
    for box, name in enumerate(switch):
        if boxes[name] == 1:
            yield _Vertex(name, "nvswitch", box)
    yield from (_Vertex(name, "nvswitch") for name, shared in boxes.items() if shared > 1)


def _nvlinks(server: Server, box: int, switch: str) -> Iterator[_Cable]:
    # Half of GPU to GPU on the way to the switch, half on the way from it.
    for g in range(box * server.gpus, (box + 1) * server.gpus):
        yield _Cable(f"gpu{g}", switch, server.nvlink_bandwidth, server.nvlink_latency / 2)


def _card_cables(server: Server, box: int, leaves: Sequence[str]) -> Iterator[_Cable]:
    """GPU to card and card to leaf; a quarter of GPU to leaf to GPU on each.

    leaves  of card 0, 1 …
    """
    first, latency = box * server.gpus, server.nic_latency / 4
    for g, c in _cards(server):
        yield _Cable(f"gpu{first + g}", f"server{box}/nic{c}", server.pcie_bandwidth, latency)
    for c, leaf in enumerate(leaves):
        yield _Cable(f"server{box}/nic{c}", leaf, server.nic_bandwidth, latency)


# ---- families -----------------------------------------------------------------------------------


def _single_server(spec: SingleServer) -> _Drawing:
    """No card is drawn: nothing lies beyond it."""
    server, switch = spec.server, "server0/nvswitch"
    _check_size(server, 1, 0, 0)
    gpus = [_Vertex(f"gpu{g}", "gpu", 0) for g in range(server.gpus)]
    return _Drawing(
        gpu=server.gpu,
        vertices=(*gpus, _Vertex(switch, "nvswitch", 0)),
        cables=tuple(_nvlinks(server, 0, switch)),
        domain=[0] * server.gpus,
        rail=[-1] * server.gpus,
    )


def _rail_fat_tree(spec: RailFatTree) -> _Drawing:
    per_pod = spec.servers_per_pod or spec.servers
    _check_divides("servers_per_pod", per_pod, spec.servers)
    if per_pod < spec.servers and not spec.spines:
        raise ClustersimError(
            f"topology.spines = 0 leaves {spec.servers // per_pod} pods apart; give each rail a "
            f"spine, or put all {spec.servers} servers into one pod with servers_per_pod = 0"
        )
    return _railed(spec, spec.servers, per_pod, lambda box: f"server{box}/nvswitch")


def _nvl72(spec: Nvl72) -> _Drawing:
    """Without spines the leaf of a rail joins all racks; with them each rack is a pod of its own."""
    boxes = spec.racks * spec.trays
    per_pod = spec.trays if spec.spines else boxes
    return _railed(spec, boxes, per_pod, lambda box: f"rack{box // spec.trays}/nvswitch")


def _railed(spec: RailFatTree | Nvl72, boxes: int, per_pod: int, plane: Callable[[int], str]) -> _Drawing:
    """Equal cards of the boxes of a pod share a leaf; a rail has its own spines.

    plane  box → name of its NVLink plane
    """
    server, pods, cards = spec.server, boxes // per_pod, range(spec.server.nics)
    _check_size(server, boxes, server.nics * (pods + spec.spines), server.nics * pods * spec.spines)
    leaves = [[f"pod{p}/rail{c}/leaf" for c in cards] for p in range(pods)]
    spines = [[f"rail{c}/spine{s}" for s in range(spec.spines)] for c in cards]
    drawing = _drawn(
        _Plan(
            server=server,
            switch=[plane(box) for box in range(boxes)],
            leaves=[leaves[box // per_pod] for box in range(boxes)],
            spines={leaf: above for pod in leaves for leaf, above in zip(pod, spines, strict=True)},
            uplink=(spec.uplink_bandwidth, spec.uplink_latency / 2),
        )
    )
    first_card = dict(reversed(_cards(server)))
    return drawing._replace(rail=[first_card[g] for g in range(server.gpus)] * boxes)


def _fat_tree(spec: FatTree) -> _Drawing:
    server, per_leaf, boxes = spec.server, spec.servers_per_leaf, range(spec.servers)
    _check_divides("servers_per_leaf", per_leaf, spec.servers)
    leaves = spec.servers // per_leaf
    _check_size(server, spec.servers, leaves + spec.spines, leaves * spec.spines)
    spines = [f"spine{n}" for n in range(spec.spines)]
    return _drawn(
        _Plan(
            server=server,
            switch=[f"server{box}/nvswitch" for box in boxes],
            leaves=[[f"leaf{box // per_leaf}"] * server.nics for box in boxes],
            spines={f"leaf{n}": spines for n in range(leaves)},
            uplink=(spec.uplink_bandwidth, spec.uplink_latency / 2),
        )
    )


def _explicit(spec: VertexByVertex) -> _Drawing:
    """GPUs take their rank from the order in which they are listed."""
    _check_names(spec)
    _check_cables(spec)
    outside = ("leaf", "spine")
    gpus = [v.name for v in spec.vertices if v.kind == "gpu"]
    return _Drawing(
        gpu=spec.gpu,
        vertices=[_Vertex(v.name, v.kind, -1 if v.kind in outside else v.server) for v in spec.vertices],
        cables=[_Cable(*c.ends, c.bandwidth, c.latency, c.one_way) for c in spec.cables],
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


FAMILIES: dict[str, Callable[[Any], _Drawing]] = {
    "single_server": _single_server,
    "rail_fat_tree": _rail_fat_tree,
    "fat_tree": _fat_tree,
    "nvl72": _nvl72,
    "explicit": _explicit,
}
