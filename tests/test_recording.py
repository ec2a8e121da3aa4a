"""What the engine writes down of every span: laws that hold for any deployment."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from scenarios import parallel, rail_tree, single_server, table, tiny, trace_of

from clustersim.analysis.summary import summarize
from clustersim.errors import StuckError
from clustersim.spec.scenario import Scenario
from clustersim.study.run import run_scenario
from clustersim.trace import files
from clustersim.trace.record import Trace

Columns = dict[str, np.ndarray]

#: TP, PP, DP, ETP of what is drawn, and the machine's servers and GPUs in each.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 1, 1, 1, 1, 2),
    (1, 2, 1, 1, 2, 1),
    (1, 1, 4, 1, 2, 2),
    (2, 1, 2, 1, 2, 2),
    (2, 1, 2, 2, 2, 2),
    (1, 2, 2, 1, 2, 2),
    (2, 2, 2, 1, 2, 4),
    (1, 4, 2, 1, 4, 2),
    (2, 2, 2, 2, 4, 2),
]
SERVICES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "each at once": {"service": "by_expert", "start": "expert_complete", "order": "arrival"},
    "longest first": {"service": "by_expert", "start": "expert_complete", "order": "longest_first"},
    "chunks": {"service": "by_expert", "start": "chunks", "chunk_tokens": 9, "order": "longest_first"},
    "patient": {"service": "by_expert", "start": "all_arrived", "order": "longest_first"},
}
FAULTS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "straggler": [{"kind": "slow_gpu", "gpu": "hottest", "factor": 3.0}],
    "spread": [{"kind": "spread_gpus", "spread": 0.2}],
    "throttled": [{"kind": "throttled_gpu", "gpu": 0, "factor": 2.0, "period": "20 us"}],
    "flapping link": [{"kind": "flapping_link", "link": "server0/nic0", "period": "20 us"}],
    "link down": [{"kind": "down_link", "link": "server0/nic0", "start": "30 us", "end": "300 us"}],
    "slow link": [{"kind": "slow_link", "link": "server0/nic0", "factor": 5.0}],
}
REBALANCES: dict[str, dict[str, Any]] = {
    "never": {},
    "stop": {"every": 2, "least_gain": 0.0, "transfer": "stop"},
    "background": {"every": 2, "least_gain": 0.0, "transfer": "background"},
}


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Small deployments of every kind under every kind of trouble."""
    tp, pp, dp, etp, servers, gpus = draw(st.sampled_from(SHAPES))
    box = {"latency": draw(st.sampled_from([0.0, 1e-6])), "launch": draw(st.sampled_from([0.0, 1e-6]))}
    machine = rail_tree(servers, gpus, **box) if servers > 1 else single_server(gpus, **box)
    # Ranks that share an expert gather all its tokens: its queue is there at once.
    service = SERVICES[draw(st.sampled_from(sorted(SERVICES) if etp == 1 else ["grouped"]))]
    faults = FAULTS[draw(st.sampled_from([name for name in FAULTS if servers > 1 or "link" not in name]))]
    rebalance = REBALANCES[draw(st.sampled_from(sorted(REBALANCES)))]
    policy = {"policy": "balanced", "rebalance": rebalance} if rebalance else {}
    algorithms = {"all_to_all": draw(st.sampled_from(["pairwise", "hierarchical"]))}
    phase = draw(st.sampled_from(["decode", "prefill", "both"]))
    batches = draw(st.sampled_from([1, 3]))
    workload = {
        "phase": phase,
        "sequences": 8 * dp,
        "decode_steps": 0 if phase == "prefill" else draw(st.sampled_from([1, 6])),
        "microbatches": draw(st.sampled_from([1, 2])),
        "batches": batches,
        "arrivals": draw(st.sampled_from(["together", "poisson"])) if batches > 1 else "together",
    }
    if workload["arrivals"] == "poisson":
        workload["interval"] = "100 us"
    return tiny(
        machine,
        model={"layers": 4, "experts": 8},
        deployment=parallel(tp, pp, dp, etp, experts={**service, **policy}, algorithms=algorithms),
        gating={"skew": "zipf", "motion": "rotating", "rotate_every": 2},
        workload=workload,
        faults=faults,
        network={"on_down": draw(st.sampled_from(["wait", "reroute"])), "reroute_after": "1 us"},
        trace={"level": "flows"},
        seed=draw(st.integers(0, 5)),
    )


