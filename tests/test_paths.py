"""Paths of flows: laws over every family, the rail rule and ECMP, and ways one can follow by hand."""

from __future__ import annotations

import re
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
from pytest import approx
from test_topology import GPU, SPECS, dragonfly, explicit, fat_tree, over_specs, racks, rails, server

from clustersim.plan.paths import Paths, PathTable
from clustersim.plan.topology import FAMILIES, Topology, build
from clustersim.spec.hardware import Cable, TopologySpec, Vertex, VertexByVertex


def all_pairs(topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    return np.divmod(np.arange(len(topology.gpus) ** 2), len(topology.gpus))


def travelled(topology: Topology, table: PathTable, row: int = 0) -> list[str]:
    """The vertices a flow passes, both ends included; joined links are part of the claim."""
    links = [link for link in table.links[row].tolist() if link >= 0]
    for before, after in pairwise(links):
        assert topology.links.target[before] == topology.links.source[after]
    return [topology.links.source[link] for link in links[:1]] + [
        topology.links.target[link] for link in links
    ]


def way(topology: Topology, source: int, target: int) -> list[str]:
    return travelled(topology, Paths(topology).between(np.array([source]), np.array([target])))


def kinds(topology: Topology, vertices: list[str]) -> list[str]:
    return [topology.graph.nodes[vertex]["kind"] for vertex in vertices]


@over_specs
def test_paths_lead_from_end_to_end_and_pass_no_vertex_twice(spec: TopologySpec):
    topology = build(spec)
    source, target = all_pairs(topology)
    table = Paths(topology).between(source, target)
    for row, (s, t) in enumerate(zip(source, target, strict=True)):
        vertices = travelled(topology, table, row)
        if s == t:
            assert vertices == []
        else:
            assert (vertices[0], vertices[-1]) == (topology.gpus[s], topology.gpus[t])
            assert len(set(vertices)) == len(vertices)


@over_specs
def test_padding_stands_at_the_end_and_nowhere_else(spec: TopologySpec):
    topology = build(spec)
    table = Paths(topology).between(*all_pairs(topology))
    there = table.links >= 0
    assert (there[:, :-1] | ~there[:, 1:]).all()
    assert (table.links[~there] == -1).all()
    assert table.links.shape[1] == 0 or there[:, -1].any()
    assert (table.links.dtype, table.latency.dtype) == (np.int32, np.float64)


@over_specs
def test_latency_is_the_sum_over_the_links(spec: TopologySpec):
    topology = build(spec)
    table = Paths(topology).between(*all_pairs(topology))
    for links, latency in zip(table.links, table.latency, strict=True):
        assert latency == approx(topology.links.latency[links[links >= 0]].sum())


@over_specs
def test_paths_do_not_depend_on_what_else_was_asked(spec: TopologySpec):
    topology = build(spec)
    source, target = all_pairs(topology)
    together = Paths(topology).between(source, target)
    order = np.random.default_rng(0).permutation(source.size)
    in_parts = Paths(topology)
    for part in np.array_split(order, 7):
        in_parts.between(source[part], target[part])
        table = in_parts.between(source[part], target[part])
        width = table.links.shape[1]
        assert (table.links == together.links[part, :width]).all()
        assert (together.links[part, width:] == -1).all()
        assert (table.latency == together.latency[part]).all()


@over_specs
def test_what_is_remembered_is_what_would_be_found(spec: TopologySpec):
    topology = build(spec)
    source, target = all_pairs(topology)
    warm = Paths(topology)
    warm.between(source, target)
    for row in range(0, source.size, max(1, source.size // 20)):
        pair = source[row : row + 1], target[row : row + 1]
        remembered, fresh = warm.between(*pair), Paths(topology).between(*pair)
        assert remembered.links.tolist() == fresh.links.tolist()
        assert remembered.latency.tolist() == fresh.latency.tolist()


@over_specs
def test_who_changes_a_table_does_not_change_what_is_remembered(spec: TopologySpec):
    topology = build(spec)
    paths = Paths(topology)
    table = paths.between(*all_pairs(topology))
    before = table.links.copy()
    table.links[:] = 0
    assert (paths.between(*all_pairs(topology)).links == before).all()


def shortest(topology: Topology, source: str, target: str) -> int:
    """Links on the shortest way without GPUs in between, or with them where there is no other."""
    others = set(topology.gpus) - {source, target}
    without = nx.subgraph_view(topology.graph, filter_node=lambda vertex: vertex not in others)
    if nx.has_path(without, source, target):
        return nx.shortest_path_length(without, source, target)
    return nx.shortest_path_length(topology.graph, source, target)


@pytest.mark.parametrize(
    "name", [n for n, spec in SPECS.items() if spec.family in ("single_server", "fat_tree", "explicit")]
)
def test_without_rails_no_way_is_shorter(name: str):
    topology = build(SPECS[name])
    source, target = all_pairs(topology)
    length = (Paths(topology).between(source, target).links >= 0).sum(axis=1)
    for s, t, links in zip(source, target, length, strict=True):
        assert links == shortest(topology, topology.gpus[s], topology.gpus[t])


railed = pytest.mark.parametrize(
    "name", [n for n, spec in SPECS.items() if spec.family in ("rail_fat_tree", "nvl72")]
)


@railed
def test_on_rails_a_flow_reaches_the_targets_rail_over_nvlink_alone(name: str):
    topology = build(SPECS[name])
    source, target = all_pairs(topology)
    table = Paths(topology).between(source, target)
    for row, (s, t) in enumerate(zip(source, target, strict=True)):
        if topology.domain[s] == topology.domain[t]:
            continue
        vertices = travelled(topology, table, row)
        start = 0 if topology.rail[s] == topology.rail[t] else 2
        relay = topology.gpus.index(vertices[start])
        assert topology.server[relay] == topology.server[s]
        assert topology.rail[relay] == topology.rail[t]
        inner = kinds(topology, vertices)[start + 1 : -1]
        assert inner in (["nic", "leaf", "nic"], ["nic", "leaf", "spine", "leaf", "nic"])


@railed
def test_on_rails_no_flow_within_a_pod_uses_a_spine(name: str):
    topology = build(SPECS[name])
    leaves_of_pod = {re.search(r"pod\d+", leaf)[0] for leaf in topology.graph if leaf.endswith("leaf")}
    gpus_per_pod = len(topology.gpus) // len(leaves_of_pod)
    source, target = all_pairs(topology)
    table = Paths(topology).between(source, target)
    for row, (s, t) in enumerate(zip(source, target, strict=True)):
        spines = kinds(topology, travelled(topology, table, row)).count("spine")
        assert spines == (s // gpus_per_pod != t // gpus_per_pod and topology.domain[s] != topology.domain[t])


@over_specs
def test_within_a_domain_no_flow_touches_a_card(spec: TopologySpec):
    topology = build(spec)
    source, target = all_pairs(topology)
    table = Paths(topology).between(source, target)
    for row in np.flatnonzero(topology.domain[source] == topology.domain[target]):
        assert {"nic", "leaf", "spine"}.isdisjoint(kinds(topology, travelled(topology, table, row)))


def test_flows_spread_over_spines_and_their_links():
    topology = build(fat_tree(server(), servers=32, servers_per_leaf=4, spines=8))
    source, target = all_pairs(topology)
    links = Paths(topology).between(source, target).links
    used = np.bincount(links[links >= 0], minlength=len(topology.links.tier))
    for tier in ("leaf-spine", "spine-leaf"):
        load = used[[t == tier for t in topology.links.tier]]
        # 8 leaves x 8 spines; ~ 7/8 * 65536 / 64 = 896 flows each, so 3 % are one standard deviation.
        assert load.sum() == source.size * 7 // 8
        assert load.max() < 1.2 * load.mean() and load.min() > 0.8 * load.mean()


def test_the_flows_of_one_gpu_and_those_to_one_gpu_spread_as_well():
    topology = build(fat_tree(server(), servers=128, servers_per_leaf=4, spines=4))
    everyone = np.arange(len(topology.gpus))
    for source, target in ((0 * everyone, everyone), (everyone, 0 * everyone)):
        links = Paths(topology).between(source, target).links
        spines = [
            topology.links.target[link]
            for link in links[links >= 0]
            if topology.links.tier[link] == "leaf-spine"
        ]
        load = np.array([spines.count(f"spine{n}") for n in range(4)])
        assert load.sum() == 992 and load.max() < 1.5 * load.mean() and load.min() > load.mean() / 1.5


def test_the_choice_of_a_plane_does_not_settle_the_choice_of_a_spine():
    topology = build(fat_tree(server(1, 1), servers=128, servers_per_leaf=1, spines=4, planes=2))
    table = Paths(topology).between(np.zeros(127, dtype=np.int64), np.arange(1, 128))
    ways = {travelled(topology, table, row)[3] for row in range(127)}
    assert ways == {f"plane{p}/spine{n}" for p in range(2) for n in range(4)}


def test_a_flow_uses_all_cards_of_its_gpu():
    # Two cards of 50 GB/s per GPU: the narrowest link of a flow's way is as wide as both together.
    for name in ("fat tree with spare cards", "rails of planes with spare cards"):
        topology = build(SPECS[name])
        table = Paths(topology).between(np.array([0]), np.array([len(topology.gpus) - 1]))
        on_card = [n for n in table.links[0] if topology.links.tier[n] in ("nic-leaf", "leaf-nic")]
        planes = topology.links.source[on_card[-1]].startswith("plane")
        assert topology.links.bandwidth[on_card] == approx(100e9 / (3 if planes else 1))


def test_relays_that_share_a_card_take_turns():
    shared = build(SPECS["rails with shared cards"])
    # GPUs 10 and 11 of server 1 share card 1, as do GPUs 2 and 3 of server 0.
    assert [way(shared, 0, target)[2] for target in (10, 11)] == ["gpu2", "gpu3"]


def test_equal_cards_of_two_servers_are_four_links_apart():
    topology = build(rails(server(), 2))
    assert way(topology, 0, 8) == ["gpu0", "server0/nic0", "pod0/rail0/leaf", "server1/nic0", "gpu8"]
    # Four links of a quarter each of the 4 us from GPU to GPU.
    assert Paths(topology).between(np.array([0]), np.array([8])).latency == approx([4e-6])


def test_another_card_position_is_reached_through_the_neighbour_on_its_rail():
    topology = build(rails(server(), 2))
    assert way(topology, 0, 9) == [
        *("gpu0", "server0/nvswitch", "gpu1"),
        *("server0/nic1", "pod0/rail1/leaf", "server1/nic1", "gpu9"),
    ]
    # 1 us over NVLink, then 4 us.
    assert Paths(topology).between(np.array([0]), np.array([9])).latency == approx([5e-6])


def test_a_tray_relays_for_itself_though_the_rack_shares_nvlink():
    topology = build(SPECS["NVLink racks"])
    # Rack 0: trays of GPUs 0-3 and 4-7. GPU 15 is in rack 1 on rail 3, so GPU 4 goes through GPU 7.
    assert way(topology, 4, 15) == [
        *("gpu4", "rack0/nvswitch", "gpu7", "server1/nic3", "pod0/rail3/leaf", "server3/nic3", "gpu15")
    ]
    assert way(topology, 0, 5) == ["gpu0", "rack0/nvswitch", "gpu5"]


def test_a_flow_between_leaves_pays_for_the_spine():
    topology = build(SPECS["fat tree"])
    path = way(topology, 0, 63)
    assert kinds(topology, path) == ["gpu", "nic", "leaf", "spine", "leaf", "nic", "gpu"]
    # 4 us through cards and one leaf, and 2.315 us from leaf to leaf.
    assert Paths(topology).between(np.array([0]), np.array([63])).latency == approx([6.315e-6])
    # Servers 0 and 1 share leaf 0; every GPU uses its own card, there being no rails.
    assert way(topology, 0, 9) == ["gpu0", "server0/nic0", "leaf0", "server1/nic1", "gpu9"]


def test_a_card_that_joins_two_leaves_may_be_passed():
    topology = build(SPECS["a card that joins two leaves"])
    assert way(topology, 0, 2) == ["a", "x", "l", "card", "r", "y", "b"]


def test_nvlink_goes_before_a_card_that_is_as_near():
    topology = build(SPECS["GPUs sharing a card and a switch"])
    assert way(topology, 0, 1) == ["a", "nv", "b"]
    assert way(topology, 0, 2) == ["a", "card", "leaf", "far", "c"]


def test_a_flow_passes_through_gpus_only_where_it_must():
    ring = build(SPECS["a ring of GPUs without switches"])
    assert way(ring, 0, 2) == ["a", "b", "c"]
    # Three links through GPU m, or four past it by the switches: the flow goes past it.
    topology = build(
        explicit(
            {"a": "gpu", "m": "gpu", "b": "gpu", "x": "leaf", "y": "leaf", "z": "leaf", "w": "leaf"},
            *(("a", "m"), ("m", "w"), ("w", "b"), ("a", "x"), ("x", "y"), ("y", "z"), ("z", "b")),
        )
    )
    assert way(topology, 0, 2) == ["a", "x", "y", "z", "b"]


def test_a_cable_between_two_gpus_is_taken():
    topology = build(
        explicit({"a": "gpu", "b": "gpu", "nv": "nvswitch"}, ("a", "b"), ("a", "nv"), ("nv", "b"))
    )
    assert way(topology, 0, 1) == ["a", "b"]


def test_one_way_cables_are_not_travelled_backwards():
    topology = build(SPECS["a one-way ring"])
    assert way(topology, 0, 2) == ["a", "b", "c"]
    assert way(topology, 2, 0) == ["c", "a"]


def test_asking_for_no_flow_gives_an_empty_table():
    topology = build(SPECS["fat tree"])
    nothing = np.array([], dtype=np.int64)
    table = Paths(topology).between(nothing, nothing)
    assert table.links.shape == (0, 0) and table.latency.shape == (0,)


def test_a_gpu_that_does_not_exist_is_a_broken_law():
    paths = Paths(build(SPECS["single server"]))
    for stranger in (-1, 8):
        with pytest.raises(AssertionError):
            paths.between(np.array([stranger]), np.array([0]))


def by_vertices(topology: Topology) -> VertexByVertex:
    """The same machine written down part by part."""
    graph, links = topology.graph, topology.links
    both = {n: graph.has_edge(b, a) for a, b, n in graph.edges(data="link")}
    once = [
        n
        for n, (a, b) in enumerate(zip(links.source, links.target, strict=True))
        if not both[n] or n < graph[b][a]["link"]
    ]
    return VertexByVertex(
        family="explicit",
        gpu=GPU,
        vertices=[
            Vertex(name=name, kind=vertex["kind"], server=max(0, vertex["server"]))
            for name, vertex in graph.nodes(data=True)
        ],
        cables=[
            Cable(
                ends=(links.source[n], links.target[n]),
                bandwidth=f"{links.bandwidth[n]!r} B/s".replace("np.float64(", "").replace(")", ""),
                latency=f"{float(links.latency[n])!r} s",
                one_way=not both[n],
            )
            for n in once
        ],
    )


@over_specs
def test_a_machine_written_vertex_by_vertex_has_paths_of_the_same_length(spec: TopologySpec):
    topology = build(spec)
    written = build(by_vertices(topology))
    source, target = all_pairs(topology)
    length, as_written = (
        (Paths(machine).between(source, target).links >= 0).sum(axis=1) for machine in (topology, written)
    )
    if topology.routing == "valiant" or "group-group" in topology.links.tier:
        # Written down, nobody knows of groups: two global links count no more than two local ones.
        assert (as_written <= length).all()
    else:
        assert (as_written == length).all()


def test_every_family_is_under_these_laws():
    assert {spec.family for spec in SPECS.values()} == set(FAMILIES)


@over_specs
def test_who_is_reached_can_answer(spec: TopologySpec):
    topology = build(spec)
    source, target = all_pairs(topology)
    there = Paths(topology).between(source, target)
    back = Paths(topology).between(target, source)
    apart = source != target
    assert ((there.links >= 0).sum(axis=1)[apart] > 0).all()
    assert ((back.links >= 0).sum(axis=1)[apart] > 0).all()


HASHED = {
    "planes": (fat_tree(server(4, 4), 24, 3, 4, planes=2), ("nic-leaf", "leaf-spine", "spine-leaf")),
    "rails": (rails(server(4, 4), 32, servers_per_pod=4, spines=4), ("leaf-spine", "spine-leaf")),
    "racks": (racks(server(4, 4), racks=8, trays=4, spines=4), ("leaf-spine", "spine-leaf")),
    "dragonfly": (dragonfly(server(2, 2), 5, 4, 4, servers_per_router=3), ("group-group",)),
}


@pytest.mark.parametrize(("spec", "tiers"), HASHED.values(), ids=HASHED.keys())
def test_equal_ways_are_taken_equally_often_within_chance(spec: TopologySpec, tiers: tuple[str, ...]):
    topology = build(spec)
    links = Paths(topology).between(*all_pairs(topology)).links
    used = np.bincount(links[links >= 0], minlength=len(topology.links.tier))
    for tier in tiers:
        mine = np.array([t == tier for t in topology.links.tier])
        load = used[mine] / topology.links.cables[mine]
        # Each flow takes a link or not, independently: the variance is at most the mean. Five deviations.
        assert np.abs(load - load.mean()).max() < 5 * np.sqrt(load.mean())


# ---- spraying ------------------------------------------------------------------------------------

SPRAYED = {
    "spines": fat_tree(server(2, 2), 6, 2, 3),
    "rails": rails(server(2, 2), 6, servers_per_pod=2, spines=3),
    "planes": fat_tree(server(2, 2), 4, 1, 2, planes=2),
    "rails of planes": rails(server(2, 2), 4, servers_per_pod=2, spines=2, planes=2),
}


@pytest.mark.parametrize("spec", SPRAYED.values(), ids=SPRAYED.keys())
def test_spraying_loads_links_as_a_split_over_all_equal_ways_would(spec: TopologySpec):
    one_by_one = build(spec)
    sprayed = build(spec.model_copy(update={"load_balancing": "spray"}))
    rng = np.random.default_rng(1)
    gpus = len(one_by_one.gpus)
    source, target = rng.integers(0, gpus, (2, 40))
    apart = one_by_one.domain[source] != one_by_one.domain[target]
    source, target, size = source[apart], target[apart], rng.random(40)[apart]
    split = np.zeros(len(one_by_one.links.source))
    hashed = Paths(one_by_one).between(source, target)
    for row, t in enumerate(target):
        vertices = travelled(one_by_one, hashed, row)
        relay = max(n for n, v in enumerate(vertices[:-1]) if v in one_by_one.gpus)
        for a, b in pairwise(vertices[: relay + 1]):
            split[one_by_one.graph[a][b]["link"]] += size[row]
        others = set(one_by_one.gpus) - {vertices[relay], one_by_one.gpus[t]}
        graph = nx.subgraph_view(one_by_one.graph, filter_node=lambda v, others=others: v not in others)
        equal = list(nx.all_shortest_paths(graph, vertices[relay], one_by_one.gpus[t]))
        for a, b in (step for one in equal for step in pairwise(one)):
            split[one_by_one.graph[a][b]["link"]] += size[row] / len(equal)
    pooled = np.zeros(len(sprayed.links.source))
    for row, links in enumerate(Paths(sprayed).between(source, target).links):
        pooled[links[links >= 0]] += size[row]
    assert sorted(set(sprayed.links.tier)) == sorted(set(one_by_one.links.tier))
    for tier in set(sprayed.links.tier):
        # Every physical link of a pool carries an equal part of it.
        mine = np.array([t == tier for t in sprayed.links.tier])
        spread = np.repeat((pooled / sprayed.links.cables)[mine], sprayed.links.cables[mine])
        theirs = split[[t == tier for t in one_by_one.links.tier]]
        assert np.sort(spread) == approx(np.sort(theirs))


def test_with_spraying_no_equal_uplink_is_hotter_than_another():
    spec = fat_tree(server(), 16, 2, 8)
    source = np.arange(128)
    target = np.random.default_rng(3).permutation(128)
    hottest = {}
    for how in ("ecmp", "spray"):
        topology = build(spec.model_copy(update={"load_balancing": how}))
        links = Paths(topology).between(source, target).links
        load = np.bincount(links[links >= 0], minlength=len(topology.links.source)) / topology.links.cables
        up = np.array([tier == "leaf-spine" for tier in topology.links.tier])
        leaf = np.array(topology.links.source)[up]
        hottest[how] = max(load[up][leaf == name].max() / load[up][leaf == name].mean() for name in set(leaf))
    assert hottest["spray"] == 1.0
    # 16 flows of a leaf thrown at 8 uplinks: some uplink gets at least twice its part, as ECMP's do.
    assert hottest["ecmp"] >= 2.0


# ---- dragonflies ---------------------------------------------------------------------------------


def groups_of(topology: Topology, vertices: list[str]) -> list[int]:
    """Groups of routers that a flow passes, in order, each once for every time it is entered."""
    passed = [
        topology.graph.nodes[v]["group"] for v in vertices if topology.graph.nodes[v]["kind"] == "router"
    ]
    return [group for n, group in enumerate(passed) if n == 0 or passed[n - 1] != group]


@pytest.mark.parametrize("name", [n for n, spec in SPECS.items() if spec.family == "dragonfly"])
def test_a_minimal_way_has_one_global_link_and_a_valiant_one_two(name: str):
    topology = build(SPECS[name])
    source, target = all_pairs(topology)
    table = Paths(topology).between(source, target)
    thirds = set()
    for row, (s, t) in enumerate(zip(source, target, strict=True)):
        vertices = travelled(topology, table, row)
        passed = groups_of(topology, vertices)
        assert len(passed) == len(set(passed))
        routers = kinds(topology, vertices).count("router")
        if topology.domain[s] == topology.domain[t]:
            assert passed == []
        elif len(passed) == 1:
            assert routers <= 2
        else:
            assert len(passed) == (3 if topology.routing == "valiant" else 2)
            assert routers <= (6 if topology.routing == "valiant" else 4)
            thirds.add(tuple(passed))
    if topology.routing == "valiant" and len({g for way in thirds for g in way}) > 2:
        groups = range(5)
        assert thirds == {(a, b, c) for a in groups for b in groups for c in groups if len({a, b, c}) == 3}


def test_valiant_routing_spreads_what_minimal_routing_crams_into_one_link():
    # Everybody of group g sends to group g + 1: the worst case for minimal routing.
    loads = {}
    for routing in ("minimal", "valiant"):
        spec = dragonfly(
            server(1, 1), groups=9, routers=8, global_links=1, servers_per_router=4, routing=routing
        )
        topology = build(spec)
        source = np.arange(9 * 32)
        links = Paths(topology).between(source, (source + 32) % source.size).links
        used = np.bincount(links[links >= 0], minlength=len(topology.links.tier))
        loads[routing] = used[[tier == "group-group" for tier in topology.links.tier]]
    # 32 flows over the one link there is, and over the seven ways round it.
    assert loads["minimal"].max() == 32 and loads["minimal"].sum() == 288
    assert loads["valiant"].max() < 20 and loads["valiant"].sum() == 2 * 288


def test_a_flow_between_groups_pays_for_local_and_global_links():
    topology = build(dragonfly(server(1, 1), groups=3, routers=2, global_links=1))
    latency = Paths(topology).between(np.zeros(5, dtype=np.int64), np.arange(1, 6)).latency
    # 4 us through one router, 0.4 us more for a local link, 0.5 us for the global one. Router 0 of group
    # 0 leads to group 1, where router 1 receives; router 1 leads to group 2, where router 0 receives.
    assert latency == approx([4.4e-6, 4.9e-6, 4.5e-6, 4.9e-6, 5.3e-6])
