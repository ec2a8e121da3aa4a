"""Links that are slow, down or flap: their plans, the ways around them, and that no byte is lost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Hashable, Iterator
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import simpy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pytest import approx
from scenarios import fat_tree, parallel, rail_tree, same_tables, single_server, table, tiny, trace_of

from clustersim.analysis.summary import summarize
from clustersim.cli import _status
from clustersim.engine import simulation
from clustersim.engine.fabric import Fabric, Meeting
from clustersim.engine.faults import Pace, capacities, link_faults, paces, switches
from clustersim.engine.link import Capacities, link_process
from clustersim.engine.outages import Outages
from clustersim.errors import ClustersimError, ScenarioError, StuckError
from clustersim.physics.exchanges import RoutedExchange, RoutedRound, Routes
from clustersim.physics.fidelity import NETWORKS, build
from clustersim.physics.network import Finished, Flows
from clustersim.plan.detours import Detours
from clustersim.plan.layout import lay_out
from clustersim.plan.rounds import PEER, UP
from clustersim.plan.stepgraph import Exchange
from clustersim.plan.topology import Topology
from clustersim.plan.topology import build as build_topology
from clustersim.spec.scenario import Scenario
from clustersim.spec.workload import Fault
from clustersim.study.run import load, run_scenario

WORKLOADS = Path(__file__).parent.parent / "workloads"


def fault(kind: str, **keys: Any) -> dict[str, Any]:
    """A fault as a scenario gives it; times in seconds."""
    times = {name: f"{keys.pop(name)!r} s" for name in ("start", "end", "period") if name in keys}
    return {"kind": kind, **keys, **times}


def changes(*faults: dict[str, Any], seed: int = 0, nominal: float = 100.0) -> Iterator[tuple[float, float]]:
    """How the bandwidth of one link changes that all these faults befall."""
    values = [Fault.model_validate({"link": "a->b"} | one) for one in faults]
    before = nominal
    for at, bandwidth in capacities(nominal, values, range(len(values)), seed):
        if bandwidth != before:
            yield at, bandwidth
        before = bandwidth


# ---- plans --------------------------------------------------------------------------------------


def test_a_link_goes_down_and_comes_back() -> None:
    assert list(changes(fault("down_link", start=1.0, end=3.0))) == [(1.0, 0.0), (3.0, 100.0)]
    assert list(changes(fault("down_link", start=1.0))) == [(1.0, 0.0)]


def test_a_link_flaps_down_for_its_share_of_every_period() -> None:
    plan = fault("flapping_link", start=1.0, end=3.5, period=1.0, duty=0.25)
    assert list(changes(plan)) == [
        (1.0, 0.0), (1.25, 100.0), (2.0, 0.0), (2.25, 100.0), (3.0, 0.0), (3.25, 100.0),
    ]  # fmt: skip
    slow = fault("flapping_link", start=1.0, end=2.25, period=1.0, factor=4.0)
    assert list(changes(slow)) == [(1.0, 25.0), (1.5, 100.0), (2.0, 25.0), (2.25, 100.0)]


def test_faults_of_one_link_multiply_and_what_happens_at_once_is_one_change() -> None:
    plans = [fault("slow_link", factor=2.0, start=1.0, end=4.0), fault("down_link", start=2.0, end=3.0)]
    assert list(changes(*plans)) == [(1.0, 50.0), (2.0, 0.0), (3.0, 50.0), (4.0, 100.0)]
    relay = [fault("down_link", start=1.0, end=2.0), fault("down_link", start=2.0, end=3.0)]
    assert list(changes(*relay)) == [(1.0, 0.0), (3.0, 100.0)]


def test_a_fault_that_slows_nothing_changes_nothing_even_if_it_never_ends() -> None:
    assert list(changes(fault("flapping_link", factor=1.0, period=1.0))) == []


def test_a_link_that_is_down_for_good_changes_no_more_whatever_else_befalls_it() -> None:
    plans = [fault("flapping_link", period=1.0), fault("down_link", start=2.25)]
    assert list(changes(*plans)) == [(0.0, 0.0), (0.5, 100.0), (1.0, 0.0), (1.5, 100.0), (2.0, 0.0)]


def test_random_spells_have_the_stated_means_and_their_own_stream() -> None:
    plan = fault("flapping_link", period=1.0, duty=0.25, timing="random", end=20_000.0)
    times = np.array(list(changes(plan, seed=3)))
    assert (np.diff(times[:, 0]) > 0).all()
    down, up = np.diff(times[:, 0])[::2], np.diff(times[:, 0])[1::2]
    # The mean of 20 000 exponential draws is off by 1/140 of itself, usually.
    assert down.mean() == approx(0.25, rel=0.04) and up.mean() == approx(0.75, rel=0.04)
    assert np.array_equal(times, np.array(list(changes(plan, seed=3))))
    assert not np.array_equal(times[:100], np.array(list(changes(plan, seed=4)))[:100])
    one = Fault.model_validate(plan | {"link": "a"})
    first, second = (list(itertools.islice(switches(one, position, 3), 9)) for position in (0, 1))
    assert first != second


# ---- slow GPUs ----------------------------------------------------------------------------------


def paces_of(*faults: dict[str, Any], gpus: int = 4, hottest: int = 2, seed: int = 0) -> list[Pace | None]:
    """How slow each of so many GPUs is under all these faults."""
    return paces([Fault.model_validate(one) for one in faults], gpus, hottest, seed)


def factors(pace: Pace | None, times: list[float]) -> list[float]:
    """What a GPU without faults does not have: its factors at some times."""
    assert pace is not None
    return [pace.at(time) for time in times]


def test_a_gpu_is_slow_between_start_and_end_and_others_are_not() -> None:
    none, slow, *others = paces_of(fault("slow_gpu", gpu=1, factor=3.0, start=1.0, end=2.0))
    assert none is None and others == [None, None]
    assert factors(slow, [0.0, 1.0, 1.99, 2.0, 9.0]) == [1.0, 3.0, 3.0, 1.0, 1.0]


def test_a_throttled_gpu_is_slow_for_its_share_of_every_period() -> None:
    hot = paces_of(fault("throttled_gpu", gpu="all", factor=2.0, period=1.0, duty=0.25, start=1.0, end=3.1))
    for pace in hot:
        assert factors(pace, [0.5, 1.0, 1.24, 1.25, 2.1, 2.5, 3.05, 3.2]) == [1, 2, 2, 1, 2, 1, 2, 1]


def test_what_befalls_a_gpu_at_once_multiplies_whatever_kind_it_is() -> None:
    plans = [
        fault("slow_gpu", gpu="hottest", factor=3.0, start=1.0),
        fault("throttled_gpu", gpu=2, factor=2.0, period=2.0),
        fault("slow_gpu", gpu="all", factor=1.5, end=1.5),
    ]
    found = paces_of(*plans, hottest=2)
    assert factors(found[2], [0.0, 0.9, 1.0, 1.5, 2.0]) == [3.0, 3.0, 4.5, 3.0, 6.0]
    assert factors(found[0], [0.0, 1.0, 1.5]) == [1.5, 1.5, 1.0]


def test_gpus_throttle_at_random_each_for_itself_and_as_often_as_stated() -> None:
    hot = fault("throttled_gpu", gpu="all", factor=2.0, period=1.0, duty=0.25, timing="random")
    times = np.arange(0.0, 20_000.0, 0.5).tolist()
    one, other = (np.array(factors(pace, times)) for pace in paces_of(hot, gpus=2, seed=5))
    # 20 000 periods; neighbouring samples hang together, so the mean is off by some 1/100.
    assert (one == 2.0).mean() == approx(0.25, rel=0.05) and (other == 2.0).mean() == approx(0.25, rel=0.05)
    assert np.corrcoef(one, other)[0, 1] == approx(0.0, abs=0.03)
    again = np.array(factors(paces_of(hot, gpus=4, seed=5)[0], times))
    assert np.array_equal(one, again), "a larger machine leaves a GPU's own spells as they are"


def test_the_speeds_of_gpus_spread_around_what_they_were_priced_at() -> None:
    narrow, wide = (
        np.array([factors(pace, [0.0])[0] for pace in paces_of(fault("spread_gpus", spread=s), gpus=2000)])
        for s in (0.05, 0.1)
    )
    assert narrow.mean() == approx(1.0, rel=1e-12) and wide.mean() == approx(1.0, rel=1e-12)
    # The standard deviation of 2000 draws is off by 1/63 of itself, usually.
    assert np.log(narrow).std() == approx(0.05, rel=0.06)
    assert np.allclose(np.log(wide) - np.log(wide).mean(), 2 * (np.log(narrow) - np.log(narrow).mean()))
    for_a_while = paces_of(fault("spread_gpus", spread=0.1, start=1.0, end=2.0))[0]
    before, within, after = factors(for_a_while, [0.5, 1.0, 2.0])
    assert before == after == 1.0 and within != 1.0


def test_no_step_beats_its_bounds_where_some_gpus_are_faster_than_priced() -> None:
    scenario = tiny(
        single_server(2, nvlink=1e15),
        deployment=parallel(dp=2),
        faults=[fault("spread_gpus", spread=0.5)],
        workload={"sequences": 512, "phase": "prefill"},
    )
    steps = table(trace_of(scenario), "steps")
    assert steps["end"] - steps["start"] >= np.maximum(steps["bound_compute"], steps["bound_memory"])


def test_the_hottest_gpu_is_the_one_whose_experts_are_most_popular() -> None:
    def slow(gpu: object) -> Scenario:
        return tiny(
            single_server(4),
            deployment=parallel(dp=4, experts={"policy": "explicit", "slots": [[3], [1], [0], [2]]}),
            gating={"skew": "zipf", "shuffle": False},
            faults=[fault("slow_gpu", gpu=gpu, factor=2.0)],
        )

    # Expert 0 is the hottest in every layer, and rank 2 holds it.
    assert same_tables(trace_of(slow("hottest")), trace_of(slow(2)))
    assert not same_tables(trace_of(slow("hottest")), trace_of(slow(0)))


def test_a_slow_network_card_is_a_slow_link_by_its_vertex() -> None:
    scenario = tiny(
        rail_tree(2, 2),
        deployment=parallel(dp=4),
        faults=[fault("slow_link", link="server0/nic1", factor=4.0)],
    )
    links = table(trace_of(scenario), "links")
    whole = links["bandwidth"] * trace_of(scenario).facts["simulated_seconds"]
    slow = np.isclose(links["offered"], whole / 4)
    named = [(a, b) for a, b in zip(links["source"][slow], links["target"][slow], strict=True)]
    assert len(named) == 4 and all("server0/nic1" in ends for ends in named)


plans = st.lists(
    st.builds(
        lambda kind, start, length, factor, period, duty, timing: fault(
            kind,
            start=start,
            **({"end": start + length} if length < inf else {}),
            **({"factor": factor} if kind == "slow_link" or (kind == "flapping_link" and factor < 4) else {}),
            **({"period": period, "duty": duty, "timing": timing} if kind == "flapping_link" else {}),
        ),
        st.sampled_from(["slow_link", "down_link", "flapping_link"]),
        st.floats(0, 5),
        st.floats(0.01, 5) | st.just(inf),
        st.floats(1, 8),
        st.floats(0.01, 3),
        st.floats(0.05, 0.95),
        st.sampled_from(["regular", "random"]),
    ),
    min_size=1,
    max_size=3,
)


@given(plans=plans, seed=st.integers(0, 9))
def test_a_plan_names_each_time_once_and_no_bandwidth_beyond_the_nominal(plans: Any, seed: int) -> None:
    values = [Fault.model_validate({"link": "a->b"} | plan) for plan in plans]
    found = list(itertools.islice(capacities(100.0, values, range(len(values)), seed), 40))
    times, bandwidth = np.array(found).reshape(-1, 2).T
    assert (np.diff(times) > 0).all()
    assert ((bandwidth >= 0) & (bandwidth <= 100.0 * (1 + 1e-12))).all()
    if len(found) < 40 and all("end" in plan for plan in plans):
        assert bandwidth[-1:] == approx(100.0)


# ---- which links --------------------------------------------------------------------------------


def links_of(name: str) -> list[str]:
    links = build_topology(tiny(rail_tree(2, 2), deployment=parallel(dp=4)).topology).links
    one = Fault.model_validate(fault("down_link", link=name))
    return [f"{links.source[k]}->{links.target[k]}" for k in link_faults([one], links)]


def test_a_link_is_named_one_way_both_ways_or_by_its_vertex() -> None:
    assert links_of("gpu0->server0/nic0") == ["gpu0->server0/nic0"]
    both = ["gpu0->server0/nic0", "server0/nic0->gpu0"]
    assert links_of("gpu0<->server0/nic0") == links_of("server0/nic0<->gpu0") == both
    leaf = ["server0/nic0->pod0/rail0/leaf", "pod0/rail0/leaf->server0/nic0"]
    assert links_of("server0/nic0") == [*both, *leaf]


@pytest.mark.parametrize(
    "name, said",
    [
        ("server0/nic9", 'no vertex "server0/nic9" (did you mean "server0/nic'),
        ("gpu0->server0/nvswich", 'no link "gpu0->server0/nvswich" (did you mean "gpu0->server0/nvswitch"?)'),
        ("gpu0<->sever0/nic0", '(did you mean "gpu0<->server0/nic0"?)'),
        ("gpu0->gpu1", 'from "gpu0" links lead to "server0/nvswitch", "server0/nic0"'),
    ],
)
def test_a_link_that_is_not_there_is_refused_with_what_is(name: str, said: str) -> None:
    with pytest.raises(ClustersimError, match=r"^faults\.0\.link: the topology has no ") as refused:
        links_of(name)
    assert said in str(refused.value)


def test_two_faults_that_may_keep_a_link_down_between_them_for_ever_are_refused() -> None:
    links = build_topology(tiny().topology).links
    first = fault("flapping_link", link="gpu0", period=1.0, duty=0.5, end=5.0)
    for start, factor in ((2.5, {}), (5.0, {}), (2.5, {"factor": 2.0})):
        second = fault("flapping_link", link="gpu0->server0/nvswitch", period=1.0, start=start, **factor)
        both = [Fault.model_validate(one) for one in (first, second)]
        if start < 5.0 and not factor:
            with pytest.raises(
                ClustersimError, match=r"faults\.1\.link: gpu0->server0/nvswitch already flaps"
            ):
                link_faults(both, links)
        else:
            assert len(link_faults(both, links)) == 2


def test_a_preview_refuses_a_wrong_link_too(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = "faults=[{kind='down_link', link='server0/nic8'}]"
    assert _status(["preview", str(WORKLOADS / "large_ep.toml"), "--set", wrong]) == 2
    assert "faults.0.link" in capsys.readouterr().err


# ---- detours ------------------------------------------------------------------------------------


def two_spines(**box: Any) -> dict[str, Any]:
    return fat_tree(3, 2, **box) | {"spines": 2}


TOPOLOGIES: dict[str, dict[str, Any]] = {
    "one server": single_server(4),
    "rails": rail_tree(2, 2),
    "rails and pods": rail_tree(4, 2)
    | {"servers_per_pod": 2, "spines": 2, "uplink_bandwidth": "1 GB/s", "uplink_latency": "0 s"},
    "fat tree": two_spines(),
    "shared cards": two_spines(nics=1),
    "several cards": rail_tree(2, 2, nics=4),
}


def built(topology: dict[str, Any], gpus: int) -> Topology:
    work = {"deployment": parallel(dp=gpus), "workload": {"sequences": gpus}, "model": {"experts": gpus}}
    return build_topology(tiny(topology, **work).topology)


def machine(name: str) -> Topology:
    gpus = {"rails and pods": 8, "fat tree": 6, "shared cards": 6}.get(name, 4)
    return built(TOPOLOGIES[name], gpus)


def shortest(topology: Topology, source: str, target: str, dead: frozenset[int]) -> float:
    """Links of the shortest way, found the slow way: over all walks that obey the rules.

    A card leads from the network to GPUs only; other GPUs are passed only where there is no other way.
    """
    kind = topology.graph.nodes(data="kind")
    walks = nx.DiGraph()
    for a, b, link in topology.graph.edges(data="link"):
        if link in dead:
            continue
        for from_net, net in itertools.product((False, True), repeat=2):
            # A place is a vertex and whether it was entered from the network side.
            if net == (kind[a] != "gpu") and (kind[a] != "nic" or not from_net or kind[b] == "gpu"):
                walks.add_edge((a, from_net), (b, net))
    goals = [(target, False), (target, True)]
    others = [(gpu, side) for gpu in topology.gpus for side in (False, True) if gpu not in (source, target)]
    for graph in (nx.restricted_view(walks, [n for n in others if n in walks], []), walks):
        lengths = [
            nx.shortest_path_length(graph, start, goal)
            for start in ((source, False), (source, True))
            for goal in goals
            if start in graph and goal in graph and nx.has_path(graph, start, goal)
        ]
        if lengths:
            return min(lengths)
    return inf


@pytest.mark.parametrize("name", TOPOLOGIES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_detour_is_the_shortest_way_without_the_dead_links(name: str, data: st.DataObject) -> None:
    topology = machine(name)
    links, gpus = topology.links, topology.gpus
    dead = frozenset(data.draw(st.sets(st.integers(0, len(links.source) - 1), max_size=8)))
    source, target = np.divmod(np.arange(len(gpus) ** 2), len(gpus))
    source, target = source[source != target], target[source != target]
    ways = Detours(topology).around(source, target, dead)
    for row in range(len(source)):
        a, b = gpus[source[row]], gpus[target[row]]
        way = [k for k in ways.links[row].tolist() if k >= 0]
        assert ways.found[row] == bool(way)
        assert (len(way) or inf) == shortest(topology, a, b, dead)
        assert not dead & set(way)
        stations = [a, *(links.target[k] for k in way)]
        assert [links.source[k] for k in way] == stations[:-1]
        assert stations[-1] == b or not way
        assert ways.latency[row] == approx(links.latency[way].sum())


def test_a_detour_depends_on_nothing_that_was_asked_before() -> None:
    topology = machine("fat tree")
    dead = frozenset(k for k, a in enumerate(topology.links.source) if a == "leaf0")
    source, target = np.array([0, 1, 2, 5, 3]), np.array([2, 5, 0, 0, 4])
    together = Detours(topology).around(source, target, frozenset({3}))
    asked = Detours(topology)
    asked.around(np.array([4]), np.array([0]), dead)
    for row in reversed(range(5)):
        alone = asked.around(source[[row]], target[[row]], frozenset({3}))
        way = together.links[row]
        assert alone.links[0].tolist() == way[way >= 0].tolist()


def test_detours_spread_over_the_spines_that_are_left() -> None:
    topology = built(fat_tree(2, 16) | {"spines": 8}, 32)
    links = topology.links
    pairs = enumerate(zip(links.source, links.target, strict=True))
    dead = frozenset(k for k, pair in pairs if "spine0" in pair)
    source, target = (ends.ravel() for ends in np.meshgrid(np.arange(16), np.arange(16, 32)))
    ways = Detours(topology).around(source, target, dead)
    spines = [links.target[k] for k in ways.links[:, 2]]
    # 256 ways over 7 spines: 37 each; Poisson's spread is 6.
    counts = [spines.count(f"spine{n}") for n in range(8)]
    assert counts[0] == 0 and min(counts[1:]) > 15 and max(counts[1:]) < 60


# ---- one exchange, by hand ----------------------------------------------------------------------


def sent(
    scenario: Scenario, arrivals: list[float], size: float = 1e6, pair: tuple[int, int] = (0, 2)
) -> tuple[list[Meeting], Outages]:
    """A message from one GPU to another, begun at each of these times, under the scenario's faults."""
    layout = lay_out(scenario)
    links, network = layout.topology.links, scenario.network
    faults = link_faults(scenario.faults, links)
    env = simpy.Environment()
    outages = Outages(layout.topology, network.on_down, network.reroute_after)
    fabric = Fabric(env, build(network.fidelity, links.bandwidth, network.chunk), outages)
    over = env.event()
    for link, bandwidth in enumerate(links.bandwidth.tolist()):
        plan = capacities(bandwidth, scenario.faults, faults.get(link, ()), scenario.seed)
        offered, noted = np.zeros(len(links.bandwidth)), Capacities(links.bandwidth)
        env.process(link_process(env, link, bandwidth, plan, fabric, noted, offered, over))
    exchange = Exchange("point_to_point", np.array([pair], dtype=np.int32), np.array([size]))
    routes = Routes(layout)
    meetings = [Meeting(fabric, routes.of(exchange)) for _ in arrivals]

    def begin(meeting: Meeting, at: float) -> Iterator[simpy.Event]:
        yield env.timeout(at)
        yield meeting.arrive(0)

    running = [env.process(begin(*pair)) for pair in zip(meetings, arrivals, strict=True)]
    env.run(until=env.all_of(running))
    return meetings, outages