def path(trace: Trace, step: int) -> tuple[list[tuple[float, float]], float]:
    """The parts of a step's critical path, the latest first, each (from, to) s; and what is left before
    the first span that nothing released, s."""
    spans, steps, passes = (table(trace, name) for name in ("spans", "steps", "token_batches"))
    begin = steps["start"][steps["step"] == step].item()
    row_of = {span: row for row, span in enumerate(spans["span"].tolist())}
    own = np.isin(spans["token_batch"], passes["token_batch"][passes["step"] == step])
    last = np.flatnonzero(own & (spans["stage"] == spans["stage"].max()))
    at = int(last[np.argmax(spans["end"][last])])
    parts: list[tuple[float, float]] = []
    while True:
        parts.append((max(spans["met"][at], begin), spans["end"][at]))
        if spans["met"][at] <= begin or spans["after"][at] < 0:
            return parts, max(spans["met"][at] - begin, 0.0)
        before = row_of[int(spans["after"][at])]
        if spans["end"][before] < spans["met"][at]:
            # What it had to wait for was under way meanwhile.
            parts.append((max(spans["end"][before], begin), spans["met"][at]))
            if spans["end"][before] <= begin:
                return parts, 0.0
        at = before


@settings(max_examples=40, deadline=None)
@given(scenario=scenarios())
def test_following_after_backwards_gives_parts_that_add_up_to_the_step(scenario: Scenario) -> None:
    trace = trace_of(scenario)
    steps, requests = table(trace, "steps"), table(trace, "requests")
    for step, start, end in zip(steps["step"], steps["start"], steps["end"], strict=True):
        parts, rest = path(trace, int(step))
        assert all(begin <= over for begin, over in parts)
        assert all(late[0] == early[1] for late, early in pairwise(parts))
        assert sum(over - begin for begin, over in parts) + rest == approx(end - start, abs=1e-9)
        assert parts[0][1] == end
        if rest:
            # Another batch that came meanwhile was served first: before its arrival nobody knew of it.
            assert (requests["arrival"] == start + rest).any() or (requests["arrival"] == parts[-1][0]).any()


@settings(max_examples=40, deadline=None)
@given(scenario=scenarios())
def test_what_released_a_span_ended_before_it_and_mostly_at_that_instant(scenario: Scenario) -> None:
    trace = trace_of(scenario)
    spans = table(trace, "spans")
    row_of = np.argsort(spans["span"])
    some = np.flatnonzero(spans["after"] >= 0)
    released = spans["end"][row_of[spans["after"][some]]]
    met = spans["met"][some]
    assert (spans["start"] <= spans["met"]).all() and (spans["met"] <= spans["end"]).all()
    assert (released <= met).all()
    gap = some[released < met]
    rebalance = scenario.deployment.experts.rebalance
    stopped = rebalance.every > 0 and rebalance.transfer == "stop"
    expected = {"embedding"} if stopped else set()
    if scenario.deployment.experts.service == "by_expert":
        expected |= {"expert_gemm_1", "combine"}
    assert set(spans["operator"][gap]) <= expected


