"""Runs of tiny scenarios: the laws of a trace over drawn deployments, and steps reckoned by hand."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytest import approx
from scenarios import (
    FLOP_RATE,
    HBM,
    MODEL,
    NIC,
    NVLINK,
    fat_tree,
    parallel,
    rail_tree,
    same_tables,
    single_server,
    table,
    tiny,
    trace_of,
)

from clustersim.analysis.summary import summarize
from clustersim.engine import fabric, replica, simulation
from clustersim.engine.gpu import ORDERS
from clustersim.errors import ScenarioError
from clustersim.physics import exchanges
from clustersim.physics.fidelity import NETWORKS
from clustersim.plan import lowering
from clustersim.plan.collectives import AUTO, COLLECTIVES
from clustersim.plan.copy_choice import COPY_CHOICES
from clustersim.plan.gating import GATINGS
from clustersim.plan.layout import lay_out
from clustersim.plan.memory import needs
from clustersim.serving.kvcache import KvPool
from clustersim.spec.scenario import Scenario
from clustersim.spec.writing import to_toml
from clustersim.study.run import run_scenario
from clustersim.trace.record import Trace

#: Times are sums of many roundings.
ROUNDING = 1e-12
FLOWS = {"level": "flows"}
#: When experts are served one by one → what else has to be said.
STARTS: dict[str, dict[str, Any]] = {
    "all_arrived": {"start": "all_arrived"},
    "expert_complete": {"start": "expert_complete"},
    "chunks": {"start": "chunks", "chunk_tokens": 2},
}

# ---- the laws of a trace ------------------------------------------------------------------------


def spans_of(trace: Trace) -> dict[str, np.ndarray]:
    """The spans, in the order of their numbers."""
    spans = table(trace, "spans")
    order = np.argsort(spans["span"])
    assert np.array_equal(spans["span"][order], np.arange(len(order))), "every span has a number of its own"
    return {name: column[order] for name, column in spans.items()}


def released_by(spans: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Spans that waited for one, and the end of that one, s."""
    waited = np.flatnonzero(spans["after"] >= 0)
    return waited, spans["end"][spans["after"][waited]]


def assert_spans_are_in_order(trace: Trace) -> None:
    spans = spans_of(trace)
    hair = ROUNDING * spans["end"].max()
    assert (spans["start"] <= spans["met"]).all()
    assert (spans["met"] <= spans["end"]).all()
    for rank, stream in sorted(set(zip(spans["rank"].tolist(), spans["stream"].tolist(), strict=True))):
        here = (spans["rank"] == rank) & (spans["stream"] == stream)
        start, end = spans["start"][here], spans["end"][here]
        order = np.lexsort((end, start))
        assert (start[order][1:] >= end[order][:-1] - hair).all(), f"rank {rank} does two things at once"


def assert_nothing_begins_before_what_it_waited_for(trace: Trace) -> None:
    spans = spans_of(trace)
    waited, released = released_by(spans)
    hair = ROUNDING * spans["end"].max()
    assert (released <= spans["met"][waited] + hair).all()
    # On the compute stream nobody rests between his release and his beginning, but for an expert that
    # is served alone: tokens on their way release it, and they are no span.
    on_compute = (spans["stream"][waited] == "compute") & (spans["operator"][waited] != "expert_gemm_1")
    assert (released[on_compute] >= spans["met"][waited][on_compute] - hair).all()


def assert_following_after_backwards_comes_to_the_beginning(trace: Trace) -> None:
    after = spans_of(trace)["after"]
    at = np.arange(len(after))
    for _ in range(len(after)):
        at = np.where(at >= 0, after[at], -1)
    assert (at == -1).all(), "a span waits for itself"


def assert_no_step_is_faster_than_its_bounds(trace: Trace, *bounds: str) -> None:
    steps = table(trace, "steps")
    for bound in bounds:
        assert (steps["end"] - steps["start"] >= steps[f"bound_{bound}"] * (1 - 1e-9)).all(), bound


def assert_tokens_are_kept(scenario: Scenario, trace: Trace) -> None:
    batches, queues, model = table(trace, "token_batches"), table(trace, "experts"), scenario.model
    for number, tokens in zip(batches["token_batch"], batches["tokens"], strict=True):
        here = queues["token_batch"] == number
        for layer in range(model.layers):
            sent = queues["tokens"][here & (queues["layer"] == layer)].sum()
            assert sent == tokens * model.top_k, "tokens sent to experts are tokens * top_k"


def assert_queues_are_served_after_their_tokens_came(trace: Trace, chunk: float = inf) -> None:
    queues = table(trace, "experts")
    least = np.minimum(queues["tokens"], chunk)
    assert (queues["length"] >= least).all(), "nobody is served before all his tokens came, or his chunk's"
    assert (queues["length"] <= queues["tokens"]).all()
    used = queues["tokens"] > 0
    assert (queues["wait"] >= 0).all()
    assert (queues["first_arrival"] <= queues["last_arrival"])[used].all()
    assert (chunk < inf) or (queues["last_arrival"] <= queues["served"])[used].all()
    assert (queues["served"] <= queues["done"]).all()


def assert_requests_come_and_go(scenario: Scenario, trace: Trace) -> None:
    requests, work = table(trace, "requests"), scenario.workload
    assert np.array_equal(requests["request"], np.arange(work.sequences * work.batches)), "arrived = finished"
    made = {"prefill": 1, "decode": work.decode_steps, "both": 1 + work.decode_steps}
    assert (requests["output_tokens"] == made[work.phase]).all()
    assert (requests["input_tokens"] == (0 if work.phase == "decode" else work.prompt_tokens)).all()
    # The clock adds gaps, so it may strike an ulp before the arrival it was set to.
    assert (requests["arrival"] * (1 - ROUNDING) <= requests["started"]).all()
    assert (requests["started"] < requests["first_token"]).all()
    assert (requests["first_token"] <= requests["finish"]).all()