def rails(on_down: str, *faults: dict[str, Any], after: float = 1e-4, latency: float = 0.0) -> Scenario:
    """Two servers of two GPUs on rails: 1 MB takes 1 ms over a card."""
    network = {"on_down": on_down, "reroute_after": f"{after!r} s"}
    topology = rail_tree(2, 2, latency=latency)
    return tiny(topology, deployment=parallel(dp=4), network=network, faults=list(faults))


def carried(meeting: Meeting, scenario: Scenario) -> dict[str, float]:
    links = build_topology(scenario.topology).links
    ends = zip(links.source, links.target, strict=True)
    return {f"{a}->{b}": size for (a, b), size in zip(ends, meeting.carried[0], strict=True) if size}


OLD = ["gpu0->server0/nic0", "server0/nic0->pod0/rail0/leaf"]
NEIGHBOUR = ["gpu0->server0/nvswitch", "gpu1->server0/nic1", "gpu3->server1/nvswitch"]


def test_flows_wait_for_a_link_that_comes_back() -> None:
    scenario = rails("wait", fault("down_link", link="server0/nic0", start=4e-4, end=7e-4))
    (meeting,), outages = sent(scenario, [0.0])
    # 0.4 MB until it is down, nothing for 0.3 ms, then 0.6 MB.
    assert meeting.done[0] == approx(1.3e-3)
    assert len(outages.past) == 4 and all(o.moved == o.avoided == 0 for o in outages.past)


