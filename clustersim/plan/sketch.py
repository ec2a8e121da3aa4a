"""What a drawing of a machine shows: every part of a small one, counts of equal parts of a large one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from clustersim.plan.topology import Topology

#: Up to so many vertices each is drawn; beyond, servers are drawn as one box each, as long as no row
#: is longer than `_ROW`; beyond that, equal boxes and switches are drawn once, with their number.
_VERTICES = 80
_ROW = 20
#: More classes of equal parts than this show nothing; then all of a kind are one.
_CLASSES = 24


@dataclass(frozen=True, slots=True)
class Node:
    """One box of the drawing.

    name    of the vertex, the server, or the kind
    kind    of vertex; "server" for a box with all its parts
    server  the box it stands in, -1 outside of servers
    count   of equal boxes drawn as this one
    parts   kind → how many of it each holds, with what each stands for
    """

    name: str
    kind: str
    server: int
    count: int
    parts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Bundle:
    """All links of a tier between two boxes of the drawing, one way.

    source, target  node numbers; equal ones join boxes drawn as one
    tier            as in plan.topology.Links
    cables          how many
    bandwidth       of all together, bytes/s
    """

    source: int
    target: int
    tier: str
    cables: int
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Sketch:
    """Nodes and what joins them; detail: parts, servers or kinds, whichever the nodes stand for."""

    detail: str
    nodes: tuple[Node, ...]
    bundles: tuple[Bundle, ...]


def sketch(topology: Topology) -> Sketch:
    """The most detailed drawing that can be read."""
    graph = topology.graph
    if len(graph) <= _VERTICES:
        return _quotient(topology, {name: name for name in graph}, "parts")
    boxes = {name: _box(name, vertex) for name, vertex in graph.nodes(data=True)}
    servers = _quotient(topology, boxes, "servers")
    rows = Counter(node.kind for node in servers.nodes)
    if max(rows.values()) <= _ROW:
        return servers
    number = {node.name: n for n, node in enumerate(servers.nodes)}
    colours = _colours(servers)
    if len(set(colours)) > _CLASSES:
        kinds = sorted({node.kind for node in servers.nodes})
        colours = [kinds.index(node.kind) for node in servers.nodes]
    return _quotient(topology, {name: str(colours[number[box]]) for name, box in boxes.items()}, "kinds")


def _box(name: str, vertex: Mapping[str, int | str]) -> str:
    inside = vertex["kind"] in ("gpu", "nic", "nvswitch") and vertex["server"] != -1
    return f"server{vertex['server']}" if inside else name


def _quotient(topology: Topology, place: Mapping[str, str], detail: str) -> Sketch:
    """The machine with all vertices of a place drawn as one.

    place  vertex → where it is drawn
    """
    number = {where: n for n, where in enumerate(dict.fromkeys(place.values()))}
    nodes = _nodes(topology, place, list(number), detail)
    cables: Counter[tuple[int, int, str]] = Counter()
    bandwidth: dict[tuple[int, int, str], float] = defaultdict(float)
    links, vertices = topology.links, topology.graph.nodes
    for source, target, tier, width, times in zip(
        links.source, links.target, links.tier, links.bandwidth.tolist(), links.cables.tolist(), strict=True
    ):
        within = _box(source, vertices[source]) == _box(target, vertices[target])
        if within and detail != "parts":
            continue  # a link inside of a server that is drawn as one box
        ends = number[place[source]], number[place[target]], tier
        cables[ends] += times
        bandwidth[ends] += width
    bundles = tuple(Bundle(*ends, cables[ends], bandwidth[ends]) for ends in cables)
    return Sketch(detail, nodes, bundles)


def _nodes(topology: Topology, place: Mapping[str, str], places: list[str], detail: str) -> tuple[Node, ...]:
    vertices = topology.graph.nodes
    held: dict[str, list[str]] = {where: [] for where in places}
    for name in vertices:
        held[place[name]].append(name)
    nodes = []
    for where, names in held.items():
        boxes = {_box(name, vertices[name]) for name in names} if detail != "parts" else set(names)
        first = vertices[names[0]]
        is_server = detail != "parts" and _box(names[0], first) != names[0]
        parts: Counter[str] = Counter()
        for name in names:
            parts[vertices[name]["kind"]] += vertices[name]["parts"]
        nodes.append(
            Node(
                name=where,
                kind="server" if is_server else first["kind"],
                server=first["server"],
                count=len(boxes),
                parts={kind: number // len(boxes) for kind, number in parts.items()},
            )
        )
    return tuple(nodes)


def _colours(servers: Sketch) -> list[int]:
    """A number per node; equal ones look alike from wherever one looks (colour refinement).

    Source  Weisfeiler, Leman: The reduction of a graph to canonical form, 1968.
    """
    around: dict[int, list[tuple[int, bool, int, float]]] = defaultdict(list)
    for bundle in servers.bundles:
        around[bundle.source].append((bundle.target, True, bundle.cables, bundle.bandwidth))
        around[bundle.target].append((bundle.source, False, bundle.cables, bundle.bandwidth))
    looks: list[object] = [(node.kind, tuple(sorted(node.parts.items()))) for node in servers.nodes]
    colours = _numbered(looks)
    while True:
        finer = _numbered(
            [
                (
                    colours[n],
                    tuple(sorted((colours[at], out, times, width) for at, out, times, width in around[n])),
                )
                for n in range(len(servers.nodes))
            ]
        )
        if len(set(finer)) == len(set(colours)):
            return finer
        colours = finer


def _numbered(looks: list[object]) -> list[int]:
    number: dict[object, int] = {}
    return [number.setdefault(look, len(number)) for look in looks]