def assert_links_carry_what_flows_cross_them(scenario: Scenario, trace: Trace) -> None:
    flows, links = table(trace, "flows"), table(trace, "links")
    assert np.isfinite(flows["start"]).all() and (flows["start"] <= flows["end"]).all()
    assert (flows["wire"] >= flows["bytes"]).all()
    path = lay_out(scenario).paths.between(flows["source"], flows["target"]).links
    size = np.broadcast_to(flows["wire"][:, None], path.shape)
    crossed = np.bincount(path[path >= 0], size[path >= 0], len(links["bytes"]))
    # What ends or begins at a switch crosses one link of its GPU.
    for via, end in (("up", "source"), ("down", "target")):
        here = flows["via"] == via
        at_switch = np.flatnonzero(links["tier"] == ("gpu-nvswitch" if via == "up" else "nvswitch-gpu"))
        of_gpu = {links[end][link]: link for link in at_switch.tolist()}
        names = lay_out(scenario).topology.gpus
        np.add.at(crossed, [of_gpu[names[rank]] for rank in flows[end][here]], flows["wire"][here])
    assert crossed == approx(links["bytes"])


def assert_no_link_is_above_its_capacity(trace: Trace) -> None:
    links = table(trace, "links")
    assert (links["bytes"] <= links["offered"] * (1 + 1e-9)).all()


