"""The machine as a graph: GPUs, NVSwitches, network cards and switches, joined by directed links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from clustersim.errors import ClustersimError, pick
from clustersim.plan.families import FAMILIES, Cable, Drawing
from clustersim.spec.hardware import Gpu, TopologySpec, VertexByVertex

#: GPUs from which `summary` measures the longest path; the families look alike from everywhere.
_LOOKOUTS = 16

#: How many links a global link of a dragonfly counts for when ways are compared: more than the two
#: local ones that may stand beside it, so that no minimal way has a second one.
_GLOBAL = 3


@dataclass(frozen=True, eq=False)
class Links:
    """Every directed link of the machine, as arrays over K links.

    source, target  vertex names
    tier            "gpu-nvswitch", "nic-leaf" …: the kinds of source and target; "group-group" between
                    groups of routers
    bandwidth       float64[K] bytes/s
    latency         float64[K] s
    cables          int32[K] equal ones in parallel that a link stands for, its bandwidth being that of all
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    tier: tuple[str, ...]
    bandwidth: NDArray[np.float64]
    latency: NDArray[np.float64]
    cables: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Topology:
    """The machine as a frozen graph, with what the planner asks of it most as arrays over R GPUs.

    graph    vertices by name with `kind`, `server` (-1 outside of servers), `group` (of a dragonfly's
            router, else -1) and `parts` (equal ones that it stands for); edges with `link`, the number of
            a link, and `weight`, how many it counts for when ways are compared
    gpu      what each GPU is; all are alike
    gpus     vertex names in rank order
    server   int32[R] the box a GPU sits in
    domain   int32[R] the NVLink domain: GPUs that reach each other without a network card
    rail     int32[R] position of the GPU's (first) card in its server where the cards form rails, else -1;
            where there are rails all servers are alike and the GPUs of one are numbered in a row
    links    the directed links
    routing  minimal, or valiant: between groups of routers through a third one
    fabric   what the cards speak, as of a server
    switch_reduces  whether the NVSwitches add up and copy, as of a server
    """

    graph: nx.DiGraph
    gpu: Gpu
    gpus: tuple[str, ...]
    server: NDArray[np.int32]
    domain: NDArray[np.int32]
    rail: NDArray[np.int32]
    links: Links
    routing: str = "minimal"
    fabric: str = "infiniband"
    switch_reduces: bool = True


def build(spec: TopologySpec) -> Topology:
    """The machine a topology table describes.

    Raises  ClustersimError if its numbers do not fit together, a link has no bandwidth, it is
            too large, or some GPU cannot reach another
    """
    family = pick(FAMILIES, spec.family, "topology.family")
    about = spec if isinstance(spec, VertexByVertex) else spec.server
    topology = replace(_assembled(family(spec)), fabric=about.fabric, switch_reduces=about.switch_reduces)
    _check_reach(topology)
    return topology


def summary(topology: Topology) -> dict[str, Any]:
    """Counts for people and for the summary of a run.

    Returns  servers; vertices by kind; links and their bandwidth (bytes/s, all directed links added up) by
             tier, what is drawn as one counted as all it stands for; longest_path: links between the GPUs
             furthest apart, as seen from a sample of GPUs
    """
    links = topology.links
    bandwidth: dict[str, float] = dict.fromkeys(links.tier, 0.0)
    cables: Counter[str] = Counter()
    for tier, value, number in zip(links.tier, links.bandwidth.tolist(), links.cables.tolist(), strict=True):
        bandwidth[tier] += value
        cables[tier] += number
    vertices: Counter[str] = Counter()
    for _, vertex in topology.graph.nodes(data=True):
        vertices[vertex["kind"]] += vertex["parts"]
    return {
        "servers": len(set(topology.server.tolist())),
        "vertices": dict(vertices),
        "links": dict(cables),
        "bandwidth": bandwidth,
        "longest_path": _longest_path(topology),
    }


def _longest_path(topology: Topology) -> int:
    step = -(-len(topology.gpus) // _LOOKOUTS)
    fields = (_lengths(topology, gpu) for gpu in topology.gpus[::step])
    return int(max(field[gpu] for field in fields for gpu in topology.gpus))


def _lengths(topology: Topology, source: str) -> dict[str, int]:
    """Vertex → links on the way there; global links are avoided by their weight."""
    if "group-group" in topology.links.tier:
        found = nx.single_source_dijkstra_path(topology.graph, source)
        return {vertex: len(path) - 1 for vertex, path in found.items()}
    return dict(nx.single_source_shortest_path_length(topology.graph, source))


# ---- the drawing becomes a graph ----------------------------------------------------------------


def _assembled(drawing: Drawing) -> Topology:
    graph = nx.DiGraph()
    graph.add_nodes_from(
        (v.name, {"kind": v.kind, "server": v.server, "group": v.group, "parts": v.parts})
        for v in drawing.vertices
    )
    directed = [link for cable in drawing.cables for link in _directions(cable)]
    links = _links(graph, directed)
    graph.add_edges_from(
        (a, b, {"link": number, "weight": _GLOBAL if tier == "group-group" else 1})
        for number, (a, b, tier) in enumerate(zip(links.source, links.target, links.tier, strict=True))
    )
    gpus = [v for v in drawing.vertices if v.kind == "gpu"]
    return Topology(
        graph=nx.freeze(graph),
        gpu=drawing.gpu,
        gpus=tuple(v.name for v in gpus),
        server=_constant([v.server for v in gpus], np.int32),
        domain=_constant(drawing.domain, np.int32),
        rail=_constant(drawing.rail, np.int32),
        links=links,
        routing=drawing.routing,
    )


def _directions(cable: Cable) -> tuple[Cable, ...]:
    back = cable._replace(first=cable.second, second=cable.first)
    return (cable,) if cable.one_way else (cable, back)


def _links(graph: nx.DiGraph, directed: Sequence[Cable]) -> Links:
    for link in directed:
        if link.bandwidth <= 0:
            raise ClustersimError(
                f'topology: the link from "{link.first}" to "{link.second}" has no bandwidth; '
                "give it more than 0 B/s"
            )
    return Links(
        source=tuple(link.first for link in directed),
        target=tuple(link.second for link in directed),
        tier=tuple(_tier(graph.nodes[link.first], graph.nodes[link.second]) for link in directed),
        bandwidth=_constant([link.bandwidth for link in directed], np.float64),
        latency=_constant([link.latency for link in directed], np.float64),
        cables=_constant([link.cables for link in directed], np.int32),
    )


def _tier(source: dict[str, Any], target: dict[str, Any]) -> str:
    if source["group"] != target["group"] and min(source["group"], target["group"]) >= 0:
        return "group-group"
    return f"{source['kind']}-{target['kind']}"


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