def test_flows_under_way_go_on_by_another_path_once_the_machine_has_noticed() -> None:
    scenario = rails("reroute", fault("down_link", link="server0/nic0", start=4e-4))
    (meeting,), outages = sent(scenario, [0.0])
    # 0.4 MB until it is down, 0.1 ms until that is noticed, 0.6 MB by the neighbour's card.
    assert meeting.done[0] == approx(1.1e-3)
    crossed = carried(meeting, scenario)
    assert [crossed[link] for link in OLD] == approx([4e5, 4e5])
    assert [crossed[link] for link in NEIGHBOUR] == approx([6e5, 6e5, 6e5])
    first = outages.past[0]
    assert (first.start, first.noticed, first.moved, first.moved_bytes) == approx((4e-4, 5e-4, 1, 6e5))
    assert sum(outage.moved for outage in outages.past) == 1, "only the first dead link on a path counts"


def test_a_flow_on_its_detour_stays_there_and_new_ones_take_the_old_path_once_the_link_is_back() -> None:
    down = fault("down_link", link="server0/nic0", start=4e-4, end=6e-4)
    scenario = rails("reroute", down, after=1e-5)
    (moved, avoided, later), outages = sent(scenario, [0.0, 4.5e-4, 7e-4])
    assert carried(moved, scenario)[OLD[0]] == approx(4e5)
    assert carried(avoided, scenario).get(OLD[0], 0.0) == 0.0
    assert carried(avoided, scenario)[NEIGHBOUR[0]] == approx(1e6)
    assert carried(later, scenario)[OLD[0]] == approx(1e6)
    assert later.done[0] == approx(1.7e-3), "it has the old path for itself"
    assert outages.past[0].avoided == 1 and outages.past[0].avoided_bytes == approx(1e6)