@settings(max_examples=20, deadline=None)
@given(scenario=scenarios())
def test_who_waited_for_tokens_was_released_by_what_let_their_sender_send(scenario: Scenario) -> None:
    """The span in `after` is that before the dispatch of a rank whose flow arrived at that instant."""
    trace = trace_of(scenario)
    spans, flows = table(trace, "spans"), table(trace, "flows")
    row_of = np.argsort(spans["span"])
    waited = (spans["operator"] == "expert_gemm_1") & (spans["met"] > spans["start"])
    for row in np.flatnonzero(waited):
        sent = (
            (flows["token_batch"] == spans["token_batch"][row])
            & (flows["layer"] == spans["layer"][row])
            & (flows["operator"] == "dispatch")
            & (flows["target"] == spans["rank"][row])
            & (flows["end"] == spans["met"][row])
        )
        before = row_of[spans["after"][row]]
        assert spans["rank"][before] in flows["source"][sent]
        assert spans["end"][before] <= flows["start"][sent].min()


# ---- what links carry ---------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(scenario=scenarios())
def test_what_links_carry_over_time_adds_up_to_what_they_carried(scenario: Scenario) -> None:
    trace = trace_of(scenario)
    links, use = table(trace, "links"), table(trace, "link_use")
    sums = np.bincount(use["link"], weights=use["bytes"], minlength=len(links["link"]))
    np.testing.assert_allclose(sums, links["bytes"], rtol=1e-9)
    assert (use["bytes"] > 0).all()
    if len(use["link"]):
        width = use["end"] - use["start"]
        assert (width == width[0]).all() and len(np.unique(use["start"])) <= 512
        assert (use["start"] < trace.facts["simulated_seconds"]).all()
        # Bounds and loads a calculator can check: no interval before the first exchange.
        assert use["end"].min() >= table(trace, "flows")["start"].min()


@settings(max_examples=20, deadline=None)
@given(scenario=scenarios())
def test_every_span_that_moved_bytes_names_a_link_with_its_own_among_all_bytes(scenario: Scenario) -> None:
    trace = trace_of(scenario)
    spans, narrow, flows = (table(trace, name) for name in ("spans", "span_links", "flows"))
    assert (narrow["own"] > 0).all() and (narrow["own"] <= narrow["all"] * (1 + 1e-12)).all()
    assert (narrow["all"] <= table(trace, "links")["bytes"][narrow["link"]] * (1 + 1e-12)).all()
    row = np.argsort(spans["span"])[narrow["span"]]
    # Whoever receives a hand-over has no span for it.
    sent = _keys(flows, "source") | {key for key in _keys(flows, "target") if key[1] != "stage_transfer"}
    assert _keys({name: column[row] for name, column in spans.items()}, "rank") == sent


def _keys(rows: Columns, end: str) -> set[tuple[object, ...]]:
    columns = (rows[name].tolist() for name in ("token_batch", "operator", "layer", end))
    # Weights that move belong to no token batch, and to no span.
    return {key for key in zip(*columns, strict=True) if key[0] >= 0}


# ---- what is chosen to be written ---------------------------------------------------------------

#: Steps overlap: two micro-batches follow each other through two stages, and batches come meanwhile.
PIPELINED: dict[str, Any] = {
    "topology": rail_tree(2, 2, latency=1e-6, launch=1e-6),
    "deployment": parallel(pp=2, dp=2),
    "gating": {"skew": "zipf"},
    "workload": {
        "sequences": 8, "decode_steps": 5, "microbatches": 2, "batches": 2, "arrivals": "uniform",
        "interval": "30 us",
    },
}  # fmt: skip


def ran(**chosen: Any) -> Trace:
    return trace_of(tiny(**PIPELINED, trace={"level": "flows", **chosen}))


def touching(columns: Columns, since: float, until: float) -> Columns:
    some = (columns["end"] >= since) & (columns["start"] <= until)
    return {name: column[some] for name, column in columns.items()}


def assert_same(one: Columns, other: Columns) -> None:
    for name, column in one.items():
        np.testing.assert_array_equal(column, other[name], err_msg=name)


