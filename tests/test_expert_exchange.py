"""Expert exchanges: laws of the model, hand reckoning, and what the fit foretells."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isclose
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustersim.physics.expert_exchange import (
    LIBRARY,
    ROWS,
    Tokens,
    choose,
    expected_targets,
    fixed_seconds,
    load_of,
    port_seconds,
    row_bytes,
    rows_per_token,
    seconds,
    sms_for,
    startup,
    transfer_seconds,
)
from clustersim.physics.startup import Shape
from clustersim.seeds import stream
from clustersim.spec.costs import read_costs
from clustersim.spec.expert_costs import ExpertKernel
from clustersim.study.expert_checks import influences, scale_checks
from clustersim.study.expert_fit import KERNELS, fit_cases
from clustersim.study.expert_rows import all_cases
from clustersim.study.fit import write
from clustersim.study.measured import FOLDER

KERNEL = read_costs("expert_exchange", ExpertKernel)
#: Every library's dispatch and combine with the way it sends.
PAIRS = [
    (way, f"{library}_{kind}")
    for way, library in LIBRARY.items()
    for kind in ("dispatch", "combine", "alltoall")
    if f"{library}_{kind}" in KERNEL
]

servers = st.sampled_from([1, 2, 4, 8, 16])
counts = st.integers(1, 16384)


def h100(domains: int) -> Shape:
    return Shape(8 * domains, domains, 450e9, 0.6e-6, 50e9, 2.68e-6)


def dispatch(count: float, way: str = "low_latency", top_k: int = 8) -> Tokens:
    sms = {"low_latency": 132, "hierarchical": 20}.get(way, 1)
    return Tokens(count, 7168.0, row_bytes(7168, "fp8"), top_k, 256, sms)


@pytest.mark.parametrize(("groups", "top_k", "experts"), [(8, 8, 256), (2, 8, 256), (32, 6, 64), (4, 2, 8)])
def test_expected_targets_are_the_mean_of_sampled_gatings(groups: int, top_k: int, experts: int) -> None:
    rng = stream(7, "expert_exchange", groups, top_k, experts)
    keys = rng.random((20_000, experts))
    chosen = np.argpartition(keys, top_k, axis=1)[:, :top_k]
    group = np.sort(chosen // (experts // groups), axis=1)
    met = 1 + (np.diff(group, axis=1) > 0).sum(axis=1)
    error = met.std() / np.sqrt(len(met))
    assert abs(expected_targets(groups, top_k, experts) - met.mean()) <= 4 * error + 1e-12


def test_expected_targets_by_hand() -> None:
    # Two of four experts, two groups of two: both in the same group in 2 of 6 pairs, so 4/6 * 2 + 2/6 * 1.
    assert isclose(expected_targets(2, 2, 4), 5 / 3)
    assert expected_targets(1, 8, 256) == 1.0
    assert expected_targets(8, 256, 256) == 8.0


@given(groups=st.integers(1, 64), top_k=st.integers(1, 22))
def test_a_token_meets_at_least_one_group_and_no_more_than_it_has_experts(groups: int, top_k: int) -> None:
    met = expected_targets(groups, top_k, 64 * 22)
    assert 1.0 - 1e-12 <= met <= min(groups, top_k) + 1e-12


@pytest.mark.parametrize("way", ROWS)
@given(domains=servers, top_k=st.integers(1, 16))
def test_no_way_sends_more_rows_than_copies_and_none_over_a_network_that_is_not_there(
    way: str, domains: int, top_k: int
) -> None:
    rows = rows_per_token(way, 8 * domains, 8, top_k, 256)
    assert 0 <= rows.copies <= top_k
    # A relay sends on what it got: over NVLink no copy travels twice.
    assert 0 <= rows.nvlink <= top_k
    assert 0 <= rows.nic <= top_k
    if domains == 1 and way != "low_latency_by_nic":
        assert rows.nic == rows.abroad == 0


@given(domains=st.sampled_from([2, 4, 8]), top_k=st.integers(2, 16))
def test_a_token_crosses_the_network_less_often_if_servers_hand_it_on(domains: int, top_k: int) -> None:
    once = rows_per_token("hierarchical", 8 * domains, 8, top_k, 256)
    assert once.nic < rows_per_token("low_latency", 8 * domains, 8, top_k, 256).nic
    assert once.nic <= domains - 1


def test_few_experts_leave_most_of_the_gpu_idle() -> None:
    # One group of warps per expert: 8 SMs for 8 experts; 288 on 132 SMs: 3 per SM, on 96 SMs.
    assert [sms_for(experts, 132) for experts in (8, 128, 256, 288)] == [8, 128, 128, 96]


@pytest.mark.parametrize(("way", "name"), PAIRS)
@given(count=counts, domains=servers)
def test_no_exchange_beats_the_bandwidth_of_its_ports(way: str, name: str, count: int, domains: int) -> None:
    shape, tokens = h100(domains), dispatch(count, way)
    load = load_of(way, shape, tokens)
    nvlink = count * load.nvlink_rows * tokens.row / shape.nvlink_bandwidth
    nic = count * load.nic_rows * tokens.row / shape.network_bandwidth
    assert transfer_seconds(KERNEL[name], load) >= max(nvlink, nic) * (1 - 1e-9)


@pytest.mark.parametrize(("way", "name"), PAIRS)
@given(count=counts, more=counts, domains=servers)
def test_more_tokens_take_no_less_time(way: str, name: str, count: int, more: int, domains: int) -> None:
    shape = h100(domains)
    less = startup(KERNEL[name], way, shape, dispatch(count, way)).seconds
    assert startup(KERNEL[name], way, shape, dispatch(count + more, way)).seconds >= less


@pytest.mark.parametrize(("way", "name"), PAIRS)
def test_with_costs_at_zero_twice_the_bandwidth_halves_the_time(way: str, name: str) -> None:
    bare, shape, tokens = ExpertKernel(), h100(4), dispatch(128, way)
    fast = replace(shape, nvlink_bandwidth=900e9, network_bandwidth=100e9)
    slow_load, fast_load = load_of(way, shape, tokens), load_of(way, fast, tokens)
    assert isclose(seconds(bare, slow_load, 0.0), 2 * seconds(bare, fast_load, 0.0))


def test_a_low_latency_dispatch_by_hand() -> None:
    # 100 tokens, 8 experts each, 16 ranks of two servers: 4 rows over the network, 7/2 over NVLink.
    # Row 7168 + 224 B. Network: 100 * 4 * 7392 / 50e9 = 59.1 us; NVLink: 5.7 us; so 59.1 us transfer.
    # Fixed: 10 us + 256 * 10 ns + 128 * 50 ns = 18.96 us. Path 2.68 us.
    kernel = ExpertKernel.model_validate({"launch": "10 us", "expert": "10 ns", "signal": "50 ns"})
    found = startup(kernel, "low_latency", h100(2), dispatch(100))
    assert isclose(found.launch, 18.96e-6)
    assert isclose(found.seconds, 18.96e-6 + 2.68e-6 + 59.136e-6, rel_tol=1e-6)
    # The simulation counts 7168 B per copy: the scales are wire.
    assert isclose(found.wire, 7392 / 7168, rel_tol=1e-6)


@pytest.mark.parametrize(("way", "name"), PAIRS)
@given(count=counts, domains=servers)
def test_launch_path_and_wire_bytes_make_the_closed_form(
    way: str, name: str, count: int, domains: int
) -> None:
    shape, tokens = h100(domains), dispatch(count, way)
    found = startup(KERNEL[name], way, shape, tokens)
    paths = [shape.network_latency if domains > 1 else shape.nvlink_latency]
    if way == "hierarchical" and domains > 1:
        paths.append(shape.nvlink_latency)
    simulated = found.launch + sum(paths) + len(paths) * found.step
    simulated += found.wire * port_seconds(way, shape, tokens)
    assert found.wire >= 1.0
    # Where wire would be below 1 the simulation may only be slower.
    assert simulated >= found.seconds * (1 - 1e-9)
    assert found.wire == 1.0 or isclose(simulated, found.seconds)


def test_small_batches_go_straight_and_large_ones_by_way_of_the_server() -> None:
    kernels = {way: KERNEL[f"{LIBRARY[way]}_dispatch"] for way in ("low_latency", "hierarchical")}
    taken = [choose(kernels, h100(8), {way: dispatch(count, way) for way in kernels}) for count in (16, 4096)]
    assert taken == ["low_latency", "hierarchical"]


def test_32_ranks_are_foretold_from_8_and_16_within_a_fifth() -> None:
    found = [check for check in scale_checks() if ": 32 ranks from 8 and 16" in check.name]
    assert [check.rows for check in found] == [54, 8]
    for check in found:
        assert check.median <= 0.05
        assert check.most <= 0.20


def test_64_ranks_are_foretold_from_8_to_32() -> None:
    for check in scale_checks():
        if ": 64 ranks from" in check.name:
            assert check.most <= 0.08, check


def test_no_file_moves_the_rest_by_more_than_the_rest_is_off() -> None:
    for one in influences():
        assert one.moved <= one.off or not one.touched, one


def test_flagged_rows_and_more_than_32_ranks_are_never_fitted() -> None:
    cases = all_cases()
    seen = [case for case in cases if case.fitted]
    assert max(case.members for case in seen) == 32
    assert not any(case.flagged for case in seen)
    assert {case.members for case in cases if case.flagged and case.file == "deepep_normal_h100"} == {64}
    assert fit_cases(cases) == fit_cases(seen)


def test_the_fit_written_anew_is_the_file_in_the_catalogue(tmp_path: Path) -> None:
    kept = (FOLDER.parent / "expert_exchange.toml").read_bytes()
    assert write("expert_exchange", tmp_path).read_bytes() == kept


def test_every_kernel_stands_in_the_catalogue_with_physical_shares() -> None:
    assert set(KERNEL) == set(KERNELS)
    for kernel in KERNEL.values():
        assert 0 < kernel.nvlink <= 1
        assert 0 < kernel.nic <= 1
        assert kernel.launch < 1e-3 < inf
    for way, name in PAIRS:
        assert fixed_seconds(KERNEL[name], load_of(way, h100(1), dispatch(1, way))) >= KERNEL[name].launch
