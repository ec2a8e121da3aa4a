"""Start-up costs: no exchange beats its busiest port, `auto` takes the quickest, and the parts add up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from clustersim.errors import ClustersimError
from clustersim.physics.startup import WAYS, Costs, Shape, choose, estimate, shape_of, startup
from clustersim.spec.hardware import Server
from clustersim.spec.library import (
    ARCHITECTURES,
    FABRICS,
    FabricCosts,
    LibraryCosts,
    fabric_costs,
    kernel_costs,
    library_costs,
)
from clustersim.spec.reading import read_catalogue

EVERY = [(kind, name) for kind, ways in WAYS.items() for name in ways]
SERVER = Shape(8, 1, 450e9, 0.6e-6, 50e9, 2.68e-6, 1)
RACK = Shape(64, 1, 900e9, 0.6e-6, 50e9, 2.68e-6, 1)


def costs_of(architecture: str = "hopper", fabric: str = "infiniband") -> Costs:
    return Costs(library_costs(architecture), fabric_costs(fabric), kernel_costs("vllm", architecture))


def shapes() -> st.SearchStrategy[Shape]:
    """Groups of 2 to 256, in 1 to 32 equal domains, on machines of all makes."""
    return st.builds(
        lambda per_domain, domains, nvlink, card, switch: Shape(
            max(per_domain * domains, 2), domains if per_domain * domains > 1 else 1,
            nvlink, 0.6e-6, card, 2.68e-6, switch,
        ),
        st.integers(1, 8), st.integers(1, 32), st.sampled_from([300e9, 450e9, 900e9]),
        st.sampled_from([12.5e9, 50e9, 100e9]), st.integers(0, 1),
    )  # fmt: skip


everywhere = st.builds(costs_of, st.sampled_from(ARCHITECTURES), st.sampled_from(FABRICS))
sizes = st.floats(1, 1e11)


@pytest.mark.parametrize(("kind", "name"), EVERY)
@settings(max_examples=40, deadline=None)
@given(costs=everywhere, shape=shapes(), size=sizes)
def test_no_exchange_is_faster_than_its_busiest_port_allows(
    kind: str, name: str, costs: Costs, shape: Shape, size: float
) -> None:
    parts, _ = estimate(costs, kind, name, shape, size)
    assert parts.wire >= parts.port * (1 - 1e-12)
    assert parts.launch > 0 and parts.latency > 0 and parts.port > 0


@pytest.mark.parametrize(("kind", "name"), EVERY)
@settings(max_examples=40, deadline=None)
@given(costs=everywhere, shape=shapes(), size=sizes, more=st.floats(1, 100))
def test_more_bytes_never_take_less_time(
    kind: str, name: str, costs: Costs, shape: Shape, size: float, more: float
) -> None:
    little, _ = estimate(costs, kind, name, shape, size)
    much, _ = estimate(costs, kind, name, shape, size * more)
    assert much.seconds >= little.seconds * (1 - 1e-12)


@pytest.mark.parametrize("kind", WAYS)
@settings(max_examples=60, deadline=None)
@given(costs=everywhere, shape=shapes(), size=sizes)
def test_auto_is_never_slower_than_an_algorithm_it_may_take(
    kind: str, costs: Costs, shape: Shape, size: float
) -> None:
    chosen, _ = estimate(costs, kind, choose(costs, kind, shape, size), shape, size)
    for name, way in WAYS[kind].items():
        if way.auto:
            assert chosen.seconds <= estimate(costs, kind, name, shape, size)[0].seconds


@pytest.mark.parametrize(("kind", "name"), EVERY)
@settings(max_examples=20, deadline=None)
@given(costs=everywhere, shape=shapes(), size=sizes, rounds=st.integers(1, 500))
def test_what_the_simulation_adds_comes_to_the_time_of_the_closed_form(
    kind: str, name: str, costs: Costs, shape: Shape, size: float, rounds: int
) -> None:
    parts, _ = estimate(costs, kind, name, shape, size)
    if not np.isfinite(parts.launch):
        return
    added = startup(costs, kind, name, shape, size, rounds)
    path = shape.network_latency if shape.crosses else shape.nvlink_latency
    assert added.wire >= 1
    assert added.launch + rounds * (path + added.step) + added.wire * parts.port == approx(added.seconds)
    assert added.seconds == approx(parts.seconds)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_many_rows_at_once_are_each_row_by_itself(kind: str, name: str) -> None:
    costs, size = costs_of(), np.array([1e3, 1e5, 1e7, 1e9])
    shape = Shape(np.full(4, 8.0), np.ones(4), 450e9, 0.6e-6, 50e9, 2.68e-6, np.ones(4))
    together, best = estimate(costs, kind, name, shape, size)
    for k, one in enumerate(size):
        alone, protocol = estimate(costs, kind, name, SERVER, one)
        assert together.seconds[k] == approx(alone.seconds) and best[k] == protocol


PLAIN = LibraryCosts.model_validate(
    {
        "launch": "10 us", "start_ll128": "1 s", "start_simple": "5 us",
        "step_ll": "1 s", "step_ll128": "1 s", "step_simple": "1 us",
        "reach_ll": 0.1, "reach_ll128": 0.5, "reach_simple": 0.5, "own_ll128": 0.0, "own_simple": 1.0,
        "chunk": "0 B", "switch_head": "2 us", "switch_reach": 0.5, "pair_launch": "8 us",
        "pair_peer": "1 us", "pair_rate": "1 GB/s", "pair_simple": "4 us", "pair_reach": 0.5, "pair_own": 1.0,
    }
)  # fmt: skip
WIRE = FabricCosts.model_validate(
    {"step_ll": "1 us", "step_simple": "2 us", "rate_ll": "1 MB/s", "reach": 0.5, "pair_peer": "3 us"}
)


def test_a_ring_all_reduce_by_hand() -> None:
    # 4 GPUs, 400 MB, 100 GB/s: 6 hops of 100 MB and the own shard; half of the bandwidth is reached.
    # launch 10 + 5 us; 6 * (0.5 + 1) us; 700 MB / 50 GB/s = 14 ms
    shape = Shape(4, 1, 100e9, 0.5e-6, 50e9, 3e-6)
    added = startup(Costs(PLAIN, WIRE), "all_reduce", "ring", shape, 400e6)
    # On the wire are 600 MB at half the bandwidth, 12 ms; the own shard crosses no link: 2 ms are waited.
    assert (added.launch, added.step) == (approx(15e-6), approx(1e-6 + 2e-3 / 6))
    assert added.wire == approx(1 / 0.5)
    assert added.seconds == approx(15e-6 + 9e-6 + 14e-3)
    assert added.protocol == "Simple"


def test_a_ring_over_two_domains_crosses_twice_for_each_time_round() -> None:
    # 2 x 2 GPUs: of 6 hops 4 cross, at 3 + 1 + 2 us; the other 2 at 0.5 + 1 us.
    # The two cards of a domain carry 6 * 1 MB, half of 10 GB/s reached each: 6 MB / 10 GB/s = 600 us
    shape = Shape(4, 2, 1000e9, 0.5e-6, 10e9, 3e-6)
    parts, _ = estimate(Costs(PLAIN, WIRE), "all_reduce", "ring", shape, 4e6)
    assert parts.latency == approx(4 * 6e-6 + 2 * 1.5e-6)
    assert parts.wire == approx(600e-6)
    assert parts.port == approx(300e-6)


def test_in_switch_reduction_carries_the_vector_and_its_part_of_the_sums() -> None:
    # 8 GPUs, 800 MB at 450 GB/s: 900 MB through each port; half is reached. 8 heads of 2 us.
    parts, _ = estimate(Costs(PLAIN, WIRE), "all_reduce", "in_switch", SERVER, 800e6)
    assert parts.port == approx(900e6 / 450e9)
    assert parts.wire == approx(900e6 / 225e9)
    assert parts.launch == approx(10e-6 + 16e-6)


def test_an_all_to_all_pays_for_each_further_peer() -> None:
    near, _ = estimate(Costs(PLAIN, WIRE), "all_to_all", "pairwise", replace(SERVER, members=4), 4.0)
    far, _ = estimate(Costs(PLAIN, WIRE), "all_to_all", "pairwise", replace(SERVER, domains=2), 8.0)
    assert near.launch == approx(8e-6 + 2e-6)
    # 3 others in the domain, 4 outside of it
    assert far.launch == approx(8e-6 + 2 * 1e-6 + 3 * 3e-6)


def test_without_a_summing_switch_nobody_reduces_in_it() -> None:
    for shape in (replace(SERVER, in_switch=0), replace(SERVER, members=2)):
        assert choose(costs_of(), "all_reduce", shape, 1e10) != "in_switch"
    assert choose(costs_of(), "all_reduce", SERVER, 1e10) == "in_switch"
    assert choose(costs_of(), "all_reduce", SERVER, 1e10, among=["ring"]) == "ring"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_small_messages_go_by_flags_and_large_ones_by_chunks(architecture: str) -> None:
    for kind, name in (("all_gather", "ring"), ("all_to_all", "pairwise")):
        assert startup(costs_of(architecture), kind, name, SERVER, 256).protocol == "LL"
        assert startup(costs_of(architecture), kind, name, SERVER, 1e9).protocol == "Simple"


def test_the_bus_bandwidth_of_many_servers_is_the_plateau_their_vendor_states() -> None:
    # NVIDIA/nccl issue #1649: 380 GB/s on many H100 servers with 400 Gb/s cards, trees over NVLS. The fit
    # does not see it: nothing it sees has more than two servers.
    shape = replace(SERVER, members=256, domains=32)
    size = 2.0**34
    parts, _ = estimate(costs_of(), "all_reduce", "in_switch", shape, size)
    assert 2 * 255 / 256 * size / parts.seconds == approx(380e9, rel=0.1)


def test_an_all_to_all_is_many_times_slower_when_it_leaves_the_rack() -> None:
    inside, _ = estimate(costs_of("blackwell"), "all_to_all", "pairwise", RACK, 2.0**33)
    outside, _ = estimate(
        costs_of("blackwell"), "all_to_all", "pairwise", replace(RACK, members=128, domains=2), 2.0**33
    )
    assert outside.seconds > 5 * inside.seconds


def test_a_member_has_its_share_of_the_cards_and_no_more_than_its_bus() -> None:
    server = read_catalogue("servers")["dgx_h100"]
    assert isinstance(server, Server)
    few = server.model_copy(update={"nics": 2})
    many = server.model_copy(update={"nics": 16})
    assert shape_of(server, "hopper", 16, 2).network_bandwidth == approx(50e9)
    assert shape_of(few, "hopper", 16, 2).network_bandwidth == approx(12.5e9)
    assert shape_of(many, "hopper", 16, 2, 5e-6) == replace(
        SERVER, members=16, domains=2, network_bandwidth=server.pcie_bandwidth, network_latency=5e-6
    )
    assert not shape_of(server, "ampere", 8, 1).in_switch


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(ClustersimError, match=r'"rung" is not known.*did you mean "ring"'):
        startup(costs_of(), "all_gather", "rung", SERVER, 1.0)
    with pytest.raises(ClustersimError, match="there are ampere, hopper, blackwell"):
        library_costs("volta")
    with pytest.raises(ClustersimError, match="infiniband"):
        fabric_costs("ampere")
    with pytest.raises(ClustersimError, match="vllm_hopper"):
        kernel_costs("vlm", "hopper")