def test_what_begins_before_the_machine_has_noticed_stands_still_until_then() -> None:
    scenario = rails("reroute", fault("down_link", link="server0/nic0", start=4e-4), after=1e-3)
    (meeting,), outages = sent(scenario, [5e-4])
    assert meeting.done[0] == approx(4e-4 + 1e-3 + 1e-3)
    assert outages.past[0].moved == 1 and outages.past[0].moved_bytes == approx(1e6)


def test_a_link_that_is_back_before_anybody_noticed_is_waited_for() -> None:
    scenario = rails("reroute", fault("down_link", link="server0/nic0", start=4e-4, end=4.5e-4))
    (meeting,), outages = sent(scenario, [0.0])
    assert meeting.done[0] == approx(1.05e-3)
    assert np.isnan(outages.past[0].noticed) and outages.past[0].moved == 0


def test_a_detour_costs_its_own_latency_and_what_was_left_of_the_start_up() -> None:
    # Every link has half a latency: four on the old path, eight by the neighbours.
    # Down at 5 us, before the first byte at 20 us; noticed at 6 us: 14 us are left, then 40 us, then 1 MB.
    scenario = rails("reroute", fault("down_link", link="server0/nic0", start=5e-6), after=1e-6, latency=1e-5)
    (under_way, new), _ = sent(scenario, [0.0, 1.0])
    assert under_way.done[0] == approx(6e-6 + 14e-6 + 40e-6 + 1e-3)
    assert new.done[0] == approx(1.0 + 40e-6 + 1e-3)


