"""On an otherwise idle machine an exchange takes what its closed form says, whichever way it is done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import simpy
from pytest import approx
from scenarios import parallel, table, tiny, trace_of

from clustersim.analysis.summary import summarize
from clustersim.engine.fabric import Fabric, Meeting
from clustersim.physics.exchanges import RoutedExchange, alike, nominal_size, route
from clustersim.physics.expert_exchange import expected_targets, port_seconds
from clustersim.physics.fidelity import build
from clustersim.physics.pricing import Measured, chosen, measured, startup_of, tokens_of
from clustersim.physics.startup import Shape, Startup
from clustersim.plan.collectives import AUTO, COLLECTIVES
from clustersim.plan.layout import Layout, lay_out
from clustersim.plan.stepgraph import Copies, Exchange
from clustersim.spec.hardware import Server
from clustersim.spec.reading import read_catalogue
from clustersim.study.preview import preview

KINDS = [(kind, name) for kind, table in COLLECTIVES.items() for name in table]
SIZES = (1e3, 1e5, 1e7, 1e9)
#: DeepSeek-V3's experts in bf16.
EXPERTS = Copies(7168, "bf16", 8, 256)

#: Where rounds on links and closed form are not the same to the last bit (kind, algorithm, or with how many
#: servers) → how the simulated time may differ, as a share of the closed form's.
LOOSE: dict[tuple[str, str, int], tuple[float, float]] = {
    # Half of the tree's root has no second domain below it, and sends less than the form's busiest member.
    ("all_reduce", "double_binary_tree", 2): (0.85, 1.0),
    ("broadcast", "binary_tree", 2): (0.45, 1.0),
    # The form gives the root one card; its flows to other rails leave by others.
    ("broadcast", "direct", 2): (0.15, 1.0),
    ("broadcast", "direct", 4): (0.10, 1.0),
    # The library sends a token once to a rank that has several of its experts, the simulation each copy.
    ("all_to_all", "one_sided", 1): (1.0, 1.12),
    ("all_to_all", "one_sided", 2): (1.0, 1.24),
    ("all_to_all", "one_sided", 4): (1.0, 1.12),
    ("all_to_all", "hierarchical", 2): (1.0, 1.04),
    ("all_to_all", "hierarchical", 4): (1.0, 1.14),
}


def box(**changed: Any) -> dict[str, Any]:
    server = read_catalogue("servers")["dgx_h100"]
    assert isinstance(server, Server)
    return server.model_dump() | changed


def machine(servers: int, **changed: Any) -> Layout:
    """DGX H100s on rails, one EP group over all of them."""
    n = 8 * servers
    family = {"family": "rail_fat_tree", "servers": servers} if servers > 1 else {"family": "single_server"}
    topology = {**family, "server": box(**changed)}
    deployment, model = parallel(dp=n), {"experts": n}
    return lay_out(tiny(topology, deployment=deployment, model=model, workload={"sequences": n}))


def even(kind: str, name: str, servers: int, size: float) -> Exchange:
    """What everybody has alike. size: bytes as NCCL-tests count them."""
    n = 8 * servers
    if kind == "point_to_point":
        return Exchange(kind, np.array([[0, n // 2]]), np.array([size]), algorithm=name)
    groups = np.arange(n)[None, :]
    if kind != "all_to_all":
        parts = np.full((1, n), size / n) if kind in ("all_gather", "reduce_scatter") else np.array([size])
        return Exchange(kind, groups, parts, algorithm=name)
    # Experts have whole tokens; at least one goes out.
    row = EXPERTS.numbers * 2
    tokens = max(size / (row * EXPERTS.top_k), 1.0)
    owed = np.full((1, n, n), tokens * EXPERTS.top_k * row / n)
    once = expected_targets(servers, EXPERTS.top_k, EXPERTS.experts) / servers * tokens * row
    return Exchange(kind, groups, owed, np.full((1, n, servers), once), algorithm=name, copies=EXPERTS)


def alone(exchange: Exchange, layout: Layout, costs: Measured) -> tuple[float, RoutedExchange]:
    """s until all is there when nothing else is on the machine."""
    routed = route(exchange, layout, layout.topology.gpu.launch_latency, costs)
    env = simpy.Environment()
    meeting = Meeting(Fabric(env, build("fluid", layout.topology.links.bandwidth, 1e5)), routed)
    for member in range(exchange.groups.size):
        sends = exchange.kind != "point_to_point" or member % 2 == 0
        (meeting.arrive if sends else meeting.expect)(member)
    env.run()
    return max(meeting.done), routed


def costs_of(layout: Layout) -> Measured:
    costs = measured(layout.topology, "measured")
    assert costs is not None
    return costs


def closed(exchange: Exchange, layout: Layout, costs: Measured) -> Startup | None:
    shape = alike(exchange.groups, layout)[0].shape
    return startup_of(
        costs, exchange, exchange.algorithm, shape, nominal_size(exchange.kind, exchange.size)[0]
    )


@pytest.mark.parametrize("servers", [1, 2, 4])
@pytest.mark.parametrize("kind, name", KINDS)
def test_alone_on_the_machine_an_exchange_takes_what_its_closed_form_says(
    kind: str, name: str, servers: int
) -> None:
    layout = machine(servers)
    costs = costs_of(layout)
    for size in SIZES:
        exchange = even(kind, name, servers, size)
        expected = closed(exchange, layout, costs)
        if expected is None:
            assert name in ("one_shot", "two_shot") and servers > 1, "custom kernels stay in a domain"
            continue
        took, _ = alone(exchange, layout, costs)
        least, most = LOOSE.get((kind, name, servers), (1.0, 1.0))
        assert least * (1 - 1e-6) <= took / expected.seconds <= most * (1 + 1e-6), size


@pytest.mark.parametrize("servers", [1, 2, 4])
@pytest.mark.parametrize("name", ["one_sided", "hierarchical"])
def test_an_expert_exchange_is_slower_than_its_form_only_by_copies_the_library_would_not_send(
    name: str, servers: int
) -> None:
    layout = machine(servers)
    costs = costs_of(layout)
    for size in SIZES:
        exchange = even("all_to_all", name, servers, size)
        expected = closed(exchange, layout, costs)
        assert expected is not None
        shape = alike(exchange.groups, layout)[0].shape
        tokens = tokens_of(costs, exchange, name, nominal_size("all_to_all", exchange.size)[0])
        floor = max(port_seconds(name, shape, tokens), expected.transfer)
        took, _ = alone(exchange, layout, costs)
        assert took == approx(expected.seconds - expected.transfer + floor, rel=0.02)


def test_the_way_back_takes_what_combine_does() -> None:
    layout = machine(2)
    costs = costs_of(layout)
    there = even("all_to_all", "low_latency", 2, 1e6)
    back = Exchange(there.kind, there.groups, there.size, None, True, there.algorithm, there.copies)
    expected = closed(back, layout, costs)
    assert expected is not None and expected != closed(there, layout, costs)
    assert alone(back, layout, costs)[0] == approx(expected.seconds, rel=0.02)


def test_more_bytes_on_one_member_take_longer_than_as_many_spread_evenly() -> None:
    layout = machine(2)
    costs = costs_of(layout)
    spread = even("all_to_all", "pairwise", 2, 1e8)
    owed = spread.size.copy()
    owed[:, :, 3] *= 3.0
    owed *= spread.size.sum() / owed.sum()
    skewed = Exchange("all_to_all", spread.groups, owed, algorithm="pairwise", copies=EXPERTS)
    assert alone(skewed, layout, costs)[0] > 1.5 * alone(spread, layout, costs)[0]


def test_auto_takes_the_quickest_that_the_group_can_do() -> None:
    layout = machine(2)
    costs = costs_of(layout)
    for size in SIZES:
        exchange = even("all_to_all", AUTO, 2, size)
        _, routed = alone(exchange, layout, costs)
        assert routed.algorithm == ("low_latency" if size < 1e7 else "hierarchical")
    switched, plain = machine(1), machine(1, switch_reduces=False)
    big = even("all_reduce", AUTO, 1, 1e9)
    assert alone(big, switched, costs)[1].algorithm == "in_switch"
    assert alone(big, plain, costs)[1].algorithm == "ring"


def test_one_sided_kernels_are_taken_within_a_domain_only() -> None:
    costs, names = costs_of(machine(1)), list(COLLECTIVES["all_to_all"])
    inside = Shape(8, 1, 450e9, 0.6e-6, 50e9, 2.68e-6, 1)
    across = Shape(8, 2, 450e9, 0.6e-6, 50e9, 2.68e-6, 1)
    taken = [chosen(costs, even("all_to_all", AUTO, 1, 1e9), at, 1e9, names) for at in (inside, across)]
    assert taken[0] == "one_sided" != taken[1]


def test_nobody_has_measured_a_gpu_without_architecture() -> None:
    assert measured(lay_out(tiny()).topology, "measured") is None
    assert measured(machine(1).topology, "none") is None


def test_run_and_preview_say_where_start_up_costs_are_left_out() -> None:
    for gpu, network, said in (
        (box()["gpu"], {}, ""),
        (box()["gpu"], {"startup": "none"}, 'network.startup = "none"'),
        (box()["gpu"] | {"architecture": None}, {}, "h100_sxm"),
    ):
        topology = {"family": "single_server", "server": box(gpu=gpu, gpus=2)}
        scenario = tiny(topology, deployment=parallel(tp=2), network=network)
        notes = (summarize(trace_of(scenario))["notes"], preview(scenario, lay_out(scenario))["notes"])
        for found in notes:
            about = [note for note in found if "start-up" in note]
            assert len(about) == bool(said), found
            assert not said or said in about[0]


def test_what_was_measured_takes_the_place_of_the_launch() -> None:
    layout = machine(1)
    costs = costs_of(layout)
    exchange = even("all_gather", "ring", 1, 8.0)
    slow = route(exchange, layout, 1.0, costs)
    assert slow.rounds[0].flows.latency.max() < 1e-3
    # Nobody has measured a custom kernel over two servers: it costs the GPU's launch.
    across = machine(2)
    unknown = route(even("all_reduce", "one_shot", 2, 8.0), across, 1.0, costs_of(across))
    assert unknown.rounds[0].flows.latency.min() >= 1.0


def test_bounds_are_those_of_the_bytes_that_are_asked_for() -> None:
    topology = {"family": "rail_fat_tree", "servers": 2, "server": box(gpus=2, nics=2)}
    bounds, links = [], []
    for startup in ("measured", "none"):
        scenario = tiny(topology, deployment=parallel(tp=2, dp=2), network={"startup": startup})
        trace = trace_of(scenario)
        found = preview(scenario, lay_out(scenario))["phases"]["decode"]["bounds"]
        assert found["network"] == approx(table(trace, "steps")["bound_network"][0])
        bounds.append(found)
        links.append(table(trace, "links")["bytes"])
    assert bounds[0] == bounds[1]
    assert (links[0] >= links[1]).all() and (links[0] > links[1]).any()


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_tokens_come_back_by_the_library_that_took_them(format: str) -> None:
    experts = Copies(7168, format, 8, 256)
    costs, shape = costs_of(machine(2)), Shape(16, 2, 450e9, 0.6e-6, 50e9, 2.68e-6, 1)
    names = list(COLLECTIVES["all_to_all"])
    taken = []
    for tokens in np.geomspace(1, 8192, 40):
        ways = []
        for back in (False, True):
            size = tokens * 8 * 7168 * {"bf16": 2.0, "fp8": 1.0}[experts.sent_as(back)]
            exchange = Exchange(
                "all_to_all",
                np.arange(16)[None, :],
                np.full((1, 16, 16), size / 16),
                back=back,
                copies=experts,
            )
            ways.append(chosen(costs, exchange, shape, size, names))
        assert ways[0] == ways[1]
        taken.append(ways[0])
    assert len(set(taken)) > 1
