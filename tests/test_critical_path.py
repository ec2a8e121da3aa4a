"""Critical paths: parts that add up to the latency, each with the cause that it has."""

from __future__ import annotations

import copy
from itertools import pairwise
from math import fsum, isclose
from typing import Any

import numpy as np
import pytest
import synthetic
from deployments import EXAMPLES, deployments
from hypothesis import given, settings
from scenarios import parallel, rail_tree, single_server, tiny, trace_of

from clustersim.analysis.critical_path import CAUSES, Path, Paths, shares
from clustersim.analysis.path_groups import GROUPS, by_words, in_order
from clustersim.analysis.path_words import Facts
from clustersim.analysis.span_blocks import spans_of
from clustersim.errors import ClustersimError, NotRecordedError, ResultError
from clustersim.spec.workload import Fault
from clustersim.study.explaining import NAMED, path_of
from clustersim.study.run import load, run_scenario
from clustersim.trace.record import Trace


def all_paths(trace: Trace) -> list[Path]:
    paths = Paths(trace)
    steps, requests = trace.tables["steps"]["step"], trace.tables["requests"]["request"]
    return [paths.step(int(s)) for s in steps] + [paths.request(int(r)) for r in requests]


def assert_adds_up(path: Path) -> None:
    assert abs(fsum(part.seconds for part in path.parts) - path.latency) < 1e-9
    assert abs(fsum(path.seconds().values()) - path.latency) < 1e-9
    assert all(part.seconds > 0 for part in path.parts)
    assert {part.cause for part in path.parts} <= set(CAUSES)
    assert all(part.words for part in path.parts)
    at = path.start
    for part in path.parts:
        assert abs(part.start - at) < 1e-9
        at = part.start + part.seconds