def test_without_another_path_flows_wait_and_that_is_said() -> None:
    network = {"on_down": "reroute", "reroute_after": "0 s"}
    down = fault("down_link", link="gpu0->server0/nvswitch", start=5e-5, end=9e-5)
    scenario = tiny(single_server(2), network=network, faults=[down])
    meetings, outages = sent(scenario, [0.0, 6e-5], size=1e6, pair=(0, 1))
    # 1 MB in 100 us; the half that is left and the new one share the link from 90 us on.
    assert [meeting.done[0] for meeting in meetings] == approx([1.9e-4, 2.4e-4])
    assert outages.past[0].stranded == 2


def test_a_flow_that_ends_in_a_switch_has_no_detour() -> None:
    # In-switch reductions send to the switch itself; no other switch would do.
    scenario = rails("reroute")
    topology = build_topology(scenario.topology)
    links = list(zip(topology.links.source, topology.links.target, strict=True))
    up, out = links.index(("gpu0", "server0/nvswitch")), links.index(("server0/nvswitch", "gpu1"))
    path = np.array([[up, -1], [up, out]], dtype=np.int32)
    flows = Flows(np.ones(2), np.ones(2), path, np.zeros(2))
    ends, first = (np.array([0, 0]), np.array([0, 1])), np.array([0, 2, 2, 2, 2])
    one_round = RoutedRound(
        flows=flows,
        payload=flows.size,
        source=ends[0],
        target=ends[1],
        via=np.array([UP, PEER], dtype=np.int8),
        first=first,
        pending=np.array([3, 1, 0, 0]),
        repeat=np.ones(2, dtype=np.int64),
        together=False,
    )
    routed = RoutedExchange("in_switch", np.arange(4), 4, (one_round,), "all", np.zeros((2, len(links))))
    ways = Outages(topology, "reroute", 0.0).ways(routed, one_round, np.arange(2), frozenset({up}))
    assert ways.found.tolist() == [False, True]


