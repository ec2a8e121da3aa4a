"""Bounds by recomputing over the recorded graph, and what they are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployments import EXAMPLES, deployments
from hypothesis import given, settings
from scenarios import parallel, rail_tree, single_server, tiny, trace_of

from clustersim.analysis.recomputing import Graph
from clustersim.analysis.what_if import CHANGES, Bound, bounds
from clustersim.errors import ResultError
from clustersim.spec.workload import Fault, Gating
from clustersim.study.bound_checks import CHECKS, TOLERANCE, check_bounds
from clustersim.study.run import load, run_scenario
from clustersim.trace.record import Trace

#: The longest that a rank which has served all its experts waits for its own sends to leave.
_SENDS = 1e-3


def bound(trace: Trace, name: str) -> Bound:
    return next(one for one in bounds(trace) if one.name == name)


def latencies(trace: Trace) -> np.ndarray:
    steps = trace.tables["steps"]
    found: np.ndarray = steps["end"] - steps["start"]
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_graph_explains_every_time_of_the_seed_examples(name: str) -> None:
    trace = run_scenario(load(f"workloads/{name}.toml", EXAMPLES[name])).trace.raw
    graph = Graph(trace)
    assert graph.unexplained() == 0.0
    assert np.array_equal(graph.ends()[1], graph.spans.end)
    # Everything twice as long is a run twice as long: nothing is left that the graph does not move.
    spans = graph.spans
    doubled = graph.steps(*graph.ends(spans.end - spans.met))
    assert np.allclose(doubled, 2 * latencies(trace), rtol=1e-9)
    assert all(one.seconds <= latencies(trace).mean() * (1 + 1e-12) for one in bounds(trace))


@settings(max_examples=40, deadline=None)
@given(deployments())
def test_with_nothing_changed_all_times_are_the_recorded_ones(scenario: Any) -> None:
    trace = trace_of(scenario)
    graph = Graph(trace)
    for change in (None, np.zeros(len(graph.spans.span))):
        met, end = graph.ends(change)
        assert np.array_equal(met, graph.spans.met)
        assert np.array_equal(end, graph.spans.end)
    assert np.allclose(graph.steps(met, end), latencies(trace), rtol=1e-12)
    served = scenario.deployment.experts
    if served.service == "grouped" or served.start == "all_arrived":
        assert graph.unexplained() < 1e-12
    else:
        assert graph.unexplained() < _SENDS


@settings(max_examples=25, deadline=None)
@given(deployments())
def test_taking_away_makes_nothing_slower_but_an_even_load_may(scenario: Any) -> None:
    # An even load reads the weights of every expert, and gives a slow GPU as much as the others.
    trace = trace_of(scenario)
    for one in bounds(trace):
        if one.name != "no_imbalance":
            assert one.seconds <= latencies(trace).mean() * (1 + 1e-9)
        assert one.faster <= 1
        assert one.words.startswith("at most" if one.faster >= 5e-4 else "no faster")


def test_what_takes_longer_makes_later_whoever_waits_for_it_and_nobody_else() -> None:
    # Rank 1's attention in layer 0 takes 1 s longer: the dispatch makes rank 0 wait for all of it.
    trace = trace_of(tiny(gating={"skew": "even"}))
    graph = Graph(trace)
    spans = graph.spans
    change = np.zeros(len(spans.span))
    slow = (spans.rank == 1) & (spans.layer == 0) & (spans.operator == spans.words.index("attention"))
    change[np.flatnonzero(slow)[0]] = 1.0
    _, end = graph.ends(change)
    later = end - spans.end
    before = (spans.rank == 0) & (spans.operator == spans.words.index("attention")) & (spans.layer == 0)
    assert np.allclose(later[before], 0.0)
    assert np.allclose(later[spans.layer == 1], 1.0)


def test_without_its_slow_gpu_a_run_takes_just_what_its_bound_says() -> None:
    # No exchange of the other shares links with anything, so that nothing else changes.
    fault = Fault(kind="slow_gpu", gpu=1, factor=3.0)
    slow = tiny(workload={"decode_steps": 3}).model_copy(update={"faults": (fault,)})
    without = latencies(trace_of(slow.model_copy(update={"faults": ()})))
    assert np.allclose(bound(trace_of(slow), "no_straggler").steps, without, rtol=1e-9)


def test_without_launches_a_run_takes_just_what_its_bound_says() -> None:
    # Nothing was measured of this GPU: a kernel costs its launch and its roofline, and with all bandwidth
    # of the machine in the exchanges nothing is left of them but launch and bytes.
    def at(launch: float) -> Trace:
        return trace_of(tiny(single_server(2, launch=launch), network={"startup": "none"}))

    assert np.allclose(bound(at(5e-6), "no_launch").steps, latencies(at(0.0)), rtol=1e-6)


@pytest.mark.parametrize(
    "skew", [{"skew": "zipf", "exponent": 1.0}, {"skew": "hot", "hot_experts": 1, "hot_share": 0.49}]
)
def test_an_even_run_is_not_faster_than_the_bound_of_a_skewed_one(skew: dict[str, Any]) -> None:
    skewed = tiny(workload={"sequences": 64, "decode_steps": 3}, gating=skew)
    even = skewed.model_copy(update={"gating": Gating(skew="even")})
    found = bound(trace_of(skewed), "no_imbalance")
    took = latencies(trace_of(even)).mean()
    assert found.seconds <= latencies(trace_of(skewed)).mean()
    assert took >= found.seconds * (1 - TOLERANCE)


@pytest.mark.parametrize(
    ("name", "fast"),
    [("infinite_nvlink", {"nvlink": 1e13}), ("infinite_network", {"nic": 1e12, "pcie": 4e12})],
)
def test_a_run_on_faster_links_is_not_faster_than_its_bound(name: str, fast: dict[str, float]) -> None:
    def at(**box: Any) -> Trace:
        return trace_of(
            tiny(rail_tree(2, 2, **box), deployment=parallel(tp=2, dp=2), network={"startup": "none"})
        )

    found = bound(at(), name)
    assert found.faster > 0.01
    assert latencies(at(**fast)).mean() >= found.seconds * (1 - TOLERANCE)


@pytest.mark.parametrize("factor", [1.0, 4.0, 50.0])
@pytest.mark.parametrize("since", ["0 s", "540 us"])
def test_without_startup_a_run_with_a_slow_link_is_not_faster_than_its_bound(
    factor: float, since: str
) -> None:
    # Small messages are sent with a flag for every word: without startup that half is not sent either.
    fault = Fault(kind="slow_link", link="server0/nic3", factor=factor, start=since)
    scenario = load("workloads/large_ep.toml", ["workload.decode_steps=1", "model.layers=2"])
    slow = scenario.model_copy(update={"faults": (fault,)})
    with_it, without, _, tolerance = CHECKS["no_launch"]
    changed = without(with_it(slow))
    assert changed is not None
    found = bound(run_scenario(slow).trace.raw, "no_launch")
    assert found.faster > 0.01
    assert latencies(run_scenario(changed).trace.raw).mean() >= found.seconds * (1 - tolerance)


def test_bounds_are_of_steps_that_were_recorded_whole() -> None:
    def at(**trace: Any) -> Trace:
        return trace_of(tiny(workload={"decode_steps": 6}, trace={"level": "spans", **trace}))

    part, whole = at(steps=[2, 4]), at()
    assert len(np.unique(part.tables["spans"]["token_batch"])) > 2
    for mine, other in zip(bounds(part), bounds(whole), strict=True):
        assert np.allclose(mine.steps, other.steps[2:4], rtol=1e-9)


def test_perfect_overlap_leaves_the_longer_of_computing_and_exchanging() -> None:
    # One rank after the other does the same, so that a step is its computing and its exchanges.
    trace = trace_of(tiny(gating={"skew": "even"}))
    spans = Graph(trace).spans
    mine = spans.rank == 0
    took = spans.end - spans.met
    longer = max(took[mine & spans.is_exchange].sum(), took[mine & ~spans.is_exchange].sum())
    assert np.isclose(bound(trace, "perfect_overlap").seconds, longer, rtol=1e-6)


def test_an_older_trace_gives_bounds_that_are_looser() -> None:
    trace = trace_of(tiny(single_server(4), deployment=parallel(tp=2, dp=2)))
    tables = {name: dict(table) for name, table in trace.tables.items()}
    for table, column in (("spans", "group"), ("spans", "priced"), ("prices", "launch")):
        del tables[table][column]
    del tables["span_links"]
    older = {one.name: one for one in bounds(Trace(tables, trace.facts))}
    assert older.keys() == CHANGES.keys()
    for one in bounds(trace):
        if one.name.startswith("infinite"):
            assert older[one.name].seconds <= one.seconds * (1 + 1e-9)


def test_a_window_within_passes_is_refused() -> None:
    trace = trace_of(tiny())
    cut = {
        name: column[3:] if isinstance(column, np.ndarray) else type(column)(column.codes[3:], column.words)
        for name, column in trace.tables["spans"].items()
    }
    with pytest.raises(ResultError, match="whole passes"):
        bounds(Trace({**trace.tables, "spans": cut}, trace.facts))


def test_the_checks_hold_for_the_smallest_seed_example(tmp_path: Path) -> None:
    found = check_bounds(
        Path("workloads/baseline_tp8_pp2.toml"), ["workload.decode_steps=1", "model.layers=4"]
    )
    assert [one["name"] for one in found] == list(CHECKS)
    assert all(one["holds"] for one in found), found
    assert set(CHECKS) <= set(CHANGES)