@pytest.mark.parametrize("name", EXAMPLES)
def test_parts_add_up_to_every_step_and_request_of_the_seed_examples(name: str) -> None:
    trace = run_scenario(load(f"workloads/{name}.toml", EXAMPLES[name])).trace.raw
    paths = Paths(trace)
    for step in trace.tables["steps"]["step"].tolist():
        assert_adds_up(paths.step(step))
    for request in trace.tables["requests"]["request"][
        :: max(1, len(trace.tables["requests"]["request"]) // 8)
    ]:
        assert_adds_up(paths.request(int(request)))


@settings(max_examples=40, deadline=None)
@given(deployments())
def test_parts_add_up_in_any_deployment(scenario: Any) -> None:
    for path in all_paths(trace_of(scenario)):
        assert_adds_up(path)


@settings(max_examples=25, deadline=None)
@given(deployments())
def test_what_stands_on_a_path_has_ended_when_the_next_goes_on(scenario: Any) -> None:
    # Else two of its parts would tell of the same time, and their sum would be right by chance.
    trace = trace_of(scenario)
    spans = spans_of(trace)
    rows = np.flatnonzero(spans.after >= 0)
    before = spans.rows_of(spans.after[rows])
    assert (before >= 0).all()
    assert (spans.end[before] <= spans.met[rows] + 1e-12).all()
    if scenario.deployment.experts.service == "grouped":
        assert np.allclose(spans.end[before], spans.met[rows], rtol=0, atol=1e-12)


def test_what_a_slow_gpu_takes_longer_is_waiting_for_a_straggler() -> None:
    # GPU 1 takes three times as long: of what it computes on the path, two thirds.
    slow = tiny(faults=[{"kind": "slow_gpu", "gpu": 1, "factor": 3.0}])
    path = Paths(trace_of(slow)).step(0)
    by = path.seconds()
    assert isclose(by["slow_gpu"], 2 * (by["compute"] + by.get("imbalance", 0.0)), rel_tol=1e-9)
    told = [part for part in path.parts if part.cause == "slow_gpu"]
    assert {part.rank for part in told} == {1}
    assert all(
        "straggler rank 1" in part.words and "3.00 x as long as priced (slow_gpu)" in part.words
        for part in told
    )


def test_nothing_is_a_straggler_where_all_ranks_are_alike() -> None:
    by = Paths(trace_of(tiny(gating={"skew": "even"}))).step(0).seconds()
    assert not {"imbalance", "slow_gpu", "queue", "bubble"} & set(by)


def test_a_hot_expert_makes_others_wait_and_its_tokens_are_named() -> None:
    scenario = tiny(workload={"sequences": 400}, gating={"skew": "hot", "hot_experts": 1, "hot_share": 0.49})
    path = Paths(trace_of(scenario)).step(0)
    told = [part for part in path.parts if part.cause == "imbalance" and part.operator == "expert_gemm_1"]
    assert told
    assert all("tokens for its experts" in part.words and "x the mean" in part.words for part in told)


def test_a_pipeline_is_empty_for_its_known_share_of_a_prefill() -> None:
    # S stages and M equal micro-batches: S - 1 of S + M - 1 slots are bubbles, here 1 of 3.
    scenario = tiny(
        single_server(2, nvlink=1e16),
        deployment=parallel(pp=2),
        model={"vocab": 1},
        workload={"phase": "prefill", "microbatches": 2, "sequences": 2, "prompt_tokens": 256},
    )
    path = Paths(trace_of(scenario)).step(0)
    assert abs(path.seconds()["bubble"] / path.latency - 1 / 3) < 0.02
    assert isclose(fsum(path.in_bubbles().values()), path.seconds()["bubble"], rel_tol=1e-9)


def test_experts_served_one_by_one_stand_in_a_queue_but_for_the_last() -> None:
    scenario = tiny(deployment=parallel(dp=2, experts={"service": "by_expert"}), gating={"skew": "even"})
    path = Paths(trace_of(scenario)).step(0)
    # Two experts on a rank, alike: half of what they compute is queue, half is not.
    for operator in ("expert_gemm_1", "expert_gemm_2"):
        parts = [part for part in path.parts if part.operator == operator]
        queued = sum(part.seconds for part in parts if part.cause == "queue")
        assert isclose(queued, sum(part.seconds for part in parts) / 2, rel_tol=1e-9)
    assert any("behind expert" in part.words for part in path.parts if part.cause == "queue")


@pytest.mark.parametrize("order", ["arrival", "longest_first", "as_listed"])
@pytest.mark.parametrize("start", ["all_arrived", "expert_complete"])
def test_behind_which_expert_others_stand_follows_from_the_order_of_service(order: str, start: str) -> None:
    # A hot expert on rank 0, the last of four there: others of its rank stand behind it where the longest
    # queue is served first, and it behind them elsewhere.
    scenario = tiny(
        workload={"sequences": 400},
        model={"experts": 8},
        deployment=parallel(dp=2, experts={"service": "by_expert", "order": order, "start": start}),
        gating={"skew": "hot", "hot_experts": 1, "hot_share": 0.4},
    )
    trace = trace_of(scenario)
    path = Paths(trace).step(0)
    table = trace.tables["experts"]
    rank = next(part.rank for part in path.parts if part.cause == "queue" and part.layer == 0)
    here = np.flatnonzero((table["layer"] == 0) & (table["rank"] == rank))
    turns = here[np.argsort(table["served"][here])]
    told = list(dict.fromkeys(p.words for p in path.parts if p.cause == "queue" and p.layer == 0))
    assert told == [
        f"queue of rank {rank} behind expert {table['expert'][one]} and its {table['tokens'][one]:,} tokens"
        for one in turns[:-1]
    ]
    # What of their service is no imbalance is queue; the last one's is none.
    last = float(table["served"][turns[-1]])
    service = [part for part in path.parts if part.layer == 0 and part.operator.startswith("expert_")]
    for part in service:
        assert part.cause in (
            ("queue", "imbalance") if part.start < last - 1e-12 else ("compute", "imbalance")
        )
    assert any(line.words.startswith(f"queue of rank {rank}") for line in by_words(path))


def test_an_exchange_names_its_link_and_how_much_of_it_is_its_own() -> None:
    path = Paths(trace_of(tiny())).step(0)
    told = [part for part in path.parts if part.cause == "exchange"]
    assert told
    assert all(" on link " in part.words for part in told)


def test_launches_are_told_apart_where_the_trace_knows_them() -> None:
    # Without anything measured every kernel launches for 2 us.
    trace = trace_of(tiny(single_server(2, launch=2e-6)))
    path = Paths(trace).step(0)
    kernels = [part for part in path.parts if part.cause == "launch"]
    computing = {(part.operator, part.layer) for part in path.parts if part.cause in ("launch", "compute")}
    assert len(kernels) == len(computing)
    assert all(isclose(part.seconds, 2e-6, rel_tol=1e-6) for part in kernels)


@pytest.mark.parametrize("factor", [4.0, 50.0])
def test_a_slow_link_takes_longer_for_bytes_and_nothing_else(factor: float) -> None:
    scenario = load("workloads/large_ep.toml", ["workload.decode_steps=1", "model.layers=2"])
    fault = Fault(kind="slow_link", link="server0/nic3", factor=factor)
    slow = run_scenario(scenario.model_copy(update={"faults": (fault,)})).trace.raw
    nominal = Paths(run_scenario(scenario).trace.raw).step(0).seconds()
    path = Paths(slow).step(0)
    assert nominal["startup"] > nominal["exchange"] > 0
    # What exchanges take beside the bytes stays what it is, but for what other links had more time for.
    assert isclose(path.seconds()["startup"], nominal["startup"], rel_tol=0.05)
    rows, links = slow.tables["span_links"], slow.tables["links"]
    hurt = np.isin(rows["link"], slow.tables["outages"]["link"])
    each = rows["all"][hurt].max() / (links["bandwidth"][rows["link"][hurt][0]] / factor)
    assert isclose(path.seconds()["exchange"], 4 * each, rel_tol=1e-6)


def test_bytes_on_a_link_that_was_slow_for_a_while_are_told_by_its_mean_capacity() -> None:
    trace = trace_of(tiny(rail_tree(2, 1), gating={"skew": "even"}))
    spans = spans_of(trace)
    row = int(np.flatnonzero(spans.is_exchange)[0])
    link = int(Facts(trace, spans).narrowest(np.array([row]))[0])
    met, end = float(spans.met[row]), float(spans.end[row])
    table = trace.tables["outages"]
    values = {name: np.zeros(1, column.dtype) for name, column in table.items()}
    nominal = float(trace.tables["links"]["bandwidth"][link])
    for rate, least in ((nominal / 2, 2.0), (0.0, np.inf)):
        told = {"link": link, "start": met, "end": (met + end) / 2, "bandwidth": rate}
        outages = values | {name: np.array([x], table[name].dtype) for name, x in told.items()}
        facts = Facts(Trace({**trace.tables, "outages": outages}, trace.facts), spans)
        well = Facts(trace, spans).link_seconds(np.array([row]))[0]
        half = (nominal + rate) / 2
        assert isclose(facts.link_seconds(np.array([row]))[0], well * nominal / half, rel_tol=1e-9)
        assert facts.link_seconds(np.array([row]), "most")[0] == well
        assert isclose(facts.link_seconds(np.array([row]), "least")[0], well * least, rel_tol=1e-9)


def test_a_request_begins_with_what_it_waited_before_its_first_step() -> None:
    trace = trace_of(tiny())
    columns = {name: np.array(column) for name, column in trace.tables["requests"].items()}
    columns["arrival"] = columns["arrival"] - 0.5
    earlier = Trace({**trace.tables, "requests": columns}, trace.facts)
    path = Paths(earlier).request(0)
    assert path.parts[0].cause == "admission"
    assert isclose(path.parts[0].seconds, 0.5)
    assert_adds_up(path)


def test_shares_of_the_mean_step_add_up_to_it() -> None:
    trace = trace_of(tiny(workload={"decode_steps": 5}, gating={"skew": "zipf", "exponent": 1.0}))
    found = shares(trace)
    assert found is not None
    steps = trace.tables["steps"]
    latency = steps["end"] - steps["start"]
    assert isclose(found["mean"]["seconds"], latency.mean(), rel_tol=1e-9)
    assert isclose(fsum(found["mean"]["by"].values()), latency.mean(), rel_tol=1e-9)
    assert isclose(found["p99"]["seconds"], latency[found["p99"]["step"]], rel_tol=1e-9)
    assert shares(trace, "prefill") is None


def test_a_path_in_few_lines_is_as_long_as_in_many() -> None:
    path = Paths(trace_of(tiny(deployment=parallel(pp=2), topology=single_server(2)))).step(0)
    for lines in (*(group(path) for group in GROUPS.values()), in_order(path, 100), in_order(path, 1)):
        assert abs(fsum(line.seconds for line in lines) - path.latency) < 1e-9
        assert sum(line.parts for line in lines) == len(path.parts)
    waits = by_words(path)
    waiting = set(path.seconds()) - {"compute", "launch"}
    assert {cause for line in waits for cause in line.causes} == waiting
    assert all(one.seconds >= other.seconds for one, other in pairwise(waits))


def test_steps_are_found_by_number_by_name_and_requests_by_theirs() -> None:
    trace = trace_of(tiny(workload={"decode_steps": 4}))
    steps = trace.tables["steps"]
    latency = steps["end"] - steps["start"]
    assert path_of(trace, "2") == path_of(trace, "step:2") == path_of(trace, "step 2")
    assert path_of(trace, "request:1").what == "request"
    assert path_of(trace, "slowest").latency == latency.max()
    assert path_of(trace, "fastest").latency == latency.min()
    for name in NAMED:
        assert_adds_up(path_of(trace, name))


@pytest.mark.parametrize(
    ("what", "said"),
    [("slowst", 'did you mean "slowest"'), ("99", "there is no step 99"), ("request:99", "requests: 0 to 3")],
)
def test_what_is_not_there_is_answered_with_what_is(what: str, said: str) -> None:
    with pytest.raises(ClustersimError, match=said):
        path_of(trace_of(tiny()), what)


def test_a_straggler_is_one_line_with_the_range_of_its_loads() -> None:
    scenario = tiny(workload={"sequences": 200, "decode_steps": 6}, gating={"skew": "zipf", "exponent": 1.0})
    path = Paths(trace_of(scenario)).request(0)
    parts = [p for p in path.parts if p.cause == "imbalance" and "tokens for its experts" in p.words]
    lines = [one for one in by_words(path) if "tokens for its experts" in one.words]
    assert len(lines) == len({part.rank for part in parts}) < len({part.words for part in parts})
    for line in lines:
        who = line.words.split(":")[0]
        mine = [part for part in parts if part.words.startswith(f"{who}:")]
        loads = [int(part.about.figures[0].value) for part in mine]
        assert f"{who}: {min(loads):,} to {max(loads):,} tokens" in line.words
        assert isclose(line.seconds, fsum(part.seconds for part in mine), rel_tol=1e-9)


def partly(**trace: Any) -> Trace:
    """Six steps of two micro-batches in a pipeline."""
    return trace_of(
        tiny(
            single_server(2),
            deployment=parallel(pp=2),
            workload={"sequences": 8, "decode_steps": 6, "microbatches": 2},
            trace={"level": "spans", **trace},
        )
    )


def test_a_step_that_was_recorded_in_part_has_no_path() -> None:
    part, whole = partly(steps=[2, 4]), partly()
    paths = Paths(part)
    known = paths.recorded_steps()
    assert {2, 3} <= set(known)
    batches = np.unique(part.tables["spans"]["token_batch"])
    touched = set(part.tables["token_batches"]["step"][batches].tolist()) - set(known)
    assert touched
    for step in touched:
        with pytest.raises(NotRecordedError, match="only a part of its spans"):
            paths.step(step)
    for step in known:
        assert paths.step(step) == Paths(whole).step(step)
    found = paths.shares()
    assert found is not None
    assert found["steps"] == len(known)
    last = int(part.tables["steps"]["step"].max())
    with pytest.raises(NotRecordedError, match="none of its spans"):
        paths.step(last)


def test_a_window_holds_the_steps_that_lie_in_it_and_no_others() -> None:
    whole = partly()
    steps = whole.tables["steps"]
    since, until = float(steps["start"][1]), float(steps["end"][3])
    part = partly(window=[f"{since!r} s", f"{until!r} s"])
    inside = steps["step"][(steps["start"] >= since) & (steps["end"] <= until)]
    assert Paths(part).recorded_steps() == inside.tolist()


@pytest.mark.parametrize("after", ["nowhere", "before all", "itself", "later"])
def test_a_span_that_nothing_could_have_released_is_a_damaged_trace(after: str) -> None:
    trace = trace_of(tiny())
    table = trace.tables["spans"]
    column = table["after"].copy()
    row = len(column) // 2
    column[row] = {"nowhere": 10**12, "before all": -2, "itself": row, "later": len(column) - 1}[after]
    damaged = Trace({**trace.tables, "spans": {**table, "after": column}}, trace.facts)
    with pytest.raises(ResultError, match=f"damaged: span {row} was released by span {column[row]}"):
        Paths(damaged)


def test_a_result_without_spans_says_how_to_get_some() -> None:
    with pytest.raises(ResultError, match=r"trace\.level"):
        Paths(synthetic.tiny(spans=False)).step(0)


def test_an_older_trace_is_explained_without_what_it_lacks() -> None:
    trace = trace_of(tiny(gating={"skew": "zipf", "exponent": 1.0}))
    tables = {name: dict(table) for name, table in trace.tables.items()}
    for table, column in (("spans", "group"), ("spans", "priced"), ("prices", "launch")):
        del tables[table][column]
    del tables["span_links"]
    older = Trace(tables, copy.copy(trace.facts))
    path = Paths(older).step(0)
    assert_adds_up(path)
    assert "launch" not in path.seconds()


def test_an_older_trace_still_tells_a_slow_gpu_from_an_overloaded_one() -> None:
    trace = trace_of(tiny(gating={"skew": "even"}, faults=[{"kind": "slow_gpu", "gpu": 1, "factor": 3.0}]))
    spans = {name: column for name, column in trace.tables["spans"].items() if name != "priced"}
    older = Paths(Trace({**trace.tables, "spans": spans}, trace.facts)).step(0).seconds()
    newer = Paths(trace).step(0).seconds()
    assert isclose(older["slow_gpu"], newer["slow_gpu"], rel_tol=1e-6)
    assert "imbalance" not in older