def test_a_flow_that_finds_no_way_takes_one_as_soon_as_a_link_is_back() -> None:
    downs = [
        fault("down_link", link="server0/nic0", start=4e-4),
        fault("down_link", link="server0/nic1", start=3e-4, end=8e-4),
    ]
    (meeting,), outages = sent(rails("reroute", *downs), [0.0])
    assert meeting.done[0] == approx(8e-4 + 6e-4)
    blamed = next(outage for outage in outages.past if outage.moved)
    assert blamed.stranded == 1 and blamed.start == approx(4e-4)


def test_links_that_flap_faster_than_their_latency_do_not_hold_a_flow_for_ever() -> None:
    flaps = [
        fault("flapping_link", link=f"server0/nic{card}", period=1e-5, start=card * 5e-6, duty=0.6)
        for card in (0, 1)
    ]
    (meeting,), _ = sent(rails("reroute", *flaps, after=1e-7, latency=1e-5), [0.0], size=1e4)
    assert isfinite(meeting.done[0])


# ---- runs that cannot end -----------------------------------------------------------------------


def test_a_flow_that_waits_for_a_link_that_never_returns_ends_the_run_with_an_error() -> None:
    with pytest.raises(
        StuckError, match=r"gpu0->server0/nic0 is down for good since 0.0004 s.*rank 0.*rank 2"
    ):
        sent(rails("wait", fault("down_link", link="server0/nic0", start=4e-4)), [0.0])
    # What ends before, or is somewhere else, is not touched.
    (meeting,), _ = sent(rails("wait", fault("down_link", link="server0/nic0", start=2e-3)), [0.0])
    assert meeting.done[0] == approx(1e-3)
    sent(rails("wait", fault("down_link", link="server0/nic1", start=4e-4)), [0.0])


def test_where_no_other_path_is_left_for_good_the_run_ends_even_if_other_links_flap_for_ever() -> None:
    flaps = fault("flapping_link", link="server1/nic1", period=1e-4)
    down = [fault("down_link", link=f"server0/nic{card}", start=4e-4) for card in (0, 1)]
    for on_down, said in (("reroute", "no other path is left"), ("wait", "on_down")):
        with pytest.raises(StuckError, match=said):
            sent(rails(on_down, flaps, *down), [0.0])


def test_a_link_that_stays_down_when_its_return_was_due_may_be_gone_for_good() -> None:
    relay = [fault("down_link", link="server0/nic0", start=4e-4, end=8e-4)]
    relay += [fault("down_link", link="server0/nic0", start=8e-4)]
    with pytest.raises(StuckError, match=r"down for good since 0\.0004 s"):
        sent(rails("wait", *relay), [0.0])
    (meeting,), outages = sent(rails("reroute", *relay), [0.0])
    assert meeting.done[0] == approx(1.1e-3)
    assert len(outages.past) == 4, "one outage of each link, not two"


def test_a_stuck_run_leaves_a_result_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    down = "faults=[{kind='down_link', link='server0/nic0', start='1 ms'}]"
    folder = tmp_path / "result"
    command = ["run", str(WORKLOADS / "large_ep.toml"), "--set", down, "--out", str(folder)]
    assert _status(command) == 3
    said = capsys.readouterr()
    assert said.out == "" and "down for good since 0.001 s, and dispatch of layer " in said.err
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["error"].startswith("StuckError: the run cannot end")


def test_a_stuck_run_leaves_an_older_result_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "result"
    command = [
        "run",
        str(WORKLOADS / "large_ep.toml"),
        "--set",
        "workload.decode_steps=1",
        "--out",
        str(folder),
    ]
    assert _status([*command, "--quiet"]) == 0
    before = (folder / "summary.json").read_bytes()
    assert _status([*command, "--set", "faults=[{kind='down_link', link='server0/nic0'}]"]) == 3
    assert (folder / "summary.json").read_bytes() == before and (folder / "trace").is_dir()
    assert "StuckError" in (tmp_path / "result-failed" / "summary.json").read_text("utf-8")


# ---- nothing is lost ----------------------------------------------------------------------------


