"""Machines as graphs: laws over every family, the numbers of each, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import networkx as nx
import numpy as np
import pytest

from clustersim.errors import ClustersimError
from clustersim.plan.topology import FAMILIES, Topology, build, summary
from clustersim.spec.hardware import (
    Cable,
    FatTree,
    Gpu,
    Nvl72,
    RailFatTree,
    Server,
    SingleServer,
    TopologySpec,
    Vertex,
    VertexByVertex,
)

GPU = Gpu(
    name="g",
    flop_rate={"bf16": "989 TFLOP/s"},
    memory="80 GiB",
    memory_bandwidth="3.35 TB/s",
    sms=132,
    tiles=[[128, 256]],
    launch_latency="3 us",
    source="test",
)


def server(gpus: int = 8, nics: int = 8, **other: Any) -> Server:
    values = {
        "nvlink_bandwidth": "450 GB/s",
        "nvlink_latency": "1 us",
        "nic_bandwidth": "400 Gb/s",
        "nic_latency": "4 us",
        "pcie_bandwidth": "64 GB/s",
    }
    return Server(name="s", gpu=GPU, gpus=gpus, nics=nics, source="test", **(values | other))


def rails(box: Server, servers: int, **other: Any) -> RailFatTree:
    return RailFatTree(family="rail_fat_tree", server=box, servers=servers, **other)


def fat_tree(box: Server, servers: int, servers_per_leaf: int, spines: int, **other: Any) -> FatTree:
    return FatTree(
        family="fat_tree",
        server=box,
        servers=servers,
        servers_per_leaf=servers_per_leaf,
        spines=spines,
        **({"uplink_bandwidth": "400 Gb/s"} | other),
    )


def explicit(kinds: dict[str, str], *cables: tuple[str, str], **other: Any) -> VertexByVertex:
    """Vertices by name → kind; cables of 1 GB/s and 1 us, one way where ">" precedes the second name."""
    return VertexByVertex(
        family="explicit",
        gpu=GPU,
        vertices=[Vertex(name=name, kind=kind) for name, kind in kinds.items()],
        cables=[
            Cable(
                ends=(a, b.lstrip(">")),
                one_way=b[0] == ">",
                **({"bandwidth": "1 GB/s", "latency": "1 us"} | other),
            )
            for a, b in cables
        ],
    )


SPECS: dict[str, TopologySpec] = {
    "single server": SingleServer(family="single_server", server=server()),
    "rails of one pod": rails(server(), 4),
    "rails of three pods": rails(server(), 6, servers_per_pod=2, spines=2),
    "rails with shared cards": rails(server(8, 4), 4, servers_per_pod=2, spines=3),
    "rails with spare cards": rails(server(3, 8), 4, servers_per_pod=2, spines=1),
    "fat tree": fat_tree(server(), 8, 2, 4),
    "fat tree with shared cards": fat_tree(server(8, 2), 4, 2, 3),
    "fat tree with spare cards": fat_tree(server(2, 4), 4, 1, 3),
    "one NVLink rack": Nvl72(family="nvl72", server=server(4, 4), racks=1, trays=3),
    "NVLink racks": Nvl72(family="nvl72", server=server(4, 4), racks=3, trays=2),
    "NVLink racks with spines": Nvl72(family="nvl72", server=server(4, 4), racks=3, trays=2, spines=2),
    "GPUs sharing a card and a switch": explicit(
        {"a": "gpu", "b": "gpu", "c": "gpu", "nv": "nvswitch", "card": "nic", "far": "nic", "leaf": "leaf"},
        *(
            ("a", "nv"),
            ("b", "nv"),
            ("a", "card"),
            ("b", "card"),
            ("card", "leaf"),
            ("leaf", "far"),
            ("far", "c"),
        ),
    ),
    "a card that joins two leaves": explicit(
        {"a": "gpu", "x": "nic", "l": "leaf", "m": "gpu", "card": "nic", "r": "leaf", "y": "nic", "b": "gpu"}
        | {"detour": "spine", "longer": "spine"},
        *(("a", "x"), ("x", "l"), ("m", "card"), ("l", "card"), ("card", "r"), ("r", "y"), ("y", "b")),
        *(("l", "detour"), ("detour", "longer"), ("longer", "r")),
    ),
    "cards back to back": explicit(
        {"a": "gpu", "x": "nic", "y": "nic", "b": "gpu"}, ("a", "x"), ("x", "y"), ("y", "b")
    ),
    "a ring of GPUs without switches": explicit(
        dict.fromkeys("abcdef", "gpu"), *zip("abcdef", "bcdefa", strict=True)
    ),
    "a one-way ring": explicit(dict.fromkeys("abc", "gpu"), ("a", ">b"), ("b", ">c"), ("c", ">a")),
    "a lonely GPU": explicit({"a": "gpu"}),
}

over_specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def test_every_family_has_an_example_here():
    assert {spec.family for spec in SPECS.values()} == set(FAMILIES)


@over_specs
def test_graph_and_link_arrays_tell_the_same(spec: TopologySpec):
    topology = build(spec)
    links, graph = topology.links, topology.graph
    assert graph.number_of_edges() == len(links.source) == len(links.bandwidth) == len(links.latency)
    for a, b, number in graph.edges(data="link"):
        assert (links.source[number], links.target[number]) == (a, b)
        assert links.tier[number] == f"{graph.nodes[a]['kind']}-{graph.nodes[b]['kind']}"
    assert (links.bandwidth > 0).all() and (links.latency >= 0).all()


@over_specs
def test_gpus_are_listed_once_with_their_server(spec: TopologySpec):
    topology = build(spec)
    kinds = topology.graph.nodes(data="kind")
    assert sorted(topology.gpus) == sorted(name for name, kind in kinds if kind == "gpu")
    assert [topology.graph.nodes[g]["server"] for g in topology.gpus] == topology.server.tolist()
    assert len(topology.gpus) == len(topology.domain) == len(topology.rail)
    assert {s for _, s in topology.graph.nodes(data="server")} >= set(topology.server.tolist())


@over_specs
def test_a_domain_is_what_nvlink_joins(spec: TopologySpec):
    topology = build(spec)
    kind = topology.graph.nodes(data="kind")
    near = topology.graph.subgraph([v for v, k in kind if k in ("gpu", "nvswitch")]).to_undirected()
    for gpu, domain in zip(topology.gpus, topology.domain, strict=True):
        joined = nx.node_connected_component(near, gpu)
        assert joined & set(topology.gpus) == {
            topology.gpus[r] for r in np.flatnonzero(topology.domain == domain)
        }


@over_specs
def test_the_same_spec_gives_the_same_machine(spec: TopologySpec):
    once, again = build(spec), build(spec)
    assert list(once.graph) == list(again.graph)
    assert (once.gpus, once.links.source, once.links.target) == (
        again.gpus,
        again.links.source,
        again.links.target,
    )


@over_specs
def test_nobody_can_change_a_machine(spec: TopologySpec):
    topology = build(spec)
    for array in (topology.server, topology.domain, topology.rail, topology.links.bandwidth):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
    with pytest.raises(nx.NetworkXError):
        topology.graph.add_edge("gpu0", "gpu1")


@over_specs
def test_summary_counts_everything_once(spec: TopologySpec):
    topology = build(spec)
    found = summary(topology)
    assert sum(found["vertices"].values()) == len(topology.graph)
    assert sum(found["links"].values()) == len(topology.links.source)
    assert sum(found["bandwidth"].values()) == pytest.approx(topology.links.bandwidth.sum())


def cards_of(topology: Topology, gpu: str) -> list[str]:
    return [v for v in topology.graph[gpu] if topology.graph.nodes[v]["kind"] == "nic"]


def test_gpus_share_cards_in_order_where_there_are_fewer():
    # GPU g uses card g * 4 // 8.
    topology = build(SPECS["rails with shared cards"])
    assert [cards_of(topology, f"gpu{g}") for g in range(8)] == [
        [f"server0/nic{c}"] for c in (0, 0, 1, 1, 2, 2, 3, 3)
    ]
    assert topology.rail[:8].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_cards_are_spread_over_gpus_where_there_are_more():
    # Card c belongs to GPU c * 3 // 8: 0 0 0 1 1 1 2 2.
    topology = build(SPECS["rails with spare cards"])
    numbers = [[int(card[-1]) for card in cards_of(topology, f"gpu{g}")] for g in range(3)]
    assert numbers == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert topology.rail[:3].tolist() == [0, 3, 6]


def test_rails_join_equal_cards_of_a_pod_and_spines_equal_rails():
    topology = build(SPECS["rails of three pods"])
    leaf = set(topology.graph.successors("pod1/rail3/leaf"))
    assert leaf == {"server2/nic3", "server3/nic3", "rail3/spine0", "rail3/spine1"}
    spine = set(topology.graph.successors("rail3/spine1"))
    assert spine == {f"pod{p}/rail3/leaf" for p in range(3)}


def test_all_cards_of_a_server_hang_on_one_leaf_of_a_fat_tree():
    topology = build(SPECS["fat tree"])
    above = set(topology.graph.successors("leaf1"))
    boxes = {f"server{s}/nic{c}" for s in (2, 3) for c in range(8)}
    assert above == boxes | {f"spine{n}" for n in range(4)}


def test_a_rack_is_one_domain_and_a_tray_one_server():
    topology = build(SPECS["NVLink racks"])
    assert topology.server.tolist() == [r // 4 for r in range(24)]
    assert topology.domain.tolist() == [r // 8 for r in range(24)]
    assert len(list(topology.graph.successors("rack1/nvswitch"))) == 8
    assert len(list(topology.graph.successors("pod0/rail2/leaf"))) == 6


def test_racks_have_leaves_of_their_own_where_there_are_spines():
    topology = build(SPECS["NVLink racks with spines"])
    assert set(topology.graph.successors("pod1/rail2/leaf")) == {
        "server2/nic2",
        "server3/nic2",
        "rail2/spine0",
        "rail2/spine1",
    }


def test_latencies_and_bandwidths_stand_on_the_right_links():
    topology = build(SPECS["fat tree"])
    tiers = set(zip(topology.links.tier, topology.links.bandwidth, topology.links.latency, strict=True))
    # 1 us through NVLink is two links, 4 us from GPU to GPU through a leaf four, 2.315 us over a spine two.
    one_way = {
        ("gpu-nvswitch", 450e9, 0.5e-6),
        ("gpu-nic", 64e9, 1e-6),
        ("nic-leaf", 50e9, 1e-6),
        ("leaf-spine", 50e9, 2.315e-6 / 2),
    }
    back = {("-".join(reversed(tier.split("-"))), b, t) for tier, b, t in one_way}
    assert tiers == one_way | back


def test_summary_of_a_rail_tree_by_hand():
    # 4 servers of 8 GPUs and 8 cards; to another position: GPU, NVSwitch, GPU, card, leaf, card, GPU.
    assert summary(build(SPECS["rails of one pod"])) == {
        "servers": 4,
        "vertices": {"gpu": 32, "nic": 32, "nvswitch": 4, "leaf": 8},
        "links": dict.fromkeys(
            ["gpu-nvswitch", "nvswitch-gpu", "gpu-nic", "nic-gpu", "nic-leaf", "leaf-nic"], 32
        ),
        "bandwidth": {
            **dict.fromkeys(["gpu-nvswitch", "nvswitch-gpu"], 32 * 450e9),
            **dict.fromkeys(["gpu-nic", "nic-gpu"], 32 * 64e9),
            **dict.fromkeys(["nic-leaf", "leaf-nic"], 32 * 50e9),
        },
        "longest_path": 6,
    }


def test_listed_order_is_rank_order_and_domains_are_counted_by_it():
    topology = build(
        explicit(
            {"leaf": "leaf", "z": "gpu", "n": "nic", "a": "gpu", "nv": "nvswitch", "m": "gpu"},
            *(("m", "nv"), ("nv", "z"), ("a", "n"), ("z", "leaf"), ("n", "leaf")),
        )
    )
    assert topology.gpus == ("z", "a", "m")
    assert topology.domain.tolist() == [0, 1, 0]
    assert topology.graph.nodes["leaf"]["server"] == -1


PAIR = {"a": "gpu", "b": "gpu"}

WRONG: dict[str, tuple[TopologySpec, str]] = {
    "pods of unequal size": (
        rails(server(), 12, servers_per_pod=5, spines=1),
        r"servers_per_pod = 5 does not divide 12 servers; try 4 or 6",
    ),
    "a pod larger than all": (
        rails(server(), 12, servers_per_pod=24, spines=1),
        r"servers_per_pod = 24 does not divide 12 servers; try 12",
    ),
    "leaves of unequal size": (fat_tree(server(), 6, 4, 1), r"servers_per_leaf = 4 .* try 3 or 6"),
    "pods without spines": (rails(server(), 4, servers_per_pod=2), r"spines = 0 leaves 2 pods apart"),
    "NVLink that carries nothing": (
        SingleServer(family="single_server", server=server(nvlink_bandwidth="0 B/s")),
        r'from "gpu0" to "server0/nvswitch" has no bandwidth',
    ),
    "uplinks that carry nothing": (
        fat_tree(server(), 4, 2, 1, uplink_bandwidth="0 Gb/s"),
        r'from "leaf0" to "spine0" has no bandwidth',
    ),
    "a slip of zeros": (rails(server(), 10_000_000), "170000008 vertices are too many"),
    "too many uplinks": (fat_tree(server(1, 1), 2_000, 1, 2_000), "links are too many"),
    "GPUs apart": (explicit(PAIR), 'no links lead from GPU "a" to "b"'),
    "a way there but not back": (explicit(PAIR, ("a", ">b")), 'no links lead from GPU "b" to "a"'),
    "no GPU": (explicit({"x": "leaf"}), "no vertex is a GPU"),
    "an unknown end": (
        explicit({"gpu0": "gpu", "gpu1": "gpu"}, ("gpu0", "gpul")),
        r'cables\[0\]: no vertex is called "gpul" \(did you mean "gpu1"\?\)',
    ),
    "a loop": (explicit(PAIR, ("a", "b"), ("b", "b")), r'cables\[1\]: joins "b" to itself'),
    "two cables side by side": (
        explicit(PAIR, ("a", "b"), ("b", ">a")),
        r"cables\[1\]: .* joined already",
    ),
}


@pytest.mark.parametrize(("spec", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_machine_that_cannot_work_is_refused_with_the_reason(spec: TopologySpec, message: str):
    with pytest.raises(ClustersimError, match=message):
        build(spec)


def test_a_name_listed_twice_is_refused():
    twice = [Vertex(name="a", kind="gpu"), Vertex(name="a", kind="gpu")]
    with pytest.raises(ClustersimError, match='"a" stands there more than once'):
        build(VertexByVertex(family="explicit", gpu=GPU, vertices=twice, cables=()))


def test_two_one_way_cables_make_a_two_way_street():
    topology = build(explicit(PAIR, ("a", ">b"), ("b", ">a")))
    assert Counter(topology.links.source) == {"a": 1, "b": 1}
