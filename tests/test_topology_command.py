"""`clustersim topology`: what it finds in a machine, what it prints and draws, and what it refuses."""

from __future__ import annotations

import io
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import numpy as np
import pytest
from pytest import approx
from rich.console import Console
from test_topology import SPECS, dragonfly, explicit, fat_tree, over_specs, racks, rails, server

from clustersim.cli import _status
from clustersim.plan.inspection import bisection, cut, tapers, ways, weak_points
from clustersim.plan.paths import Paths
from clustersim.plan.sketch import sketch
from clustersim.plan.topology import Topology, build, summary
from clustersim.report.topology import show_topology
from clustersim.report.topology_svg import topology_svg
from clustersim.spec.hardware import TopologySpec
from clustersim.study.topology import Machine, drawing, inspect

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "topologies").glob("*.toml"))
SVG = "{http://www.w3.org/2000/svg}"


# ---- bisection -----------------------------------------------------------------------------------


def max_flow(topology: Topology, half: np.ndarray) -> float:
    """The flow between two sets of GPUs on the whole graph, nothing shortened, bytes/s."""
    graph = nx.DiGraph()
    for a, b, bandwidth in zip(
        topology.links.source, topology.links.target, topology.links.bandwidth.tolist(), strict=True
    ):
        graph.add_edge(a, b, capacity=round(bandwidth))
    for gpu, here in zip(topology.gpus, half, strict=True):
        graph.add_edge(*(("from", gpu) if here else (gpu, "to")))
    return float(nx.maximum_flow_value(graph, "from", "to")) if half.any() and not half.all() else 0.0