def test_chosen_steps_are_written_with_all_that_runs_beside_them_and_the_rest_only_in_sums() -> None:
    whole, part = ran(), ran(steps=[4, 6])
    steps = table(whole, "steps")
    chosen = (steps["step"] >= 4) & (steps["step"] < 6)
    since, until = steps["start"][chosen].min(), steps["end"][chosen].max()
    assert steps["start"].min() < since and until < steps["end"].max()
    for name in ("spans", "flows"):
        wanted = touching(table(whole, name), since, until)
        assert 0 < len(wanted["start"]) < len(table(whole, name)["start"])
        assert_same(wanted, table(part, name))
    for name in set(whole.tables) - {"spans", "flows", "span_links"}:
        assert_same(table(whole, name), table(part, name))


@pytest.mark.parametrize("step", [4, 5])
def test_the_path_of_a_chosen_step_is_whole_although_it_leads_through_other_steps(step: int) -> None:
    assert path(ran(steps=[4, 6]), step) == path(ran(), step)


def test_a_window_chooses_the_spans_that_touch_it() -> None:
    whole, part = ran(), ran(window=["20 us", "45 us"])
    for name in ("spans", "flows"):
        assert_same(touching(table(whole, name), 20e-6, 45e-6), table(part, name))
    links = table(part, "span_links")
    assert set(links["span"]) <= set(table(part, "spans")["span"])
    assert len(links["span"]) < len(table(whole, "span_links")["span"])


def test_steps_and_window_choose_what_both_do() -> None:
    both, steps = ran(steps=[4, 6], window=["0 s", "1 ns"]), ran(steps=[4, 6])
    assert len(table(steps, "spans")["span"])
    since = table(steps, "spans")["start"].min()
    assert since > 1e-9 and not len(table(both, "spans")["span"])


# ---- the KV cache -------------------------------------------------------------------------------


def test_what_shards_hold_over_time_reaches_what_they_held_at_most_and_ends_empty() -> None:
    trace = ran()
    held, memory, ranks = (table(trace, name) for name in ("kv_use", "memory", "ranks"))
    assert (np.diff(held["time"]) >= 0).all()
    for shard in np.unique(held["shard"]):
        mine = held["bytes"][held["shard"] == shard]
        kv = memory["bytes"][(memory["part"] == "kv") & (ranks["shard"][memory["rank"]] == shard)]
        assert (kv == mine.max()).all() and mine[-1] == 0.0


# ---- long runs ----------------------------------------------------------------------------------


def long_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scenario:
    """A scenario of which some tables are written while it runs, because groups are so small here."""
    monkeypatch.setattr(files, "ROW_GROUP", 100)
    return tiny(**PIPELINED, trace={"level": "flows"})


def test_a_run_that_wrote_meanwhile_leaves_what_one_in_memory_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = long_run(tmp_path, monkeypatch)
    result = run_scenario(scenario, folder=tmp_path / "deep" / "result")
    (beside,) = tmp_path.iterdir()
    assert {"spans.parquet", "flows.parquet"} <= {path.name for path in beside.iterdir()}
    result.save(tmp_path / "result")
    kept = trace_of(scenario)
    files.write(Trace(kept.tables, result.trace.raw.facts), tmp_path / "kept")
    for path in (tmp_path / "kept").iterdir():
        assert path.read_bytes() == (tmp_path / "result" / "trace" / path.name).read_bytes(), path.name
    assert len(result.trace["spans"]) == len(table(kept, "spans")["span"])
    facts = {**result.trace.raw.facts, "wall_seconds": result.summary["wall_seconds"]}
    assert summarize(Trace(kept.tables, facts)) == result.summary


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, StuckError])
def test_a_run_that_fails_or_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    scenario, seen = long_run(tmp_path, monkeypatch), []

    def tell(done: int, _: int) -> None:
        if done == 15:
            seen.extend(tmp_path.iterdir())
            raise failure("stop")

    with pytest.raises(failure):
        run_scenario(scenario, tell=tell, folder=tmp_path / "result")
    assert seen and not list(tmp_path.iterdir())