MACHINES = {
    "one": (lambda **k: single_server(1, **k), 1),
    "two": (lambda **k: single_server(2, **k), 2),
    "four": (lambda **k: single_server(4, **k), 4),
    "rails": (lambda **k: rail_tree(2, 2, **k), 4),
    "shared_card": (lambda **k: rail_tree(2, 2, nics=1, **k), 4),
    "fat": (lambda **k: fat_tree(2, 4, nics=2, **k), 8),
}


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Small machines, whatever divides them, slow or fast wires, every named choice."""
    machine, gpus = MACHINES[draw(st.sampled_from(list(MACHINES)))]
    ways = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2) if gpus % (tp * pp) == 0]
    tp, pp = draw(st.sampled_from(ways))
    dp = gpus // tp // pp
    etp = draw(st.sampled_from([n for n in (1, 2, 4) if tp * dp % n == 0]))
    service = draw(st.sampled_from(["grouped", "by_expert"]))
    alone = (service, etp) == ("by_expert", 1)
    start = STARTS[draw(st.sampled_from(list(STARTS) if alone else ["all_arrived"]))]
    algorithms = {kind: draw(st.sampled_from([AUTO, *COLLECTIVES[kind]])) for kind in COLLECTIVES}
    if tp > 2 and algorithms["all_reduce"] in ("one_shot", "two_shot"):
        algorithms["all_reduce"] = "ring"  # these are refused over several NVLink domains
    experts = {"service": service, **start, "copy_choice": draw(st.sampled_from(list(COPY_CHOICES)))}
    if alone:
        experts["order"] = draw(st.sampled_from(list(ORDERS)))
    if draw(st.booleans()):
        experts |= {"policy": "replicated", "per_gpu": 8}
    phase = draw(st.sampled_from(["prefill", "decode", "both", "stream"]))
    parts = draw(st.sampled_from([1, 2]))
    work: dict[str, Any] = {
        "prefill": {"phase": "prefill", "prompt_tokens": 6, "microbatches": 2 * parts},
        "decode": {"decode_steps": 2, "microbatches": parts},
        "both": {"phase": "both", "decode_steps": 1, "microbatches": parts},
        "stream": {
            "batches": 3,
            "arrivals": draw(st.sampled_from(["uniform", "poisson"])),
            "interval": "3 us",
        },
    }[phase]
    slow = [{"kind": "slow_gpu", "gpu": gpus - 1, "factor": draw(st.sampled_from([1.5, 20.0]))}]
    return tiny(
        machine(
            latency=draw(st.sampled_from([0.0, 1e-6])),
            launch=draw(st.sampled_from([0.0, 2e-6])),
            nvlink=draw(st.sampled_from([1e10, 1e7])),
            nic=draw(st.sampled_from([1e9, 1e6])),
        ),
        model={
            "experts": 8,
            "top_k": draw(st.integers(1, 3)),
            "kv_heads": draw(st.sampled_from([1, 2, 4])),
            "ffn_kind": draw(st.sampled_from(["plain", "gated"])),
        },
        deployment=parallel(tp, pp, dp, etp, algorithms=algorithms, experts=experts),
        workload={"sequences": dp * parts * draw(st.sampled_from([1, 2])), **work},
        gating={"skew": draw(st.sampled_from(list(GATINGS))), "exponent": draw(st.sampled_from([0.7, 3.0]))},
        network={"fidelity": draw(st.sampled_from(list(NETWORKS))), "chunk": "500 B"},
        trace=FLOWS,
        faults=slow if draw(st.booleans()) else [],
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(scenarios())
def test_the_laws_of_a_trace_hold_for_whatever_is_deployed(scenario: Scenario) -> None:
    trace = trace_of(scenario)
    assert_following_after_backwards_comes_to_the_beginning(trace)
    assert_tokens_are_kept(scenario, trace)
    assert_queues_are_served_after_their_tokens_came(trace, scenario.deployment.experts.chunk_tokens or inf)
    assert_requests_come_and_go(scenario, trace)
    assert_links_carry_what_flows_cross_them(scenario, trace)
    assert_no_step_is_faster_than_its_bounds(trace, "compute", "memory")
    if scenario.deployment.experts.start == "all_arrived":  # the other is a known fault, see below
        assert_spans_are_in_order(trace)
        assert_nothing_begins_before_what_it_waited_for(trace)
    if scenario.network.fidelity != "port_bound":  # as that one, see below
        assert_no_step_is_faster_than_its_bounds(trace, "network")
        assert_no_link_is_above_its_capacity(trace)


@pytest.mark.parametrize("fidelity", NETWORKS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("all_to_all", COLLECTIVES["all_to_all"])
def test_a_pipeline_of_two_servers_keeps_the_laws_with_every_network(
    fidelity: str, start: str, all_to_all: str
) -> None:
    scenario = tiny(
        rail_tree(2, 2, latency=1e-6, launch=1e-6),
        deployment=parallel(
            dp=2,
            pp=2,
            experts={"service": "by_expert", **STARTS[start]},
            algorithms={"all_to_all": all_to_all},
        ),
        workload={"phase": "both", "decode_steps": 2, "microbatches": 2},
        gating={"skew": "zipf"},
        network={"fidelity": fidelity, "chunk": "100 B"},
        trace=FLOWS,
    )
    trace = trace_of(scenario)
    assert_tokens_are_kept(scenario, trace)
    assert_queues_are_served_after_their_tokens_came(trace, scenario.deployment.experts.chunk_tokens or inf)
    assert_requests_come_and_go(scenario, trace)
    assert_links_carry_what_flows_cross_them(scenario, trace)
    assert_no_step_is_faster_than_its_bounds(trace, "compute", "memory", "network")


def test_tokens_that_come_as_their_queue_is_served_are_in_it() -> None:
    # Chosen because the clock and the network differ by an ulp in it: 2 of its queues looked empty.
    scenario = tiny(
        fat_tree(2, 2, nics=1, uplink=1e6),
        deployment=parallel(dp=4, algorithms={"all_to_all": "one_sided"}),
        workload={"sequences": 8, "decode_steps": 8},
        gating={"skew": "zipf"},
        faults=[{"kind": "slow_gpu", "gpu": 0, "factor": 1.5}],
        seed=5,
    )
    assert_queues_are_served_after_their_tokens_came(trace_of(scenario))


def out_of_order(all_to_all: str) -> Trace:
    """Experts are served in another order than that of their slots."""
    return trace_of(
        tiny(
            single_server(2, nvlink=1e8),
            deployment=parallel(
                dp=2,
                experts={"service": "by_expert", "start": "expert_complete"},
                algorithms={"all_to_all": all_to_all},
            ),
            gating={"skew": "zipf", "exponent": 2.0},
            workload={"sequences": 8, "decode_steps": 3},
            faults=[{"kind": "slow_gpu", "gpu": 1, "factor": 3.0}],
        )
    )


def test_experts_served_out_of_order_name_the_span_that_released_them() -> None:
    assert_nothing_begins_before_what_it_waited_for(out_of_order("pairwise"))


def test_experts_served_out_of_order_do_not_overlap() -> None:
    assert_spans_are_in_order(out_of_order("pairwise"))


def test_a_dispatch_that_ends_before_its_last_sender_came_has_met_before() -> None:
    assert_spans_are_in_order(out_of_order("one_sided"))


@pytest.mark.parametrize("fidelity", ["fluid", "chunked"])
def test_no_step_is_faster_than_its_network_bound_where_groups_share_a_card(fidelity: str) -> None:
    # Two all-to-alls, one per sharer of the experts, begin one after the other but cross the same cards.
    # The port bound takes each by itself, which is what it is for: there it does not hold.
    scenario = tiny(
        rail_tree(2, 4, nics=1, nic=1e6),
        deployment=parallel(dp=8, etp=4, algorithms={"all_to_all": "one_sided"}),
        workload={"sequences": 8},
        network={"fidelity": fidelity},
        faults=[{"kind": "slow_gpu", "gpu": gpu, "factor": 1.0 + gpu} for gpu in range(8)],
    )
    assert_no_step_is_faster_than_its_bounds(trace_of(scenario), "network")


# ---- reckoned by hand ---------------------------------------------------------------------------


def longer(flop: float, size: float) -> float:
    """The roofline."""
    return max(flop / FLOP_RATE, size / HBM)


def product(rows: float, columns: float, depth: float, matrices: int = 1) -> float:
    """Rows shared out over so many matrices, all of them read. Two bytes a number."""
    return longer(2 * rows * columns * depth, 2 * (matrices * columns * depth + rows * (depth + columns)))


def layer(
    tokens: float, past: dict[str, float], tp: int, experts: int, exchange: float, reduce: float
) -> float:
    """Seconds of one layer on one rank of TP `tp` that holds so many experts, everything even.

    tokens    of its shard
    past      per token: query-key pairs, and tokens whose keys and values are read
    exchange  s of the dispatch, and of the combine
    reduce    s of the all-reduce of the shard's tokens; the all-gather is half of it
    """
    h, heads, wide, every, k, f = (
        MODEL[n] for n in ("hidden", "heads", "head_dim", "experts", "top_k", "ffn")
    )
    move = tokens * h * 2 / HBM
    here = heads / tp
    own = tokens / tp
    came = tokens * k / tp  # even gating: as many come as go
    attention = (
        2 * move
        + product(tokens, 3 * here * wide, h)
        + 2 * tokens * 2 * here * wide * 2 / HBM  # queries and keys are turned
        + longer(
            4 * here * wide * tokens * past["pairs"],
            2 * 2 * here * wide * tokens * past["read"] + 2 * tokens * wide * 4 * here,
        )
        + product(tokens, h, here * wide)
        + reduce
        + 3 * move
    )
    ffn = (
        2 * move
        + product(own, every, h)
        + own * (4 * every + 8 * k) / HBM  # fp32 scores are read, a place and an fp32 weight written
        + (1 + k) * move / tp
        + exchange
        + product(came, f, h, experts)
        + came * 2 * f * 2 / HBM
        + product(came, h, f, experts)
        + exchange
        + (1 + k) * move / tp
        + reduce / 2
        + 3 * move
    )
    return attention + ffn


def ends(tokens: float, made: float, tp: int = 1) -> float:
    """Seconds of embedding, final norm, LM head and sampling from fp32 logits."""
    h, vocab = MODEL["hidden"], MODEL["vocab"]
    return 4 * tokens * h * 2 / HBM + product(made, vocab / tp, h) + 2 * made * vocab / tp * 4 / HBM


def step_seconds(scenario: Scenario) -> list[float]:
    steps = table(trace_of(scenario), "steps")
    return (steps["end"] - steps["start"]).tolist()


DECODE = {"phase": "decode", "sequences": 4, "prompt_tokens": 10, "decode_steps": 2}
PREFILL = {"phase": "prefill", "sequences": 4, "prompt_tokens": 10}


@pytest.mark.parametrize("fidelity", NETWORKS)
def test_decode_on_two_gpus_takes_what_one_reckons(fidelity: str) -> None:
    # Two tokens a GPU choose four experts, one each; half of the choices leave the GPU: 2 x 64 x 2 B.
    sent = 2 * 64 * 2
    if fidelity == "chunked":
        # Stored whole on the switch and forwarded: both links, one after the other.
        sent *= 2
    network = {"fidelity": fidelity, "chunk": "1 kB"}
    expected = [
        2 * layer(2, {"pairs": past, "read": past}, 1, 2, sent / NVLINK, 0.0) + ends(2, 2)
        for past in (11, 12)
    ]
    assert step_seconds(tiny(workload=DECODE, network=network)) == approx(expected, rel=1e-12)


def test_prefill_on_two_gpus_takes_what_one_reckons() -> None:
    # Two prompts of ten tokens a GPU; a token sees itself and those before: 5.5 on average.
    sent = 20 * 2 / 2 * 64 * 2
    past = {"pairs": 5.5, "read": 1.0}
    expected = 2 * layer(20, past, 1, 2, sent / NVLINK, 0.0) + ends(20, 2)
    assert step_seconds(tiny(workload=PREFILL)) == approx([expected], rel=1e-12)


def test_launches_and_latencies_add_up_one_by_one() -> None:
    # 4 operators at the ends, 17 a layer, of which 2 are exchanges with their latency.
    launch, latency = 1e-6, 3e-6
    (plain,) = step_seconds(tiny(workload=PREFILL))
    (slow,) = step_seconds(tiny(single_server(2, launch=launch, latency=latency), workload=PREFILL))
    assert slow == approx(plain + (4 + 2 * 17) * launch + 2 * 2 * latency, rel=1e-12)


@pytest.mark.parametrize("past, work", [(11, DECODE), (None, PREFILL)])
def test_tensor_parallel_ranks_take_what_one_reckons(past: int | None, work: dict[str, Any]) -> None:
    # All tokens on both ranks with half of the heads; each gates and dispatches half of the tokens.
    # The ring sends half of the tokens twice; the all-gather at the end sends them once.
    tokens, context = (4, {"pairs": 11, "read": 11}) if past else (40, {"pairs": 5.5, "read": 1.0})
    half = tokens / 2 * 64 * 2
    dispatched = tokens / 2 * 2 / 2 * 64 * 2
    expected = 2 * layer(tokens, context, 2, 2, dispatched / NVLINK, 2 * half / NVLINK) + ends(tokens, 4, 2)
    scenario = tiny(deployment=parallel(tp=2), workload=work)
    assert step_seconds(scenario)[0] == approx(expected, rel=1e-12)


def test_four_gpus_in_two_servers_take_what_one_reckons() -> None:
    # A token's two choices, four tokens a GPU: 8 choices, 2 for each of four GPUs. Two leave by the own
    # card to the same rail, two come from the neighbour, who sends what is for this rail over NVLink:
    # 4 x 64 x 2 B over every card, which is slower than all else.
    over_card = 4 * 64 * 2
    work = {**DECODE, "sequences": 16, "decode_steps": 1}
    for past, tokens, workload in (
        ({"pairs": 11, "read": 11}, 4, work),
        ({"pairs": 5.5, "read": 1.0}, 40, {**PREFILL, "sequences": 16}),
    ):
        exchange = over_card * tokens / 4 / NIC
        expected = 2 * layer(tokens, past, 1, 1, exchange, 0.0) + ends(tokens, 4)
        scenario = tiny(rail_tree(2, 2), deployment=parallel(dp=4), workload=workload)
        assert step_seconds(scenario) == approx([expected], rel=1e-12)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_a_pipeline_fills_and_drains(microbatches: int) -> None:
    # A stage of one layer each. The slower stage works without a pause; the first micro-batch fills the
    # pipeline, the last drains it: first + hand-over + (n - 1) * slower + last.
    tokens = 4 / microbatches * 10
    past = {"pairs": 5.5, "read": 1.0}
    one = layer(tokens, past, 1, 4, 0.0, 0.0)
    move = tokens * 64 * 2
    first = one + 2 * move / HBM
    last = one + 2 * move / HBM + product(4 / microbatches, 100, 64) + 2 * 4 / microbatches * 100 * 4 / HBM
    slower = max(first, last, move / NVLINK)
    expected = first + move / NVLINK + (microbatches - 1) * slower + last
    work = {**PREFILL, "microbatches": microbatches}
    assert step_seconds(tiny(deployment=parallel(pp=2), workload=work)) == approx([expected], rel=1e-12)


def test_a_micro_batch_decodes_on_only_when_its_last_stage_is_done() -> None:
    # One micro-batch, two steps: nothing overlaps.
    past = ({"pairs": n, "read": n} for n in (11, 12))
    work = {**DECODE, "sequences": 2}
    move = 2 * 64 * 2
    expected = [2 * layer(2, p, 1, 4, 0.0, 0.0) + ends(2, 2) + move / NVLINK for p in past]
    scenario = tiny(deployment=parallel(pp=2), workload=work)
    assert step_seconds(scenario) == approx(expected, rel=1e-12)
    steps = table(trace_of(scenario), "steps")
    assert steps["start"][1] == steps["end"][0]


def even_counts(monkeypatch: pytest.MonkeyPatch, counts: list[list[int]]) -> None:
    """Every layer gets these counts [N, E]."""
    fixed = np.array(counts)
    monkeypatch.setattr(
        lowering, "expert_counts", lambda tokens, model, *_, **__: np.stack([fixed] * model.layers)
    )


@pytest.mark.parametrize("start", STARTS)
def test_an_expert_is_served_when_its_own_tokens_are_there(
    start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One token a GPU, top-2. Expert 0 gets only its own GPU's token, expert 1 one over the wire as well.
    even_counts(monkeypatch, [[1, 1, 0, 0], [0, 1, 1, 0]])
    wire = 1e6
    scenario = tiny(
        single_server(2, nvlink=wire),
        deployment=parallel(dp=2, experts={"service": "by_expert", **STARTS[start]}),
        workload={"sequences": 2},
    )
    queues = table(trace_of(scenario), "experts")
    row = {name: column[:4] for name, column in queues.items()}  # layer 0
    met = row["last_arrival"][0]
    came = met + 64 * 2 / wire
    # First and second product, and the activation between them, of one token and of two.
    served = [2 * product(n, 128, 64) + n * 2 * 128 * 2 / HBM for n in (1, 2)]
    assert row["last_arrival"][:3].tolist() == approx([met, came, met], rel=1e-12)
    assert np.isnan(row["last_arrival"][3])
    if start == "all_arrived":
        # GPU 1 gets nothing, but its own token takes as long to leave.
        assert row["served"].tolist() == approx([came, came + served[0], came, came + served[0]])
        assert row["wait"].tolist() == approx([came - met, came - met + 2 * served[0], came - met, 0])
    else:
        assert row["served"].tolist()[:3] == approx([met, came, met], rel=1e-12)
        assert row["wait"].tolist() == approx([0, came - met, 0, 0])
    assert row["done"][1] - row["served"][1] == approx(served[1])


# ---- scaling, order and choices that must not matter --------------------------------------------


@pytest.mark.parametrize("fidelity", NETWORKS)
@pytest.mark.parametrize("family", [single_server, rail_tree, fat_tree], ids=lambda f: f.__name__)
def test_doubling_every_rate_halves_every_time(fidelity: str, family: Any) -> None:
    def run(by: float) -> Trace:
        gpus = {"gpus": 4} if family is single_server else {"servers": 2, "gpus": 2}
        uplink = {"uplink": 1e9 * by} if family is fat_tree else {}
        rates = {"rate": 1e12 * by, "hbm": 1e11 * by, "nvlink": 1e8 * by, "nic": 1e7 * by, "pcie": 4e7 * by}
        return trace_of(
            tiny(
                family(**gpus, **rates, **uplink),
                deployment=parallel(dp=2, pp=2),
                workload={"phase": "both", "decode_steps": 2, "microbatches": 2},
                gating={"skew": "zipf"},
                network={"fidelity": fidelity, "chunk": "100 B"},
                trace=FLOWS,
            )
        )

    slow, fast = run(1.0), run(2.0)
    for name, columns in (
        ("spans", ("start", "met", "end")),
        ("flows", ("start", "end")),
        ("requests", ("started", "first_token", "finish")),
        ("experts", ("served", "done", "wait")),
    ):
        for column in columns:
            assert 2 * table(fast, name)[column] == approx(table(slow, name)[column], rel=1e-9, abs=0.0)
    assert np.array_equal(table(slow, "spans")["after"], table(fast, "spans")["after"])


BUSY = {
    "topology": rail_tree(2, 4, nics=2, latency=1e-6, launch=1e-6),
    "deployment": parallel(tp=2, dp=2, pp=2, etp=2),
    "workload": {"phase": "both", "decode_steps": 3, "microbatches": 2, "sequences": 8},
    "gating": {"skew": "zipf"},
    "trace": FLOWS,
}


def test_the_same_scenario_leaves_the_same_rows() -> None:
    assert same_tables(trace_of(tiny(**BUSY)), trace_of(tiny(**BUSY)))


def test_another_seed_moves_tokens_but_not_their_number() -> None:
    one, other = (table(trace_of(tiny(**BUSY, seed=seed)), "experts")["tokens"] for seed in (1, 2))
    assert one.sum() == other.sum()
    assert not np.array_equal(one, other)


def test_with_even_gating_the_seed_changes_nothing() -> None:
    even = {**BUSY, "gating": {"skew": "even"}}
    assert same_tables(trace_of(tiny(**even, seed=1)), trace_of(tiny(**even, seed=2)))


def test_the_bytes_on_disk_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    file = tmp_path / "busy.toml"
    file.write_text(to_toml(tiny(**BUSY)), encoding="utf-8")
    left = []
    for hash_seed in ("1", "2"):
        out = tmp_path / hash_seed
        command = [sys.executable, "-c", "from clustersim.cli import main; main()", "run", str(file)]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([*command, "--out", str(out), "--quiet"], env=environment, check=True)
        summary = json.loads((out / "summary.json").read_text())
        assert summary.pop("wall_seconds") > 0
        tables = {path.name: path.read_bytes() for path in sorted((out / "trace").iterdir())}
        assert tables
        left.append((tables, json.dumps(summary)))
    assert left[0] == left[1]


@pytest.mark.parametrize("flows", [0, 10**9])
def test_few_and_many_finished_flows_are_told_alike(flows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for all_to_all in COLLECTIVES["all_to_all"]:
        deployment = BUSY["deployment"] | {"algorithms": {"all_to_all": all_to_all}}
        scenario = tiny(**BUSY | {"deployment": deployment})
        usual = trace_of(scenario)
        with monkeypatch.context() as patch:
            patch.setattr(fabric, "_FEW", flows)
            assert same_tables(trace_of(scenario), usual)


@pytest.mark.parametrize(
    "changes",
    [
        BUSY,
        BUSY | {"gating": {"skew": "even"}},
        # The TP groups and the one ETP group hold the same ranks, and gather as many bytes.
        {
            "topology": single_server(4),
            "model": {"top_k": 1},
            "deployment": parallel(tp=2, dp=2, etp=4),
            "trace": FLOWS,
        },
    ],
    ids=["zipf", "even", "same ranks in other groups"],
)
def test_what_is_remembered_changes_nothing(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    usual = trace_of(tiny(**changes))
    monkeypatch.setattr(exchanges, "_ROUTED_FLOWS", -1)
    monkeypatch.setattr(replica, "_PREPARED", 0)
    assert same_tables(trace_of(tiny(**changes)), usual)


def test_how_much_is_written_down_changes_no_result() -> None:
    summaries = {}
    for level in ("sums", "spans", "flows"):
        summaries[level] = run_scenario(tiny(**BUSY | {"trace": {"level": level}})).summary
        for its_own in ("scenario_hash", "wall_seconds"):
            del summaries[level][its_own]
    assert summaries["sums"] == summaries["spans"] == summaries["flows"]


def test_sums_are_the_sums_of_the_spans() -> None:
    trace = trace_of(tiny(**BUSY))
    spans, sums = spans_of(trace), table(trace, "sums")
    batches, steps = table(trace, "token_batches"), table(trace, "steps")
    step_of = dict(zip(batches["token_batch"].tolist(), batches["step"].tolist(), strict=True))
    phase_of = dict(zip(steps["step"].tolist(), steps["phase"].tolist(), strict=True))
    phase = np.array([phase_of[step_of[number]] for number in spans["token_batch"].tolist()])
    for row in range(len(sums["rank"])):
        here = phase == sums["phase"][row]
        for column in ("rank", "operator", "stream", "kind"):
            here &= spans[column] == sums[column][row]
        assert sums["count"][row] == here.sum() > 0
        assert sums["busy"][row] == approx((spans["end"] - spans["met"])[here].sum(), abs=1e-18)
        assert sums["wait"][row] == approx((spans["met"] - spans["start"])[here].sum(), abs=1e-18)
    assert sums["count"].sum() == len(spans["span"])


# ---- batches that come and go -------------------------------------------------------------------


@pytest.mark.parametrize("arrivals", ["uniform", "poisson"])
def test_batches_start_when_they_come_or_when_the_stages_are_free(arrivals: str) -> None:
    alone = step_seconds(tiny())[0]
    # Far apart, every batch is alone; close together, they queue at stage 0.
    for gap in (100 * alone, alone / 10):
        work = {"batches": 4, "arrivals": arrivals, "interval": f"{gap!r} s"}
        scenario = tiny(workload=work, seed=3)
        trace = trace_of(scenario)
        assert_requests_come_and_go(scenario, trace)
        requests, steps = table(trace, "requests"), table(trace, "steps")
        arrival = requests["arrival"][:: scenario.workload.sequences]
        assert arrival[0] == 0 and (np.diff(arrival) > 0).all()
        if arrivals == "uniform":
            assert np.diff(arrival) == approx(gap)
        expected, free = [], 0.0
        for at in arrival:
            free = max(at, free) + alone
            expected.append(free)
        assert steps["end"].tolist() == approx(expected, rel=1e-9)


def with_room_for(batches: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Trace, list[KvPool]]:
    """Two batches that come together, on GPUs with KV blocks for so many."""
    work = {"batches": 2, "prompt_tokens": 1000, "decode_steps": 2}
    need = needs(tiny(workload=work))[0]
    memory = (need.total - need.kv + batches * need.kv) / 0.9
    pools = []

    def made(*about: Any) -> KvPool:
        pools.append(KvPool(*about))
        return pools[0]

    monkeypatch.setattr(simulation, "KvPool", made)
    return trace_of(tiny(single_server(2, memory=f"{memory!r} B"), workload=work)), pools


def test_a_batch_waits_until_its_kv_blocks_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, (pool,) = with_room_for(1.5, monkeypatch)
    requests = table(trace, "requests")
    first, second = (requests["batch"] == batch for batch in (0, 1))
    assert requests["started"][second].min() == requests["finish"][first].max()
    assert (pool.used == 0).all(), "every block is given back"


def test_batches_with_room_for_both_follow_each_other_through_the_stages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace, (pool,) = with_room_for(2.5, monkeypatch)
    assert table(trace, "token_batches")["ready"][:2].tolist() == [0.0, 0.0]
    assert (pool.used == 0).all()


def test_a_step_starts_when_stage_0_begins_with_it() -> None:
    trace = trace_of(tiny(workload={"batches": 2}))
    spans, steps = spans_of(trace), table(trace, "steps")
    began = [spans["start"][spans["token_batch"] == step].min() for step in steps["step"]]
    assert steps["start"].tolist() == approx(began)


def test_a_batch_that_waited_for_room_names_the_span_that_released_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spans = spans_of(with_room_for(1.5, monkeypatch)[0])
    assert (spans["start"][spans["after"] == -1] == 0).all()


# ---- what goes wrong on the way -----------------------------------------------------------------


def test_a_slow_gpu_takes_longer_for_what_it_begins_in_its_window() -> None:
    usual = spans_of(trace_of(tiny()))
    half = float(np.median(usual["end"]))
    fault = {"kind": "slow_gpu", "gpu": 1, "factor": 3.0, "end": f"{half!r} s"}
    slowed = spans_of(trace_of(tiny(faults=[fault])))
    began_in_window = (slowed["rank"] == 1) & (slowed["start"] < half) & (slowed["kind"] == "compute")
    assert began_in_window.any() and not began_in_window[slowed["rank"] == 1].all()
    seconds, before = (s["end"] - s["met"] for s in (slowed, usual))
    assert seconds == approx(before * np.where(began_in_window, 3.0, 1.0), rel=1e-6)


def test_the_others_wait_for_a_slow_gpu_and_say_so() -> None:
    trace = trace_of(tiny(faults=[{"kind": "slow_gpu", "gpu": 1, "factor": 3.0}]))
    spans, sums = spans_of(trace), table(trace, "sums")
    waiting = spans["met"] > spans["start"]
    assert (spans["rank"][waiting] == 0).all()
    assert (spans["rank"][spans["after"][waiting]] == 1).all()
    assert set(sums["waited_for"][sums["wait"] > 0]) == {1}


def dispatches(trace: Trace) -> dict[str, np.ndarray]:
    spans = spans_of(trace)
    return {name: column[spans["operator"] == "dispatch"] for name, column in spans.items()}


@pytest.mark.parametrize("fidelity", NETWORKS)
def test_a_slow_link_slows_what_crosses_it(fidelity: str) -> None:
    # As in the hand calculation: 256 B each way, one way at a quarter of NVLink.
    fault = {"kind": "slow_link", "link": "gpu0->server0/nvswitch", "factor": 4.0}
    network = {"fidelity": fidelity, "chunk": "1 B"}
    spans = dispatches(trace_of(tiny(faults=[fault], workload={"sequences": 4}, network=network)))
    tolerance = 1e-2 if fidelity == "chunked" else 1e-9  # the last byte still crosses the second link
    assert spans["end"] - spans["met"] == approx(256 * 4 / NVLINK, rel=tolerance)


def test_a_link_that_gets_well_again_carries_the_rest_at_full_rate() -> None:
    # The dispatch of layer 0 begins at t; the link is slow until t + d, when a quarter has come.
    usual = dispatches(trace_of(tiny()))
    begin, seconds = float(usual["met"][0]), 256 / NVLINK
    fault = {"kind": "slow_link", "link": "gpu0->server0/nvswitch", "factor": 4.0}
    window = {"start": f"{begin / 2!r} s", "end": f"{begin + seconds!r} s"}
    spans = dispatches(trace_of(tiny(faults=[fault | window])))
    assert spans["end"][0] - spans["met"][0] == approx(seconds + 0.75 * seconds, rel=1e-9)


@pytest.mark.parametrize("fidelity", ["port_bound", "fluid"])
def test_a_flapping_link_carries_what_its_halves_allow(fidelity: str) -> None:
    # A link so slow that 256 B take three periods of a microsecond and more.
    speed = 8e7
    period = 256 / speed / 3
    fault = {
        "kind": "flapping_link",
        "link": "gpu0->server0/nvswitch",
        "factor": 4.0,
        "period": f"{period!r} s",
    }
    trace = trace_of(tiny(single_server(2, nvlink=speed), faults=[fault], network={"fidelity": fidelity}))
    for begin, end in zip(dispatches(trace)["met"], dispatches(trace)["end"], strict=True):

        def through(until: float) -> float:
            """Bytes since time zero: in every period a slow half and a fast half."""
            periods, rest = divmod(until, period)
            slow, fast = min(rest, period / 2), max(rest - period / 2, 0.0)
            return speed * (periods * period * (1 / 4 + 1) / 2 + slow / 4 + fast)

        assert through(end) - through(begin) == approx(256, rel=1e-6)


def test_a_fault_counts_in_what_a_link_could_have_carried() -> None:
    fault = {"kind": "slow_link", "link": "gpu0->server0/nvswitch", "factor": 4.0}
    trace = trace_of(tiny(faults=[fault]))
    links = table(trace, "links")
    slow = (links["source"] == "gpu0") & (links["target"] == "server0/nvswitch")
    whole = links["bandwidth"] * table(trace, "steps")["end"].max()
    assert links["offered"] == approx(np.where(slow, whole / 4, whole))


def test_a_link_that_does_not_exist_is_refused_with_the_nearest_name() -> None:
    fault = {"kind": "slow_link", "link": "gpu0->server0/nvswich", "factor": 4.0}
    with pytest.raises(ScenarioError) as refused:
        run_scenario(tiny(faults=[fault]))
    assert 'faults.0.link: the topology has no link "gpu0->server0/nvswich"' in str(refused.value)
    assert 'did you mean "gpu0->server0/nvswitch"?' in str(refused.value)


# ---- one-sided exchanges ------------------------------------------------------------------------


def test_a_one_sided_exchange_does_not_make_the_early_wait_for_the_late() -> None:
    # GPU 2 is late; nothing goes between it and the rest, so the rest do not notice it.
    faults = [{"kind": "slow_gpu", "gpu": 2, "factor": 50.0}]
    begun = {}
    for all_to_all in COLLECTIVES["all_to_all"]:
        scenario = tiny(
            single_server(4),
            deployment=parallel(dp=4, algorithms={"all_to_all": all_to_all}),
            workload={"sequences": 4},
            faults=faults,
            trace=FLOWS,
        )
        flows = table(trace_of(scenario), "flows")
        first = (flows["operator"] == "dispatch") & (flows["layer"] == 0)
        begun[all_to_all] = {rank: flows["start"][first & (flows["source"] == rank)] for rank in range(4)}
    late = begun["pairwise"][2].min()
    for rank, other in itertools.product(range(4), range(4)):
        assert begun["pairwise"][rank] == approx(begun["pairwise"][other][0])
    for rank in (0, 1, 3):
        assert (begun["one_sided"][rank] < late / 10).all()
    assert begun["one_sided"][2] == approx(late)


# ---- algorithms that are chosen -----------------------------------------------------------------


def test_auto_is_decided_by_the_bytes_of_each_exchange_and_written_down() -> None:
    trace = trace_of(
        tiny(
            single_server(4, latency=1e-6),
            deployment=parallel(tp=4, algorithms={"all_reduce": "auto"}),
            workload={"phase": "both", "prompt_tokens": 1000, "decode_steps": 1},
        )
    )
    exchanges, spans = table(trace, "exchanges"), spans_of(trace)
    reduces = exchanges["kind"] == "all_reduce"
    phases, vector = exchanges["phase"][reduces].tolist(), 4 * 64 * 2
    found = dict(zip(phases, exchanges["algorithm"][reduces].tolist(), strict=True))
    # One latency for 512 bytes; for half a megabyte least bytes count: the switch's.
    assert found == {"prefill": "in_switch", "decode": "one_shot"}
    assert exchanges["count"][reduces].tolist() == [2, 2], "one in each of two layers"
    here = spans["operator"] == "attention_all_reduce"
    assert set(spans["algorithm"][here].tolist()) == set(found.values())
    assert summarize(trace)["algorithms"]["all_reduce"] == {"one_shot": 0.5, "in_switch": 0.5}
    # Bytes: what members send to the switch and get from it, and three copies of everybody's vector.
    sent = dict(zip(phases, exchanges["bytes"][reduces].tolist(), strict=True))
    assert sent["decode"] == approx(2 * 4 * 3 * vector)
    assert sent["prefill"] == approx(2 * 2 * 4 * (1 + 1 / 4) * 1000 * vector)


# ---- hand-over between stages -------------------------------------------------------------------


def test_a_scattered_hand_over_crosses_the_network_once_and_nvlink_for_the_rest() -> None:
    # Four tokens of 64 numbers of two bytes, from a TP pair in one server to one in the other.
    whole = 4 * 64 * 2

    def spans(way: str) -> dict[str, np.ndarray]:
        return spans_of(
            trace_of(
                tiny(
                    rail_tree(2, 2),
                    deployment=parallel(tp=2, pp=2, algorithms={"point_to_point": way}),
                    workload={"sequences": 4},
                )
            )
        )

    def seconds(spans: dict[str, np.ndarray], operator: str) -> list[float]:
        here = spans["operator"] == operator
        return (spans["end"][here] - spans["start"][here]).tolist()

    plain, scattered = spans("direct"), spans("scatter_gather")
    assert seconds(plain, "stage_transfer") == approx([whole / NIC] * 2)
    assert seconds(scattered, "stage_transfer") == approx([whole / 2 / NIC] * 2)
    assert seconds(scattered, "stage_all_gather") == approx([whole / 2 / NVLINK] * 2)
    assert plain["end"].max() - scattered["end"].max() == approx(whole / 2 / NIC - whole / 2 / NVLINK)
    ways = dict(zip(scattered["operator"].tolist(), scattered["algorithm"].tolist(), strict=True))
    assert (ways["stage_transfer"], ways["stage_all_gather"], ways["qkv"]) == ("scatter_gather", "ring", "")


# ---- what a run holds ---------------------------------------------------------------------------


def test_memory_tells_of_all_batches_that_were_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def kv(scenario: Scenario) -> float:
        memory = table(trace_of(scenario), "memory")
        return float(memory["bytes"][memory["part"] == "kv"].max())

    assert kv(tiny(workload={"batches": 3})) == 3 * kv(tiny())


def test_only_one_pass_waits_before_stage_0(monkeypatch: pytest.MonkeyPatch) -> None:
    # All 8 micro-batches are there at once; each is lowered when the one before begins.
    lowered: list[float] = []
    prepared = replica.Replica._prepare

    def noted(self: Any, *arguments: Any) -> Any:
        lowered.append(self.env.now)
        return prepared(self, *arguments)

    monkeypatch.setattr(replica.Replica, "_prepare", noted)
    batches = table(
        trace_of(
            tiny(workload={"phase": "prefill", "decode_steps": 0, "prompt_tokens": 64, "microbatches": 8})
        ),
        "token_batches",
    )
    assert (batches["ready"] == 0).all()
    assert (np.diff(batches["start"]) > 0).all()
    assert lowered == [0.0, *batches["start"][:-1]]


def test_no_run_is_faster_than_its_work_occupies_the_busiest_part() -> None:
    trace = trace_of(tiny(deployment=parallel(pp=2), workload={"batches": 4, "sequences": 2}))
    steps, ranks = table(trace, "steps"), table(trace, "ranks")
    window = steps["end"].max() - steps["start"].min()
    occupied = max((ranks["flop"] / FLOP_RATE).max(), (ranks["moved"] / HBM).max())
    assert window >= occupied * (1 - 1e-9)
    # One pass takes longer than it occupies anybody: that is what pipelines are for, and why bounds of
    # steps are no bounds of throughput.
    assert np.maximum(steps["bound_compute"], steps["bound_memory"]).sum() > occupied