class Counted:
    """A network that counts what crosses links and what arrives, and notices who ends twice."""

    def __init__(self, network: Any, links: int) -> None:
        self.network = network
        self.crossed = np.zeros(links)
        self.arrived: dict[tuple[int, int], float] = {}
        self.open: dict[Hashable, tuple[Flows, np.ndarray]] = {}

    def start(self, flows: Flows, key: Hashable, now: float) -> None:
        self.open[key] = flows, np.ones(len(flows.size), dtype=bool)
        self.network.start(flows, key, now)

    def set_capacity(self, link: int, bandwidth: float, now: float) -> None:
        self.network.set_capacity(link, bandwidth, now)

    def next_finish(self) -> float:
        found: float = self.network.next_finish()
        return found

    def finish(self, now: float) -> Finished:
        found: Finished = self.network.finish(now)
        for key, positions in found:
            self.count(key, positions, np.zeros(len(positions)))
        return found

    def stop(self, key: Hashable, positions: np.ndarray, now: float) -> np.ndarray:
        left: np.ndarray = self.network.stop(key, positions, now)
        assert (left >= 0).all() and (left <= self.open[key][0].size[positions]).all()
        self.count(key, positions, left)
        return left

    def count(self, key: Hashable, positions: np.ndarray, left: np.ndarray) -> None:
        flows, there = self.open[key]
        assert there[positions].all(), "a flow ends or leaves once"
        there[positions] = False
        for position, rest in zip(positions.tolist(), left.tolist(), strict=True):
            path = [k for k in flows.links[position].tolist() if k >= 0]
            came = flows.size[position] - rest
            self.crossed[path] += came
            ends = path[0], path[-1]
            self.arrived[ends] = self.arrived.get(ends, 0.0) + came


#: So slow that most of a run is exchanges, and faults meet flows under way.
SLOW = {"nvlink": 1e7, "nic": 1e6, "pcie": 4e6}
SCENARIOS = {
    "one server": (single_server(2, **SLOW), parallel(dp=2)),
    "rails": (rail_tree(2, 2, latency=1e-5, **SLOW), parallel(dp=4)),
    "shared cards": (rail_tree(2, 2, nics=1, **SLOW), parallel(dp=4, etp=2)),
    "fat tree": (fat_tree(2, 2, uplink=1e6, **SLOW) | {"spines": 2}, parallel(tp=2, dp=2)),
    "pipeline": (rail_tree(2, 2, **SLOW), parallel(dp=2, pp=2)),
}


@st.composite
def troubled(draw: st.DrawFn, fidelity: str) -> Scenario:
    """A tiny scenario in which links fail while it runs."""
    topology, deployment = SCENARIOS[draw(st.sampled_from(sorted(SCENARIOS)))]
    sections: dict[str, Any] = {
        "deployment": deployment,
        "workload": {"sequences": 4, "decode_steps": 2},
        "trace": {"level": "flows"},
        "gating": {"skew": "zipf"},
    }
    calm = tiny(topology, **sections)
    lasts = trace_of(calm).facts["simulated_seconds"]
    links = build_topology(calm.topology).links
    names = sorted({*links.source, *(f"{a}->{b}" for a, b in zip(links.source, links.target, strict=True))})
    times = st.floats(0.0, 1.0).map(lambda share: share * lasts)
    faults = []
    for plan in draw(plans):
        start, length = draw(times), draw(times) + lasts / 1000
        spell = {"start": f"{start!r} s"}
        if "end" in plan or draw(st.integers(0, 3)):
            spell["end"] = f"{start + length!r} s"
        if "period" in plan:
            spell |= {"period": f"{max(draw(times), lasts / 50)!r} s"}
        faults.append(plan | spell | {"link": draw(st.sampled_from(names))})
    after = draw(times) * draw(st.sampled_from([0.0, 0.1]))
    network = {
        "fidelity": fidelity,
        "chunk": "2 kB",
        "on_down": draw(st.sampled_from(["wait", "reroute", "reroute"])),
        "reroute_after": f"{after!r} s",
    }
    scenario = tiny(topology, **sections, network=network, faults=faults)
    try:
        link_faults(scenario.faults, links)
    except ClustersimError:
        assume(False)  # two faults make one link flap at once
    return scenario


def run_counted(scenario: Scenario) -> tuple[Any, Counted]:
    counted: list[Counted] = []

    def counting(fidelity: str, bandwidth: np.ndarray, *others: Any) -> Counted:
        counted.append(Counted(build(fidelity, bandwidth, *others), len(bandwidth)))
        return counted[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "build", counting)
        return trace_of(scenario), counted[0]