@over_specs
def test_the_bisection_is_the_maximum_flow_between_the_halves(spec: TopologySpec) -> None:
    topology = build(spec)
    found = bisection(topology)
    half = np.arange(len(topology.gpus)) < found.first
    assert (found.first, found.first + found.second) == (len(half) // 2, len(half))
    assert found.forward == approx(max_flow(topology, half))
    assert found.back == approx(max_flow(topology, ~half))


@over_specs
def test_any_cut_is_the_maximum_flow_between_its_sides(spec: TopologySpec) -> None:
    topology = build(spec)
    rng = np.random.default_rng(5)
    for _ in range(3):
        half = rng.random(len(topology.gpus)) < rng.random()
        assert cut(topology, half) == approx(max_flow(topology, half))


def splits_no_domain(spec: TopologySpec) -> bool:
    """Whether the halves in rank order leave NVLink domains whole, as those of an odd number cannot."""
    domain = build(spec).domain
    return bool(domain[len(domain) // 2 - 1] != domain[len(domain) // 2])


EVEN = {n: spec for n, spec in SPECS.items() if spec.family != "explicit" and splits_no_domain(spec)}


def test_most_families_can_be_halved_between_domains() -> None:
    assert {spec.family for spec in EVEN.values()} >= {"fat_tree", "rail_fat_tree", "dragonfly"}


@pytest.mark.parametrize("spec", EVEN.values(), ids=EVEN.keys())
def test_no_halving_by_chance_is_narrower_than_the_bisection(spec: TopologySpec) -> None:
    topology = build(spec)
    least = bisection(topology).forward
    rng = np.random.default_rng(6)
    gpus = len(topology.gpus)
    for turn in range(12):
        if turn % 2:  # GPUs by chance
            half = rng.permutation(gpus) < gpus // 2
        else:  # servers by chance, as far as they are even in number
            servers = rng.permutation(len(set(topology.server.tolist())))
            order = np.argsort(servers[topology.server], kind="stable")
            half = np.zeros(gpus, dtype=np.bool_)
            half[order[: gpus // 2]] = True
        assert cut(topology, half) >= least * (1 - 1e-12)


@over_specs
def test_no_side_for_the_switches_cuts_less_than_the_bisection(spec: TopologySpec) -> None:
    # Whatever separates the halves must let the maximum flow through.
    topology = build(spec)
    found = bisection(topology)
    links = topology.links
    rng = np.random.default_rng(7)
    for _ in range(20):
        side = {name: bool(rng.integers(2)) for name in topology.graph}
        side |= {gpu: n < found.first for n, gpu in enumerate(topology.gpus)}
        crossing = sum(
            bandwidth
            for a, b, bandwidth in zip(links.source, links.target, links.bandwidth, strict=True)
            if side[a] and not side[b]
        )
        assert crossing >= found.forward * (1 - 1e-12)


def test_a_switch_that_nothing_leads_to_adds_nothing_to_a_cut() -> None:
    # From a to b: 1 GB/s each over x and y, which could pass on 3 GB/s; the ghost sends there, too.
    machine = explicit(
        {"a": "gpu", "b": "gpu", "x": "leaf", "y": "leaf", "ghost": "leaf"},
        *(("a", ">x"), ("a", ">y"), ("ghost", ">x"), ("ghost", ">y"), ("b", ">a")),
    )
    wide = explicit({"b": "gpu", "x": "leaf", "y": "leaf"}, ("x", ">b"), ("y", ">b"), bandwidth="3 GB/s")
    topology = build(machine.model_copy(update={"cables": machine.cables + wide.cables}))
    found = bisection(topology)
    assert (found.forward, found.back) == (2e9, 1e9)


BISECTIONS: dict[str, tuple[TopologySpec, float]] = {
    # Four GPUs on each side of the NVSwitch at 450 GB/s.
    "NVLink alone": (SPECS["single server"], 4 * 450e9),
    # Two servers of 8 cards at 50 GB/s on each side, leaves in common.
    "cards": (rails(server(), 4), 16 * 50e9),
    # Two leaves on each side with 4 uplinks of 50 GB/s.
    "uplinks": (fat_tree(server(), 8, 2, 4), 2 * 4 * 50e9),
    # 8 cards of 50 GB/s and 2 servers per leaf, 4:1; four leaves on each side.
    "oversubscribed": (
        fat_tree(server(), 16, 2, 4, uplink_bandwidth=None, oversubscription=4.0),
        4 * 16 * 50e9 / 4,
    ),
    # Three leaves: the middle one has a server on each side, and both use it as well as the spines.
    "a leaf in the middle": (fat_tree(server(), 6, 2, 4), 4 * 50e9 + 8 * 50e9),
    # 2 cards x 50 GB/s per GPU, 2 GPUs x 2 servers.
    "spare cards": (fat_tree(server(2, 4), 4, 4, 0), 4 * 100e9),
    # Two cards of 50 GB/s for four GPUs of each server.
    "shared cards": (fat_tree(server(4, 2), 4, 4, 0), 2 * 2 * 50e9),
    # Four groups, two on each side, so 2 x 2 pairs with 4 links of 25 GB/s.
    "groups": (dragonfly(server(8, 8), 4, 3, 4, servers_per_router=2, local_bandwidth="9 TB/s"), 16 * 25e9),
    # Two racks in one domain each: 2 trays of 2 cards.
    "racks": (racks(server(2, 2), racks=2, trays=2, spines=2, uplink_bandwidth="800 Gb/s"), 4 * 50e9),
    "planes": (rails(server(2, 2), 4, planes=4, servers_per_pod=2, spines=1, uplink_bandwidth="1 GB/s"), 8e9),
}


@pytest.mark.parametrize(("spec", "by_hand"), BISECTIONS.values(), ids=BISECTIONS.keys())
@pytest.mark.parametrize("how", ["ecmp", "spray"])
def test_bisections_by_hand(spec: TopologySpec, by_hand: float, how: str) -> None:
    if how == "spray" and not hasattr(spec, "load_balancing"):
        pytest.skip("nothing to spray over")
    spec = spec.model_copy(update={"load_balancing": how}) if hasattr(spec, "load_balancing") else spec
    assert bisection(build(spec)).forward == approx(by_hand)


# ---- oversubscription, paths, weak points --------------------------------------------------------


def tapers_by_name(spec: TopologySpec) -> dict[str, tuple[int, float]]:
    return {taper.at: (taper.count, taper.ratio) for taper in tapers(build(spec))}


@pytest.mark.parametrize("how", ["ecmp", "spray"])
@pytest.mark.parametrize("over", [0.5, 1.0, 2.5, 8.0])
def test_the_oversubscription_found_is_the_one_asked_for(how: str, over: float) -> None:
    for spec in (
        fat_tree(server(), 6, 2, 4, uplink_bandwidth=None, oversubscription=over, load_balancing=how),
        rails(
            server(2, 4), 6, servers_per_pod=2, spines=2, planes=2, oversubscription=over, load_balancing=how
        ),
        racks(server(2, 2), racks=3, trays=2, spines=2, oversubscription=over, load_balancing=how),
    ):
        assert tapers_by_name(spec)["leaf"][1] == approx(over)


def test_tapers_by_hand() -> None:
    # 8 x 450 GB/s of NVLink over 8 x 50 GB/s of cards; two servers over four uplinks of 50 GB/s.
    assert tapers_by_name(SPECS["fat tree"]) == {"domain": (8, approx(9.0)), "leaf": (4, approx(4.0))}
    # 3 routers of 2 servers with 1 card of 50 GB/s: 100 over 2 x 12.5; 300 over 12 x 25 GB/s.
    assert tapers_by_name(SPECS["dragonfly with several links per pair"]) == {
        "domain": (24, approx(9.0)),
        "router": (12, approx(4.0)),
        "group": (4, approx(1.0)),
    }
    assert tapers_by_name(SPECS["single server"]) == {}


@over_specs
def test_ways_are_the_paths_there_are(spec: TopologySpec) -> None:
    topology = build(spec)
    gpus = np.arange(len(topology.gpus))
    source, target = (ends.ravel() for ends in np.meshgrid(gpus, gpus))
    apart = source != target
    table = Paths(topology).between(source[apart], target[apart])
    found = ways(topology, Paths(topology))
    if len(gpus) == 1:
        assert found == []
        return
    assert sum(way.share for way in found) == approx(1)
    assert max(way.links for way in found) == (table.links >= 0).sum(axis=1).max()
    assert min(way.latency[0] for way in found) == table.latency.min()
    assert max(way.latency[1] for way in found) == table.latency.max()
    assert sum(way.share for way in found if way.relation == "same domain") == approx(
        float((topology.domain[source] == topology.domain[target])[apart].mean())
    )
    for way in found:
        assert len(way.kinds) == way.links + 1 and way.kinds[0] == way.kinds[-1] == "gpu"


def test_ways_on_rails_by_hand() -> None:
    topology = build(SPECS["rails of three pods"])
    # 1 us NVLink, 4 us to a card of the pod, 2.315 us more for a spine; 50 GB/s cards and spines.
    assert [
        (way.relation, way.links, way.latency[0], way.bandwidth) for way in ways(topology, Paths(topology))
    ] == [
        ("same domain", 2, approx(1e-6), 450e9),
        ("same rail", 4, approx(4e-6), 50e9),
        ("other", 6, approx(5e-6), 50e9),
        ("same rail", 6, approx(6.315e-6), 50e9),
        ("other", 8, approx(7.315e-6), 50e9),
    ]


def test_a_large_machine_is_seen_from_a_sample_as_from_everywhere() -> None:
    topology = build(fat_tree(server(), 24, 4, 4))
    found = ways(topology, Paths(topology))
    assert [way.links for way in found] == [2, 4, 6]
    # 7, 24 and 160 of the 191 others.
    assert [way.share for way in found] == approx([7 / 191, 24 / 191, 160 / 191])


def separates(topology: Topology, vertex: str) -> bool:
    """Whether GPUs other than the vertex lose each other without it."""
    graph = topology.graph.to_undirected()
    graph = nx.Graph(graph)
    graph.remove_node(vertex)
    parts = [part for part in nx.connected_components(graph) if part & set(topology.gpus)]
    return len(parts) > 1


@over_specs
def test_single_points_of_failure_are_those_whose_removal_parts_gpus(spec: TopologySpec) -> None:
    topology = build(spec)
    vertices = topology.graph.nodes
    expected: dict[str, int] = {}
    for name in topology.graph:
        single = vertices[name]["kind"] != "gpu" and vertices[name]["parts"] == 1
        if single and separates(topology, name):
            expected[vertices[name]["kind"]] = expected.get(vertices[name]["kind"], 0) + 1
    assert weak_points(topology).cutting == expected


def test_what_hangs_on_without_gpus_does_not_make_a_single_point_of_failure() -> None:
    # Leaf l carries a spine and a ring of three switches, none of which leads to a GPU.
    topology = build(
        explicit(
            {"a": "gpu", "b": "gpu", "nv": "nvswitch", "l": "leaf", "s": "spine"}
            | {"x": "leaf", "y": "leaf", "z": "leaf"},
            *(("a", "nv"), ("b", "nv"), ("a", "l"), ("b", "l"), ("l", "s")),
            *(("l", "x"), ("x", "y"), ("y", "z"), ("z", "x")),
        )
    )
    assert weak_points(topology).cutting == {}


def test_one_sided_links_and_isolated_vertices_are_named() -> None:
    topology = build(
        explicit({"a": "gpu", "b": "gpu", "alone": "leaf"}, ("a", ">b"), ("b", ">a")),
    )
    assert weak_points(topology).isolated == ("alone",)
    assert weak_points(topology).one_sided == ()
    ring = build(SPECS["a one-way ring"])
    assert weak_points(ring).one_sided == ("a->b", "b->c", "c->a")


# ---- drawings ------------------------------------------------------------------------------------

LARGE = {
    "128 servers": fat_tree(server(), 128, 4, 32),
    "sprayed rails of 32": rails(server(), 32, servers_per_pod=8, spines=4, load_balancing="spray"),
    "racks": racks(server(4, 4), racks=8, trays=18, spines=18),
    "groups": dragonfly(server(), 9, 8, 2),
    "an irregular one": explicit(
        {f"g{n}": "gpu" for n in range(150)} | {f"l{n}": "leaf" for n in range(30)},
        *((f"g{n}", f"l{n * n % 30}") for n in range(150)),
        *((f"l{a}", f"l{b}") for a, b in combinations(range(30), 2)),
    ),
}
DRAWN = SPECS | LARGE
over_drawn = pytest.mark.parametrize("spec", DRAWN.values(), ids=DRAWN.keys())


@over_drawn
def test_a_sketch_holds_every_part_and_every_link_between_boxes(spec: TopologySpec) -> None:
    topology = build(spec)
    found = sketch(topology)
    parts: dict[str, int] = {}
    for node in found.nodes:
        for kind, number in node.parts.items():
            parts[kind] = parts.get(kind, 0) + number * node.count
    assert parts == summary(topology)["vertices"]
    # What is not drawn lies within servers that are drawn as boxes.
    hidden = ("gpu-nvswitch", "nvswitch-gpu", "gpu-nic", "nic-gpu") if found.detail != "parts" else ()
    drawn = {bundle.tier for bundle in found.bundles}
    for tier, number in summary(topology)["links"].items():
        if tier in drawn or tier not in hidden:
            assert sum(b.cables for b in found.bundles if b.tier == tier) == number
            total = summary(topology)["bandwidth"][tier]
            assert sum(b.bandwidth for b in found.bundles if b.tier == tier) == approx(total)


def test_small_machines_are_drawn_part_by_part_and_large_ones_by_kind() -> None:
    assert sketch(build(SPECS["fat tree of planes"])).detail == "parts"
    assert sketch(build(fat_tree(server(), 12, 4, 4))).detail == "servers"
    found = sketch(build(LARGE["128 servers"]))
    assert found.detail == "kinds"
    assert {node.kind: node.count for node in found.nodes} == {"server": 128, "leaf": 32, "spine": 32}


def drawn(spec: TopologySpec, shown: str = "machine.toml") -> ElementTree.Element:
    machine = Machine(shown, spec, build(spec))
    return ElementTree.fromstring(topology_svg(inspect(machine), drawing(machine)))


def rectangles(element: ElementTree.Element) -> list[tuple[float, float, float, float]]:
    """Left, top, right, lower edge of the foremost rectangle of every box."""
    found = []
    for group in element.iter(f"{SVG}g"):
        *_, last = group.findall(f"{SVG}rect")
        x, y, w, h = (float(last.get(key, "")) for key in ("x", "y", "width", "height"))
        found.append((x, y, x + w, y + h))
    return found


@over_drawn
def test_a_drawing_can_be_read_by_people_and_screen_readers(spec: TopologySpec) -> None:
    svg = drawn(spec)
    _, _, width, height = map(float, svg.get("viewBox", "").split())
    assert svg.get("role") == "img"
    labels = {element.get("id"): element.text for element in svg if element.get("id")}
    assert all(labels[label] for label in svg.get("aria-labelledby", "").split())
    for element in (*svg.iter(f"{SVG}g"), *svg.iter(f"{SVG}path")):
        title = element.find(f"{SVG}title")
        assert title is not None and title.text
    boxes = rectangles(svg)
    assert all(min(box) >= 0 and box[2] <= width and box[3] <= height for box in boxes)
    for (ax, ay, ar, al), (bx, by, br, bl) in combinations(boxes, 2):
        apart = ar <= bx or br <= ax or al <= by or bl <= ay
        inside = (ax <= bx and br <= ar and ay <= by and bl <= al) or (bx <= ax and ar <= br)
        assert apart or inside
    for text in svg.iter(f"{SVG}text"):
        # A letter is about 0.6 of the font's size; texts in the middle reach half their length either way.
        length = len(text.text or "") * 0.6 * float(text.get("font-size", "12"))
        x = float(text.get("x", "")) - (length / 2 if text.get("text-anchor") == "middle" else 0)
        assert x >= 0 and x + length <= width + 30
        assert 0 < float(text.get("y", "")) <= height


def test_a_drawing_of_parts_names_them_all_once() -> None:
    spec = SPECS["fat tree of planes"]
    titles = [title.text or "" for title in drawn(spec).iter(f"{SVG}title")]
    for name in build(spec).graph:
        assert sum(title.startswith(f"{name}: ") for title in titles) == 1
    # One line per cable, whichever way it is looked at.
    assert sum(" - " in title for title in titles) == len(build(spec).links.source) / 2


def test_a_drawing_by_kind_counts() -> None:
    texts = [text.text for text in drawn(LARGE["sprayed rails of 32"]).iter(f"{SVG}text")]
    assert {"32 servers", "8 GPUs each", "32 leaves", "32 spines", "128 x 50 GB/s"} <= set(texts)
    texts = [text.text for text in drawn(LARGE["groups"]).iter(f"{SVG}text")]
    # 9 groups of 8 x 7 / 2 local links, and 8 x 2 global ones per group.
    assert {"within groups 252 x 12.5 GB/s", "between groups 72 x 25 GB/s"} <= set(texts)


def test_names_are_escaped() -> None:
    spec = SPECS["single server"]
    wild = spec.server.gpu.model_copy(update={"name": '<b>&"\x1b[31m'})
    spec = spec.model_copy(update={"server": spec.server.model_copy(update={"gpu": wild})})
    svg = drawn(spec, "<script>&.toml")
    texts = [text.text or "" for text in svg.iter(f"{SVG}text")]
    assert texts[0] == "<script>&.toml"
    assert '8 x <b>&"\\x1b[31m' in texts[1]


# ---- the command ---------------------------------------------------------------------------------


class Call:
    """The command line in an empty folder."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        status = _status(["topology", *map(str, arguments)])
        out, err = self._capsys.readouterr()
        return status, out, err


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.chdir(tmp_path)
    return Call(capsys)


@over_specs
def test_a_page_of_any_machine_says_how_it_is_cut_and_what_was_checked(spec: TopologySpec) -> None:
    console = Console(file=io.StringIO(), width=100, highlight=False)
    show_topology(inspect(Machine("it.toml", spec, build(spec))), console)
    page = console.file.getvalue()  # type: ignore[attr-defined]
    assert page.startswith("it.toml\n") and f"family {spec.family}" in page
    assert "per GPU: the maximum flow" in " ".join(page.split()) and "connected: every GPU" in page


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_topology_can_be_shown_and_drawn(call: Call, path: Path) -> None:
    status, out, err = call(path, "--svg", "it.svg")
    assert (status, err) == (0, "")
    assert "Bisection" in out and "Checks" in out and "wrong" not in out
    ElementTree.parse("it.svg")


def test_json_holds_what_the_page_says(call: Call) -> None:
    status, out, err = call(ROOT / "topologies/fat_tree_4_to_1.toml", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    # 32 servers x 8 GPUs; half of 8 leaves with 8 uplinks of 50 GB/s.
    assert (found["gpus"], found["servers"], found["domains"]) == (256, 32, 32)
    assert found["bisection"]["bandwidth"] == 4 * 8 * 50e9
    assert found["bisection"]["per_gpu"] == 4 * 8 * 50e9 / 128
    assert [(o["at"], o["ratio"]) for o in found["oversubscription"]] == [("domain", 9.0), ("leaf", 4.0)]
    assert found["longest_path"]["links"] == 6
    assert found["tiers"]["leaf-spine"]["links"] == 64
    assert all(check["good"] is not False for check in found["checks"])


def test_a_scenario_stands_for_its_machine(call: Call) -> None:
    of_scenario = json.loads(call(ROOT / "workloads/moe_1024.toml", "--json")[1])
    of_topology = json.loads(call(ROOT / "topologies/dgx_h100_128.toml", "--json")[1])
    assert of_scenario.pop("file") != of_topology.pop("file")
    assert of_scenario == of_topology


def test_the_page_fits_its_lines_and_has_the_numbers(call: Call) -> None:
    _, out, _ = call(ROOT / "topologies/two_dgx_h100.toml")
    assert re.search(r"gpu-nvswitch +16 +450 GB/s +7.2 TB/s +300 ns", out)
    assert re.search(
        r"other +46.7% +6 +3.28 us +50 GB/s +GPU > NVSwitch > GPU > card > leaf > card > GPU", out
    )
    assert "400 GB/s from gpu0..gpu7 to gpu8..gpu15" in out


def test_a_key_can_be_overridden(call: Call) -> None:
    machine = ROOT / "topologies/fat_tree_4_to_1.toml"
    assert (
        json.loads(call(machine, "--set", "oversubscription=2", "--json")[1])["tiers"]["leaf-spine"]["links"]
        == 128
    )
    scenario = ROOT / "workloads/moe_1024.toml"
    found = json.loads(call(scenario, "--set", "topology.load_balancing=spray", "--json")[1])
    assert found["load_balancing"] == "spray"


def test_an_asymmetric_machine_is_told_of(call: Call) -> None:
    Path("ring.toml").write_text(
        'family = "explicit"\ngpu = "h100_sxm"\n'
        'vertices = [{ name = "a", kind = "gpu" }, { name = "b", kind = "gpu" },'
        ' { name = "alone", kind = "leaf" }]\n'
        'cables = [{ ends = ["a", "b"], bandwidth = "2 GB/s", latency = "1 us", one_way = true },'
        ' { ends = ["b", "a"], bandwidth = "1 GB/s", latency = "1 us", one_way = true }]\n'
    )
    status, out, _ = call("ring.toml")
    assert status == 0
    assert "there 2 GB/s, back 1 GB/s" in out
    assert re.search(r"wrong +duplex: 2 links .*: a->b, b->a", out)
    assert re.search(r"wrong +isolated: 1 vertices have no link: alone", out)


REFUSED = {
    "a wrong key": ('family = "fat_tree"\nspine = 2\n', "it.toml:2: spine: unknown key (did you mean"),
    "an impossible number": (
        'family = "rail_fat_tree"\nserver = "dgx_h100"\nservers = 0\n',
        "it.toml:3: servers: 0 is too small",
    ),
    "no bandwidth": (
        'family = "single_server"\nserver = { from = "dgx_h100", nvlink_bandwidth = "0 GB/s" }\n',
        "it.toml:2: server.nvlink_bandwidth: must be more than zero",
    ),
    "an unreachable GPU": (
        'family = "explicit"\ngpu = "h100_sxm"\ncables = []\n'
        'vertices = [{ name = "a", kind = "gpu" }, { name = "b", kind = "gpu" }]\n',
        'it.toml: topology: no links lead from GPU "a" to "b"',
    ),
    "an unknown server": (
        'family = "single_server"\nserver = "dgx_h10"\n',
        'it.toml:2: server: "dgx_h10" is not in the catalogue (did you mean "dgx_h100"?)',
    ),
    "a scenario without a machine": (
        'name = "x"\nmodel = "mixtral_8x7b"\n',
        "it.toml: topology: missing key",
    ),
    "not TOML": ("family = \n", "it.toml:1: is not valid TOML"),
    "nothing": ("", "it.toml: its family is missing"),
    "too much": (
        'family = "fat_tree"\nserver = "dgx_h100"\nservers = 8\nservers_per_leaf = 4\nspines = 10000000\n'
        'uplink_bandwidth = "400 Gb/s"\n',
        "vertices are too many",
    ),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_file_is_refused_and_nothing_is_written(call: Call, text: str, message: str) -> None:
    Path("it.toml").write_text(text)
    status, out, err = call("it.toml", "--svg", "it.svg")
    assert (status, out) == (2, "")
    assert message in err
    assert [path.name for path in Path().iterdir()] == ["it.toml"]


def test_a_file_that_is_not_there_is_named(call: Call) -> None:
    assert call("nowhere.toml") == (2, "", "nowhere.toml: there is no such file\n")


def test_a_wrong_option_says_where_it_came_from(call: Call) -> None:
    status, _, err = call(ROOT / "topologies/nvl72.toml", "--set", "rackz=2")
    assert status == 2
    assert 'topology.rackz: unknown key (did you mean "racks"?) (from --set)' in err


def test_a_drawing_lands_only_where_it_may(call: Call) -> None:
    machine = ROOT / "topologies/nvl72.toml"
    status, out, err = call(machine, "--svg", "machine.toml")
    assert (status, out) == (2, "") and "machine.toml: is not the name of a drawing" in err
    status, out, err = call(machine, "--svg", "no/such/folder/it.svg")
    assert (status, out) == (2, "") and "no/such/folder/it.svg: cannot be written: No such file" in err
    assert list(Path().iterdir()) == []
    Path("it.svg").write_text("old")
    assert call(machine, "--svg", "it.svg")[0] == 0
    assert Path("it.svg").read_text().startswith("<svg")


def test_the_same_machine_is_shown_and_drawn_the_same_way_again(call: Call) -> None:
    machine = ROOT / "topologies/dragonfly.toml"
    pages = []
    for _ in range(2):
        _, out, _ = call(machine, "--svg", "it.svg")
        pages.append((out, Path("it.svg").read_text()))
    assert pages[0] == pages[1]


def test_every_value_of_the_page_is_json(call: Call) -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(child) for key, child in value.items())
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or type(value) in (str, int, float, bool)

    spec = SPECS["dragonfly by Valiant"]
    assert plain(inspect(Machine("it", spec, build(spec))))
