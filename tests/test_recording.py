"""What the engine writes down of every span: laws that hold for any deployment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from scenarios import parallel, rail_tree, single_server, table, tiny, trace_of

from clustersim.spec.scenario import Scenario
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
    "straggler": [{"kind": "slow_gpu", "gpu": 0, "factor": 3.0}],
    "spread": [{"kind": "spread_gpus", "spread": 0.2}],
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
        trace={"level": "flows"},
        seed=draw(st.integers(0, 5)),
    )


def path(trace: Trace, step: int) -> tuple[list[tuple[float, float]], float]:
    """The parts of a step's critical path, the latest first, each (from, to) s; and what is left before
    the first span that nothing released, s."""
    spans, steps, passes = (table(trace, name) for name in ("spans", "steps", "token_batches"))
    begin = steps["start"][steps["step"] == step].item()
    row_of = np.argsort(spans["span"])
    own = np.isin(spans["token_batch"], passes["token_batch"][passes["step"] == step])
    last = np.flatnonzero(own & (spans["stage"] == spans["stage"].max()))
    at = int(last[np.argmax(spans["end"][last])])
    parts: list[tuple[float, float]] = []
    while True:
        parts.append((max(spans["met"][at], begin), spans["end"][at]))
        if spans["met"][at] <= begin or spans["after"][at] < 0:
            return parts, max(spans["met"][at] - begin, 0.0)
        before = int(row_of[spans["after"][at]])
        if spans["end"][before] < spans["met"][at]:
            # What it had to wait for was under way meanwhile.
            parts.append((max(spans["end"][before], begin), spans["met"][at]))
            if spans["end"][before] <= begin:
                return parts, 0.0
        at = before


@settings(max_examples=120, deadline=None)
@given(scenario=scenarios())
def test_following_after_backwards_gives_parts_that_add_up_to_the_step(scenario: Scenario) -> None:
    trace = trace_of(scenario)
    steps, requests = table(trace, "steps"), table(trace, "requests")
    for step, start, end in zip(steps["step"], steps["start"], steps["end"], strict=True):
        parts, rest = path(trace, int(step))
        assert all(begin <= over for begin, over in parts)
        assert all(late[0] == early[1] for late, early in zip(parts[:-1], parts[1:], strict=True))
        assert sum(over - begin for begin, over in parts) + rest == approx(end - start, abs=1e-9)
        assert parts[0][1] == end
        if rest:
            # Another batch that came meanwhile was served first: before its arrival nobody knew of it.
            assert (requests["arrival"] == start + rest).any() or (requests["arrival"] == parts[-1][0]).any()


@settings(max_examples=120, deadline=None)
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


@settings(max_examples=60, deadline=None)
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