@pytest.mark.parametrize("fidelity", NETWORKS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_nothing_is_lost_whatever_links_fail(fidelity: str, data: st.DataObject) -> None:
    scenario = data.draw(troubled(fidelity))
    try:
        trace, counted = run_counted(scenario)
    except StuckError:
        assert any(one.kind == "down_link" and one.end is None for one in scenario.faults)
        return
    flows, links = table(trace, "flows"), table(trace, "links")
    assert not any(there.any() for _, there in counted.open.values()), "every flow has ended"
    assert (flows["start"] <= flows["end"]).all()
    assert counted.crossed == approx(links["bytes"], rel=1e-9, abs=1e-3)
    # Half a byte may be missing from each flow that is called done.
    assert (
        links["bytes"] <= links["offered"] * (1 + 1e-9) + len(flows["bytes"])
    ).all() or fidelity == "port_bound"
    number = {name: rank for rank, name in enumerate(table(trace, "ranks")["gpu"])}
    owed: dict[tuple[int, int], float] = {}
    for source, target, size in zip(flows["source"], flows["target"], flows["bytes"], strict=True):
        owed[int(source), int(target)] = owed.get((int(source), int(target)), 0.0) + size
    brought: dict[tuple[int, int], float] = {}
    for (first, last), size in counted.arrived.items():
        pair = number[links["source"][first]], number[links["target"][last]]
        brought[pair] = brought.get(pair, 0.0) + size
    assert {pair: size for pair, size in brought.items() if size} == approx(owed, rel=1e-9)
    steps = table(trace, "steps")
    if fidelity != "port_bound":
        assert (steps["end"] - steps["start"] >= steps["bound_network"] * (1 - 1e-6) - 1e-9).all()
    outages = table(trace, "outages")
    assert (outages["start"] <= outages["end"]).all()
    assert scenario.network.on_down == "reroute" or not outages["moved"].any()


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_the_same_faults_give_the_same_trace(data: st.DataObject) -> None:
    scenario = data.draw(troubled("fluid"))
    try:
        once = trace_of(scenario)
    except StuckError:
        assume(False)
    assert same_tables(once, trace_of(scenario))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_flows_that_are_stopped_and_begun_again_on_their_path_end_as_if_nothing_had_been(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = rng.integers(1, 20, 5) * 1e8
    count = int(rng.integers(2, 9))
    size, weight = rng.integers(1, 40, count) * 1e5, rng.integers(1, 4, count).astype(float)
    links = np.stack([rng.permutation(5)[:2] for _ in range(count)]).astype(np.int32)
    usual = ends(capacity, Flows(size, weight, links, np.zeros(count)), [])
    cuts = sorted(rng.uniform(0, usual.max(), 3).tolist())
    assert ends(capacity, Flows(size, weight, links, np.zeros(count)), cuts, rng) == approx(usual, rel=1e-6)


def ends(
    capacity: np.ndarray, flows: Flows, cuts: list[float], rng: np.random.Generator | None = None
) -> np.ndarray:
    """When each flow ends if at these times some flows are taken out and started again."""
    network = build("fluid", capacity, 1.0)
    network.start(flows, 0, 0.0)
    held: dict[Hashable, np.ndarray] = {0: np.arange(len(flows.size))}
    found = np.full(len(flows.size), nan)
    while True:
        now = min(network.next_finish(), cuts[0] if cuts else inf)
        if now == inf:
            return found
        drain(network, now, held, found)
        if cuts and cuts[0] <= now:
            cuts = cuts[1:]
            assert rng is not None
            for key, which in list(held.items()):
                drain(network, now, held, found)
                rows = np.flatnonzero(np.isnan(found[which]) & (which >= 0) & (rng.random(len(which)) < 0.5))
                if len(rows):
                    left = network.stop(key, rows, now)
                    again = which[rows]
                    new = Flows(left, flows.weight[again], flows.links[again], np.zeros(len(rows)))
                    held[key] = np.where(np.isin(np.arange(len(which)), rows), -1, which)
                    held[len(held)] = again
                    network.start(new, len(held) - 1, now)


def drain(network: Any, now: float, held: dict[Hashable, np.ndarray], found: np.ndarray) -> None:
    """Notes all that has arrived by now: what has, must not be stopped."""
    while True:
        for key, done in network.finish(now):
            assert np.isnan(found[held[key][done]]).all()
            found[held[key][done]] = now
        if network.next_finish() > now:
            return


# ---- the whole program --------------------------------------------------------------------------


def test_the_example_loses_little_by_rerouting_and_the_whole_outage_by_waiting() -> None:
    example = str(WORKLOADS / "large_ep_link_down.toml")
    lasted = [
        run_scenario(load(example, overrides)).summary["simulated_seconds"]
        for overrides in (["faults=[]"], [], ["network.on_down=wait"])
    ]
    calm, rerouted, waited = lasted
    # Until it is noticed, less what was left to compute when it began; then narrower paths.
    assert 2e-4 < rerouted - calm < 5e-3, "about the millisecond that noticing takes"
    assert waited - calm == approx(0.1, rel=0.02), "100 ms, less what was left to compute when it began"


def test_rerouting_saves_a_run_most_of_an_outage_that_waiting_would_cost() -> None:
    lasted = {}
    down = fault("down_link", link="server0/nic0", start=1e-6, end=1.0)
    for on_down, faults in (("wait", []), ("reroute", [down])):
        scenario = rails(on_down, *faults, after=1e-7)
        lasted[on_down] = trace_of(scenario).facts["simulated_seconds"]
    assert lasted["wait"] < lasted["reroute"] < lasted["wait"] * 3


def test_the_summary_tells_of_flows_that_took_another_path() -> None:
    down = fault("down_link", link="server0/nic0", end=1.0)
    scenario = rails("reroute", down, after=1e-6)
    notes = " ".join(summarize(trace_of(scenario))["notes"])
    assert "down_link at server0/nic0" in notes and "took another path" in notes
    assert "another path" not in " ".join(summarize(trace_of(rails("reroute")))["notes"])


def test_the_trace_says_when_links_were_down() -> None:
    down = fault(
        "flapping_link", link="gpu0->server0/nvswitch", period=1e-6, start=1e-6, end=2.9e-6, duty=0.5
    )
    trace = trace_of(tiny(faults=[down]))
    outages, faults = table(trace, "outages"), table(trace, "faults")
    assert outages["start"] == approx([1e-6, 2e-6]) and outages["end"] == approx([1.5e-6, 2.5e-6])
    assert (outages["bandwidth"] == 0).all() and np.isnan(outages["noticed"]).all()
    assert faults["factor"].tolist() == [inf] and faults["end"] == approx([2.9e-6])


def test_a_wrong_link_is_told_as_a_mistake_of_the_scenario() -> None:
    with pytest.raises(ScenarioError, match=r"faults\.0\.link"):
        run_scenario(tiny(faults=[fault("down_link", link="gpu9")]))
