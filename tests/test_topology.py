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
    Dragonfly,
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


def racks(box: Server, **other: Any) -> Nvl72:
    return Nvl72(family="nvl72", server=box, **other)


def dragonfly(box: Server, groups: int, routers: int, global_links: int, **other: Any) -> Dragonfly:
    """One server per router; local links of 100 Gb/s and 0.4 us, global ones of 200 Gb/s and 0.5 us."""
    return Dragonfly(
        family="dragonfly",
        server=box,
        groups=groups,
        routers=routers,
        global_links=global_links,
        **{
            "servers_per_router": 1,
            "local_bandwidth": "100 Gb/s",
            "global_bandwidth": "200 Gb/s",
            "local_latency": "0.4 us",
            "global_latency": "0.5 us",
            **other,
        },
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
    "oversubscribed fat tree": fat_tree(server(), 6, 2, 4, uplink_bandwidth=None, oversubscription=4.0),
    "oversubscribed rails": rails(server(4, 4), 6, servers_per_pod=3, oversubscription=3.0),
    "sprayed fat tree": fat_tree(server(4, 4), 8, 2, 4, load_balancing="spray"),
    "sprayed rails": rails(server(4, 4), 6, servers_per_pod=2, spines=3, load_balancing="spray"),
    "sprayed racks": racks(server(2, 2), racks=3, trays=2, spines=2, load_balancing="spray"),
    "fat tree of planes": fat_tree(server(2, 2), 6, 2, 2, planes=2),
    "rails of planes with spare cards": rails(server(2, 4), 4, servers_per_pod=2, spines=2, planes=3),
    "planes of shared cards": fat_tree(server(4, 2), 4, 2, 2, planes=2),
    "sprayed planes": rails(server(2, 2), 6, servers_per_pod=3, spines=2, planes=4, load_balancing="spray"),
    "sprayed planes with spare cards": fat_tree(server(2, 4), 4, 2, 3, planes=2, load_balancing="spray"),
    "dragonfly": dragonfly(server(2, 2), groups=5, routers=4, global_links=1),
    "dragonfly with several links per pair": dragonfly(server(1, 1), 4, 3, 4, servers_per_router=2),
    "dragonfly by Valiant": dragonfly(server(2, 2), groups=5, routers=4, global_links=2, routing="valiant"),
    "dragonfly of one group": dragonfly(server(2, 2), groups=1, routers=3, global_links=1, routing="valiant"),
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
        groups = {graph.nodes[a]["group"], graph.nodes[b]["group"]} - {-1}
        kinds = f"{graph.nodes[a]['kind']}-{graph.nodes[b]['kind']}"
        assert links.tier[number] == ("group-group" if len(groups) == 2 else kinds)
    assert (links.cables > 0).all()
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
    assert sum(found["vertices"].values()) == sum(n for _, n in topology.graph.nodes(data="parts"))
    assert sum(found["links"].values()) == topology.links.cables.sum()
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
    # Card c belongs to GPU c * 3 // 8: 0 0 0 1 1 1 2 2. A flow is striped over those of its GPU.
    topology = build(SPECS["rails with spare cards"])
    assert [cards_of(topology, f"gpu{g}") for g in range(3)] == [
        ["server0/nic0-2"],
        ["server0/nic3-5"],
        ["server0/nic6-7"],
    ]
    assert topology.rail[:3].tolist() == [0, 3, 6]
    # Two cards of 50 GB/s on two rails, each with a leaf per pod and a spine; 64 GB/s to each card.
    links = {(a, b): n for a, b, n in topology.graph.edges(data="link")}
    way = [("gpu2", "server0/nic6-7"), ("server0/nic6-7", "pod0/rail6-7/leaf")]
    way += [("pod0/rail6-7/leaf", "rail6-7/spine0")]
    found = [(topology.links.bandwidth[links[ends]], topology.links.cables[links[ends]]) for ends in way]
    assert found == [(128e9, 2), (100e9, 2), (100e9, 2)]


def test_what_is_drawn_as_one_is_counted_as_all_it_stands_for():
    one_by_one = rails(server(2, 4), 6, servers_per_pod=2, spines=3, planes=2)
    sprayed = one_by_one.model_copy(update={"load_balancing": "spray"})
    # 6 servers of 4 cards with 2 ports; a leaf per pod, card and plane; 3 spines per card and plane.
    for spec in (one_by_one, sprayed):
        found = summary(build(spec))
        assert found["vertices"] == {"gpu": 12, "nic": 24, "nvswitch": 6, "leaf": 24, "spine": 24}
        assert (found["links"]["nic-leaf"], found["links"]["leaf-spine"]) == (48, 72)
        assert found["bandwidth"]["nic-leaf"] == pytest.approx(24 * 50e9)
        assert found["bandwidth"]["leaf-spine"] == pytest.approx(72 * 50e9)
    assert len(build(sprayed).graph) < len(build(one_by_one).graph)


def test_oversubscription_makes_the_uplinks():
    # Two servers of 8 cards at 50 GB/s make 800 GB/s below a leaf; a fourth of it over 4 spines.
    topology = build(SPECS["oversubscribed fat tree"])
    assert topology.links.bandwidth[topology.graph["leaf0"]["spine0"]["link"]] == 50e9
    # Three cards of 50 GB/s below a leaf; a third of it is one uplink of the usual 50 GB/s.
    topology = build(SPECS["oversubscribed rails"])
    spines = [v for v in topology.graph["pod0/rail1/leaf"] if topology.graph.nodes[v]["kind"] == "spine"]
    assert spines == ["rail1/spine0"]
    assert topology.links.bandwidth[topology.graph["pod0/rail1/leaf"]["rail1/spine0"]["link"]] == 50e9
    # Nvl72: two trays below a leaf, so 100 GB/s; 2:1 leaves 50 GB/s, for two spines 25 GB/s each.
    topology = build(racks(server(2, 2), racks=2, trays=2, spines=2, oversubscription=2.0))
    assert topology.links.bandwidth[topology.graph["pod0/rail0/leaf"]["rail0/spine1"]["link"]] == 25e9


def test_uplinks_that_are_what_the_oversubscription_says_may_be_said_as_well():
    topology = build(fat_tree(server(), 6, 2, 12, oversubscription=1.33))
    assert topology.links.bandwidth[topology.graph["leaf0"]["spine11"]["link"]] == 50e9


def test_a_card_has_a_port_of_an_equal_part_in_each_plane():
    topology = build(SPECS["fat tree of planes"])
    ports = {v: e["link"] for v, e in topology.graph["server0/nic1"].items() if v != "gpu1"}
    assert set(ports) == {"plane0/leaf0", "plane1/leaf0"}
    assert [topology.links.bandwidth[n] for n in ports.values()] == [25e9, 25e9]
    assert set(topology.graph["plane1/leaf0"]) & set(topology.graph["plane0/leaf0"]) == {
        f"server{s}/nic{c}" for s in (0, 1) for c in (0, 1)
    }


def test_routers_of_a_group_and_groups_are_joined_each_to_each():
    topology = build(SPECS["dragonfly"])
    graph, links = topology.graph, topology.links
    local, far = set(), Counter()
    for a, b, n in graph.edges(data="link"):
        if links.tier[n] == "router-router":
            local.add((a, b))
        if links.tier[n] == "group-group":
            far[graph.nodes[a]["group"], graph.nodes[b]["group"]] += int(links.cables[n])
    names = [[f"group{g}/router{r}" for r in range(4)] for g in range(5)]
    assert local == {(a, b) for group in names for a in group for b in group if a != b}
    # Four routers with one global link each make one to each of the four other groups.
    assert far == {(a, b): 1 for a in range(5) for b in range(5) if a != b}


@pytest.mark.parametrize(
    "groups, routers, global_links", [(5, 4, 1), (4, 3, 4), (5, 4, 2), (2, 3, 1), (9, 8, 2)]
)
def test_a_router_has_no_more_global_links_than_it_may(groups: int, routers: int, global_links: int):
    topology = build(dragonfly(server(1, 1), groups, routers, global_links))
    links, held, pairs = topology.links, Counter(), Counter()
    group = topology.graph.nodes(data="group")
    for source, target, tier, cables in zip(
        links.source, links.target, links.tier, links.cables, strict=True
    ):
        if tier == "group-group":
            held[source] += int(cables)
            pairs[group[source], group[target]] += int(cables)
    assert set(held.values()) == {global_links}
    assert set(pairs.values()) == {routers * global_links // (groups - 1)}


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
    "groups that cannot be joined evenly": (
        dragonfly(server(), groups=6, routers=4, global_links=2),
        r"groups: 6: .* = 8 links .* among 5 others; 5 and 9 groups can",
    ),
    "uplinks and oversubscription at odds": (
        fat_tree(server(), 4, 2, 4, oversubscription=2.0),
        r"oversubscription: 2 contradicts the uplinks: .* give 4",
    ),
    "an oversubscription between two numbers of uplinks": (
        rails(server(), 10, servers_per_pod=5, oversubscription=2.0),
        r"oversubscription: 2 leaves 125 GB/s upwards .* 2.5 is",
    ),
    "an oversubscription of nothing": (
        rails(server(), 4, oversubscription=2.0),
        "oversubscription: all servers share their leaves",
    ),
    "a fat tree without spines": (fat_tree(server(), 4, 2, 0), "spines: missing key"),
    "a fat tree without a word on its uplinks": (
        fat_tree(server(), 4, 2, 2, uplink_bandwidth=None),
        "uplink_bandwidth: missing key",
    ),
    "an oversubscription alone": (
        fat_tree(server(), 4, 2, 0, uplink_bandwidth=None, oversubscription=2.0),
        "spines: missing key; oversubscription needs",
    ),
    "a slip of zeros in planes": (fat_tree(server(), 4, 2, 2, planes=1_000_000), "vertices are too many"),
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
