"""Queues of experts: disciplines of service, chunks, and how long tokens wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pytest import approx
from scenarios import MODEL, parallel, single_server, table, tiny, trace_of

from clustersim.analysis.summary import summarize
from clustersim.engine.gpu import ORDERS
from clustersim.engine.queues import TokenWaits, waits_of
from clustersim.errors import ClustersimError
from clustersim.plan import lowering
from clustersim.spec.scenario import Scenario
from clustersim.trace.record import Trace

CHUNK = 3
STARTS: dict[str, dict[str, Any]] = {
    "all_arrived": {},
    "expert_complete": {"start": "expert_complete"},
    "chunks": {"start": "chunks", "chunk_tokens": CHUNK},
}
DISCIPLINES = [(start, order) for start in STARTS for order in ORDERS]


def crowded(start: str, order: str, all_to_all: str = "pairwise", **more: Any) -> Scenario:
    """Four ranks with four experts each, slow wires, skewed load: queues form."""
    experts = {"service": "by_expert", "order": order, **STARTS[start]}
    return tiny(
        single_server(4, nvlink=2e8),
        model={"experts": 16},
        deployment=parallel(dp=4, experts=experts, algorithms={"all_to_all": all_to_all}),
        workload={"sequences": 48, "decode_steps": 2},
        gating={"skew": "zipf"},
        trace={"level": "flows"},
        **more,
    )


# ---- Little's law -------------------------------------------------------------------------------


def arrivals_and_services(scenario: Scenario, trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Every event of every rank's queues as (s, tokens): float64[A, 2] that come, [B, 2] that are begun to
    be served. From flows and spans alone, but for how many tokens each expert got."""
    flows, spans, queues = (table(trace, name) for name in ("flows", "spans", "experts"))
    width = MODEL["hidden"] * 2.0  # type: ignore[operator]
    sent = flows["operator"] == "dispatch"
    came = [np.stack([flows["end"], flows["bytes"] / width], axis=1)[sent]]
    served = []
    for batch, layer in sorted(set(zip(queues["token_batch"], queues["layer"], strict=True))):
        here = (queues["token_batch"] == batch) & (queues["layer"] == layer)
        most = {int(slot): queues["tokens"][here & (queues["slot"] == slot)].max() for slot in range(4)}
        for rank in range(4):
            mine = (spans["token_batch"] == batch) & (spans["layer"] == layer) & (spans["rank"] == rank)
            tokens = dict(
                zip(queues["slot"][here & (queues["rank"] == rank)],
                    queues["tokens"][here & (queues["rank"] == rank)], strict=True)
            )  # fmt: skip
            into = sent & (flows["token_batch"] == batch) & (flows["layer"] == layer)
            over_wires = flows["bytes"][into & (flows["target"] == rank)].sum() / width
            # Its own tokens stand in a rank's queues when it begins to send: once all are there, or at once.
            all_to_all = scenario.deployment.algorithms.all_to_all
            began = "start" if all_to_all == "one_sided" else "met"
            met = spans[began][mine & (spans["operator"] == "dispatch")][0]
            came.append(np.array([[met, sum(tokens.values()) - over_wires]]))
            begun = iter(spans["met"][mine & (spans["operator"] == "expert_gemm_1")])
            for slot in range(4):
                parts = [tokens[slot]]
                if scenario.deployment.experts.start == "chunks":
                    count = max(-(-int(most[slot]) // CHUNK), 1)
                    parts = [min(max(tokens[slot] - at * CHUNK, 0), CHUNK) for at in range(count)]
                served += [(next(begun), part) for part in parts]
            assert next(begun, None) is None
    return np.concatenate(came), np.array(served)


@pytest.mark.parametrize("all_to_all", ["pairwise", "one_sided"])
@pytest.mark.parametrize("start, order", DISCIPLINES)
def test_the_mean_queue_is_arrival_rate_times_mean_wait(start: str, order: str, all_to_all: str) -> None:
    slow = [{"kind": "slow_gpu", "gpu": 1, "factor": 3.0}]
    scenario = crowded(start, order, all_to_all, faults=slow)
    trace = trace_of(scenario)
    came, served = arrivals_and_services(scenario, trace)
    assert came[:, 1].sum() == approx(served[:, 1].sum())
    # The number that wait, from event to event, and its mean over the run.
    events = np.concatenate([came, served * [1, -1]])
    events = events[np.argsort(events[:, 0], kind="stable")]
    waiting = np.cumsum(events[:, 1])
    window = trace.facts["simulated_seconds"]
    mean_length = float((waiting[:-1] * np.diff(events[:, 0])).sum()) / window
    found = summarize(trace)["experts"]
    rate = came[:, 1].sum() / window
    assert mean_length > 1.0, "queues form, or the law says nothing"
    assert mean_length == approx(rate * found["queue_wait"]["mean"], rel=1e-9)
    assert mean_length == approx(4 * found["queue_length"]["over_time"], rel=1e-9)


# ---- disciplines --------------------------------------------------------------------------------


def counts_of(monkeypatch: pytest.MonkeyPatch, counts: list[list[int]]) -> None:
    """Every layer gets these counts [N, E]."""
    fixed = np.array(counts)
    monkeypatch.setattr(
        lowering, "expert_counts", lambda tokens, model, *rest: np.stack([fixed] * model.layers)
    )


def served_on_rank_0(monkeypatch: pytest.MonkeyPatch, counts: list[list[int]], **experts: Any) -> list[int]:
    """The experts of rank 0 in layer 0 in the order in which they are served."""
    counts_of(monkeypatch, counts)
    sequences = sum(counts[0])
    scenario = tiny(
        single_server(2, nvlink=1e6),
        model={"experts": 6, "top_k": 1},
        deployment=parallel(dp=2, experts={"service": "by_expert", **experts}),
        workload={"sequences": 2 * sequences},
    )
    queues = table(trace_of(scenario), "experts")
    return queues["expert"][:3][np.argsort(queues["served"][:3], kind="stable")].tolist()


@pytest.mark.parametrize("start", ["all_arrived", "expert_complete"])
@pytest.mark.parametrize(
    "order, served", [("arrival", [1, 0, 2]), ("longest_first", [2, 0, 1]), ("as_listed", [0, 1, 2])]
)
def test_experts_that_could_be_served_follow_their_discipline(
    start: str, order: str, served: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rank 0 holds experts 0 to 2. Expert 1 has tokens of its own rank only, so it is complete at once; those
    # of the others come together over the wire, and expert 2 has most.
    counts = [[1, 1, 2, 2, 0, 0], [2, 0, 4, 0, 0, 0]]
    found = served_on_rank_0(monkeypatch, counts, start=start, order=order)
    if start == "expert_complete":
        # Nobody else is complete when expert 1 is.
        served = [1, *(expert for expert in served if expert != 1)]
    assert found == served


def test_chunks_are_served_while_others_arrive_and_the_rest_waits_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Expert 0 on rank 0 gets 5 tokens of its own rank and 2 over a slow wire: in chunks of 2, two can be
    # served at once, the third when those of the other rank are there, and the last token after it.
    counts_of(monkeypatch, [[5, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 5]])
    scenario = tiny(
        single_server(2, nvlink=1e5),
        model={"experts": 6, "top_k": 1, "layers": 1},
        deployment=parallel(dp=2, experts={"service": "by_expert", "start": "chunks", "chunk_tokens": 2}),
        workload={"sequences": 14},
    )
    trace = trace_of(scenario)
    spans, queues = table(trace, "spans"), table(trace, "experts")
    mine = (spans["rank"] == 0) & (spans["operator"] == "expert_gemm_1")
    begun, done = spans["met"][mine][:4], spans["end"][mine][:4]
    met, wire = queues["first_arrival"][0], queues["last_arrival"][0]
    one = (spans["end"] - spans["met"])[(spans["rank"] == 0)]
    chunk = spans["end"][(spans["rank"] == 0) & (spans["operator"] == "expert_gemm_2")][:4] - begun
    assert (one >= 0).all() and wire == approx(met + 2 * 128 / 1e5)
    assert begun.tolist() == approx([met, met + chunk[0], wire, wire + chunk[2]], rel=1e-12)
    # Chunks of equal size cost the same, and read the weights each time; a single token is read as dear.
    assert chunk[0] == approx(chunk[1]) == approx(chunk[2]) and done[3] - begun[3] > 0.5 * (
        done[0] - begun[0]
    )
    # 2 at once, 2 after the first chunk, the fifth until the others come; those two: 0 and one chunk.
    waits = [0, 0, chunk[0], chunk[0], wire - met, 0, chunk[2]]
    assert queues["wait"][0] == approx(sum(waits))
    assert queues["wait_max"][0] == approx(wire - met)
    assert queues["wait_p50"][0] == approx(sorted(waits)[3])
    assert queues["done"][0] == approx(begun[3] + chunk[3])


def test_one_chunk_for_all_is_service_when_an_expert_is_complete() -> None:
    def run(**experts: Any) -> dict[str, np.ndarray]:
        scenario = crowded("expert_complete", "arrival")
        wish = scenario.deployment.experts.model_copy(update=experts)
        deployment = scenario.deployment.model_copy(update={"experts": wish})
        return table(trace_of(scenario.model_copy(update={"deployment": deployment})), "experts")

    complete, chunks = run(), run(start="chunks", chunk_tokens=10_000)
    for name in complete:
        assert np.array_equal(complete[name], chunks[name], equal_nan=complete[name].dtype.kind == "f")


def test_more_chunks_than_can_be_simulated_are_refused_with_a_size_that_can() -> None:
    with pytest.raises(ClustersimError, match=r"chunk_tokens: an expert with .* is enough"):
        trace_of(
            tiny(
                deployment=parallel(
                    dp=2, experts={"service": "by_expert", "start": "chunks", "chunk_tokens": 1}
                ),
                workload={"phase": "prefill", "prompt_tokens": 100},
            )
        )


# ---- waits --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    tokens=arrays(np.int64, (1, 4, 2), elements=st.integers(0, 5)),
    there=arrays(np.float64, (1, 4, 2), elements=st.floats(0, 10)),
    size=st.integers(1, 6),
    service=st.floats(0.1, 3.0),
)
def test_waits_are_those_of_the_tokens_one_by_one(
    tokens: np.ndarray, there: np.ndarray, size: int, service: float
) -> None:
    there = np.where(tokens > 0, there, np.nan)
    total = tokens.sum(axis=1)
    parts = max(int(-(-total.max() // size)), 1)
    sizes = np.stack([np.clip(total - at * size, 0, size) for at in range(parts)], axis=2).astype(float)
    begun = np.broadcast_to(10.0 + service * np.arange(parts), sizes.shape)
    found = waits_of(there, tokens, begun, sizes)
    for copy in range(2):
        came = sorted(np.repeat(there[0, :, copy], tokens[0, :, copy]).tolist())
        waits = np.array([10.0 + service * (n // size) - at for n, at in enumerate(came)])
        assert found.total()[0, copy] == approx(waits.sum(), abs=1e-9)
        if not len(waits):
            assert np.isnan(found.longest()[0, copy]) and np.isnan(found.quantile(0.5)[0, copy])
            continue
        assert found.longest()[0, copy] == approx(waits.max())
        for level in (0.5, 0.99):
            exact = np.quantile(waits, level, method="inverted_cdf")
            assert found.quantile(level)[0, copy] == approx(exact)


def test_bins_of_waits_lose_no_token_and_quantiles_next_to_nothing() -> None:
    rng = np.random.default_rng(5)
    waits, tokens = rng.lognormal(-9.0, 2.0, 5000), rng.integers(0, 4, 5000)
    waits[:100] = 0.0
    bins = TokenWaits()
    for part in np.array_split(np.arange(5000), 7):
        bins.add(waits[part], tokens[part])
    mean, count = bins.rows()
    assert count.sum() == tokens.sum() and mean @ count == approx(waits @ tokens)
    assert (np.diff(mean) > 0).all() and mean[0] == 0.0
    every = np.repeat(waits, tokens)
    for level in (0.05, 0.5, 0.99):
        at = np.searchsorted(np.cumsum(count), level * count.sum())
        assert mean[at] == approx(np.quantile(every, level, method="inverted_cdf"), rel=1.1e-3)


@pytest.mark.parametrize("service", ["grouped", "all_arrived", "expert_complete"])
@pytest.mark.parametrize("hot", [0, 1, 3])
def test_the_slowest_queue_is_the_hot_ranks_and_not_one_that_waits_for_senders(
    hot: int, service: str
) -> None:
    experts = {} if service == "grouped" else {"service": "by_expert", **STARTS[service]}
    gating = {"skew": "hot_rank", "hot_rank": hot, "hot_share": 0.6}

    def found(**more: Any) -> dict[str, Any]:
        scenario = tiny(
            single_server(4, nvlink=2e8),
            model={"experts": 16, "ffn": 4096},
            deployment=parallel(dp=4, experts=experts),
            workload={"sequences": 96, "decode_steps": 2},
            gating=gating,
            **more,
        )
        slowest: dict[str, Any] = summarize(trace_of(scenario))["experts"]["slowest"]
        return slowest

    assert found()["rank"] == hot and found()["expert"] // 4 == hot
    # A GPU that is slow enough holds its tokens up longer than the hot one, a little slower it does not.
    other = (hot + 2) % 4
    assert found(faults=[{"kind": "slow_gpu", "gpu": other, "factor": 20.0}])["rank"] == other
    assert found(faults=[{"kind": "slow_gpu", "gpu": other, "factor": 1.01}])["rank"] == hot


@settings(max_examples=30, deadline=None)
@given(
    tokens=arrays(np.int64, (1, 4, 2), elements=st.integers(0, 5)),
    there=arrays(np.float64, (1, 4, 2), elements=st.floats(0, 10)),
    size=st.integers(1, 6),
    over=st.floats(0, 12),
)
def test_waiting_behind_other_work_begins_when_all_is_there_that_is_served_together(
    tokens: np.ndarray, there: np.ndarray, size: int, over: float
) -> None:
    there = np.where(tokens > 0, there, np.nan)
    total = tokens.sum(axis=1)
    parts = max(int(-(-total.max() // size)), 1)
    sizes = np.stack([np.clip(total - at * size, 0, size) for at in range(parts)], axis=2).astype(float)
    begun = np.broadcast_to(12.0 + np.arange(parts), sizes.shape)
    behind = waits_of(there, tokens, begun, sizes).behind(np.full((1, 2), over))
    for copy in range(2):
        came = sorted(np.repeat(there[0, :, copy], tokens[0, :, copy]).tolist())
        chunks = [came[at : at + size] for at in range(0, len(came), size)]
        late = [len(chunk) * (12.0 + at - max(chunk[-1], over)) for at, chunk in enumerate(chunks)]
        assert behind[0, copy] == approx(sum(late), abs=1e-9)


@pytest.mark.parametrize("start, order", DISCIPLINES)
def test_what_is_served_first_waits_behind_nothing_and_grouped_experts_never_do(
    start: str, order: str
) -> None:
    queues = table(trace_of(crowded(start, order)), "experts")
    assert (queues["behind"] >= -1e-12).all() and (queues["behind"] <= queues["wait"] + 1e-12).all()
    if start != "chunks":
        for batch, layer, rank in {
            tuple(row) for row in np.stack([queues[n] for n in ("token_batch", "layer", "rank")], axis=1)
        }:
            mine = (queues["token_batch"] == batch) & (queues["layer"] == layer) & (queues["rank"] == rank)
            used = np.flatnonzero(mine & (queues["tokens"] > 0))
            first = used[queues["served"][used].argmin()]
            assert queues["behind"][first] == approx(0.0, abs=1e-12)
            last = used[queues["served"][used].argmax()]
            assert len(used) < 2 or start == "expert_complete" or queues["behind"][last] > 0
    grouped = crowded(start, order)
    wish = grouped.deployment.experts.model_copy(
        update={"service": "grouped", "start": "all_arrived", "chunk_tokens": 0}
    )
    deployment = grouped.deployment.model_copy(update={"experts": wish})
    together = table(trace_of(grouped.model_copy(update={"deployment": deployment})), "experts")
    assert together["behind"] == approx(0.0, abs=1e-12) and together["wait"].sum() > 0


def test_the_slowest_queue_is_named_with_its_rank_layer_and_expert() -> None:
    slow = [{"kind": "slow_gpu", "gpu": 2, "factor": 20.0}]
    trace = trace_of(crowded("all_arrived", "as_listed", faults=slow))
    found, queues = summarize(trace)["experts"]["slowest"], table(trace, "experts")
    assert found["rank"] == 2
    here = np.all([queues[name] == found[name] for name in ("rank", "layer", "expert")], axis=0)
    tokens = queues["tokens"][here]
    whole = found["coming"] + found["behind"]
    assert whole == approx(queues["wait"][here].sum() / tokens.sum())
    service = (queues["done"] - queues["served"])[here]
    assert found["service"] == approx((service * tokens).sum() / tokens.sum())
    # Of the experts of that rank and layer, the one whose tokens take most time in all.
    there = (queues["rank"] == 2) & (queues["layer"] == found["layer"])
    held = queues["behind"] + (queues["done"] - queues["served"]) * queues["tokens"]
    each = np.bincount(queues["expert"][there], weights=held[there])
    assert each.argmax() == found["expert"] and found["behind"] == approx(
        queues["behind"][here].sum() / tokens.sum()
    )
