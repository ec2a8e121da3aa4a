"""What a trace means, against numbers reckoned by hand on the trace of synthetic.py."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx
from scenarios import parallel, rail_tree, trace_of
from scenarios import tiny as scenario
from synthetic import CLAIM, FACTS, tiny

from clustersim.analysis.experts import experts
from clustersim.analysis.latency import distribution, in_flight, latencies, numbers
from clustersim.analysis.schema import _DISTRIBUTION, DISTRIBUTIONS, SCHEMA, schema_page
from clustersim.analysis.summary import summarize
from clustersim.analysis.utilization import (
    STATES,
    busiest,
    gpus,
    links,
    mfu,
    queues,
    spread,
    tiers,
    worst,
)
from clustersim.study.run import set_beside
from clustersim.trace.plain import json_text
from clustersim.trace.record import Recorder, Trace

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=50))
def test_a_distribution_is_what_numpy_says(values: list[float]) -> None:
    found = distribution(values)
    assert found is not None
    for key, level in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        assert found[key] == approx(np.percentile(values, level))
    assert (found["min"], found["max"], found["count"]) == (min(values), max(values), len(values))
    assert found["mean"] == approx(np.mean(values), abs=1e-6)


@given(st.lists(st.tuples(finite, st.integers(0, 9)), min_size=1, max_size=30))
def test_a_weight_is_so_many_copies_of_the_value(pairs: list[tuple[float, int]]) -> None:
    values, weights = [v for v, _ in pairs], [w for _, w in pairs]
    copies = np.repeat(values, weights)
    found = distribution(values, weights)
    if not len(copies):
        assert found is None
        return
    assert found is not None
    assert found["mean"] == approx(copies.mean(), abs=1e-6)
    assert found["p50"] == np.sort(copies)[int(np.ceil(len(copies) * 0.5)) - 1]
    assert (found["min"], found["max"]) == (copies.min(), copies.max())
    assert found["min"] <= found["p50"] <= found["p90"] <= found["p95"] <= found["p99"] <= found["max"]


def test_nothing_has_no_distribution() -> None:
    assert distribution([]) is None
    assert distribution([1.0], [0.0]) is None


def test_decode_alone_pays_for_every_token() -> None:
    # Two tokens each from 0 s to 8 s: 4 s per token. The steps take 3 s and 5 s.
    found = latencies(tiny())
    assert found["tpot"] is not None and found["step"] is not None and found["request"] is not None
    assert found["tpot"]["mean"] == approx(4.0)
    assert found["ttft"] is None
    assert (found["step"]["mean"], found["step"]["min"], found["step"]["max"]) == approx((4.0, 3.0, 5.0))
    assert found["request"]["p99"] == approx(8.0)


def test_after_prefill_the_gaps_are_one_fewer_than_the_tokens() -> None:
    # Arrival 0 s, first token 2 s, third token 8 s: TTFT 2 s, TPOT 3 s. The second request made one
    # token only, so it has a TTFT of 3 s and no TPOT.
    ran = {"started": 1.0, "first_token": [2.0, 3.0], "input_tokens": 5, "output_tokens": [3, 1]}
    found = latencies(tiny(requests=ran))
    assert found["tpot"] is not None and found["ttft"] is not None
    assert (found["tpot"]["mean"], found["tpot"]["count"]) == (approx(3.0), 1)
    assert (found["ttft"]["mean"], found["ttft"]["count"]) == (approx(2.5), 2)


def test_prefill_without_output_has_no_token_times() -> None:
    ran = {"first_token": float("nan"), "input_tokens": 5, "output_tokens": 0}
    found = latencies(tiny(requests=ran))
    assert found["tpot"] is None and found["ttft"] is None


def test_throughput_counts_from_first_arrival_to_last_finish() -> None:
    # 4 tokens made and 10 read between 1 s and 8 s.
    found = summarize(tiny(requests={"arrival": [1.0, 2.0], "input_tokens": 5}))["throughput"]
    assert found["output_tokens_per_second"] == approx(4 / 7)
    assert found["input_tokens_per_second"] == approx(10 / 7)
    assert found["total_tokens_per_second"] == approx(14 / 7)


def test_a_request_that_starts_when_another_ends_is_not_beside_it() -> None:
    assert in_flight(tiny()) == 2
    assert in_flight(tiny(requests={"started": [0.0, 4.0], "finish": [4.0, 8.0]})) == 1


def test_a_phase_is_timed_from_its_first_start_to_its_last_end() -> None:
    found = summarize(tiny())["phases"]
    assert list(found) == ["decode"]
    decode = found["decode"]
    assert (decode["steps"], decode["tokens"]) == (2, 4)
    assert decode["tokens_per_second"] == approx(0.5)
    assert decode["bounds"] == {
        "compute": approx(0.1),
        "memory": approx(1.5),
        "network": approx(0.5),
        "bound_by": "memory",
    }


def test_parts_are_seconds_per_step_and_gpu() -> None:
    # Two steps on two GPUs: every sum is divided by four.
    parts = {part["operator"]: part for part in summarize(tiny())["phases"]["decode"]["parts"]}
    assert list(parts) == ["attention", "send", "combine"]
    assert (parts["attention"]["busy"], parts["attention"]["wait"]) == approx((1.75, 0.0))
    assert (parts["combine"]["busy"], parts["combine"]["wait"]) == approx((0.5, 0.5))
    assert (parts["send"]["busy"], parts["send"]["stream"]) == (approx(1.25), "transfer")


def test_gpu_shares_are_those_of_the_compute_stream() -> None:
    first, second = gpus(tiny())
    assert [first[state] for state in STATES] == approx([0.4, 0.1, 0.0, 0.5])
    assert [second[state] for state in STATES] == approx([0.3, 0.1, 0.2, 0.4])
    assert (first["mfu"], second["mfu"]) == approx((0.2, 0.1))
    assert mfu(tiny()) == approx(0.15)
    assert first["waited_for"] is None
    assert second["waited_for"] == {"operator": "combine", "rank": 0}


@given(st.integers(0, 2**32), st.integers(1, 9))
def test_gpu_shares_add_up_to_one(seed: int, ranks: int) -> None:
    rng = np.random.default_rng(seed)
    recorder, per_rank = Recorder(), 4
    recorder.code("sums", "operator", "x")
    order = rng.permutation(ranks)
    recorder.rows(
        "ranks",
        rank=order,
        gpu=[f"g{n}" for n in order],
        server=0,
        stage=0,
        shard=0,
        flop_rate=1.0,
        memory_bandwidth=1.0,
        memory=1.0,
        flop=0.0,
        moved=0.0,
        priced=0.0,
    )
    time = rng.dirichlet(np.ones(2 * per_rank + 1), ranks)[:, :-1] * 3.0
    recorder.rows(
        "sums",
        rank=np.repeat(np.arange(ranks), per_rank),
        stream="compute",
        operator="x",
        phase="decode",
        kind=["compute", "exchange"] * (ranks * per_rank // 2),
        count=1,
        busy=time[:, :per_rank].ravel(),
        wait=time[:, per_rank:].ravel(),
        waited_for=0,
    )
    found = gpus(recorder.finish({"simulated_seconds": 3.0}))
    assert [entry["rank"] for entry in found] == order.tolist()
    for entry in found:
        assert sum(entry[state] for state in STATES) == approx(1.0, abs=1e-12)
        assert all(entry[state] >= 0 for state in STATES)


def test_the_worst_gpus_are_those_longest_without_work() -> None:
    found = gpus(tiny())
    assert [gpu["rank"] for gpu in worst(found, 5)] == [1, 0]
    assert spread(found, "wait") == {"min": 0.0, "mean": approx(0.1), "max": approx(0.2)}
    assert spread([], "wait") is None


def test_a_link_is_used_as_far_as_it_carried_what_it_could() -> None:
    found = links(tiny())
    assert [link["utilization"] for link in found] == approx([0.5, 0.0])
    assert [link["link"] for link in busiest(found, 5)] == ["s0/gpu0->s0/nvswitch"]
    assert tiers(found)["gpu-nvswitch"] == {"links": 1, "bytes": 50.0, "mean": 0.5, "max": 0.5}


def test_what_waits_for_links_is_averaged_over_the_run_and_the_links_of_a_tier() -> None:
    # 6 B wait for one link for 4 s of 10 s, at most 9 B; nothing ever for the other, of another tier.
    assert queues(tiny()) == {
        "gpu-nvswitch": {"mean": approx(2.4), "max": 9.0},
        "nvswitch-gpu": {"mean": 0.0, "max": 0.0},
    }


def test_links_without_queues_have_no_depth() -> None:
    empty = {name: column[:0] for name, column in tiny().tables["queues"].items()}
    assert queues(Trace({**tiny().tables, "queues": empty}, tiny().facts)) is None


def test_expert_queues_are_weighed_by_their_tokens() -> None:
    found = experts(tiny())
    assert found is not None
    # Ranks get 3 and 1 tokens, then 0 and 4: 3 ÷ 2 and 4 ÷ 2.
    assert found["imbalance"] == {"mean": approx(1.75), "max": approx(2.0)}
    # One token waited 0.1 s, three 0.5 s, four 1 s; the last queue stood from 4 s to 6 s.
    assert found["queue_wait"] == {
        "mean": approx(0.7),
        "p50": approx(0.5),
        "p99": approx(1.0),
        "max": approx(2.0),
        "coming": approx(3.7 / 8),
        "behind": approx(1.9 / 8),
    }
    # 5.6 token-seconds of waiting on two ranks in 10 s.
    assert found["queue_length"] == {"mean": approx(8 / 3), "max": 4, "over_time": approx(0.28)}
    # Rank 0: three tokens take 0.9 / 3 + 0.5 s; rank 1: one 0.2 s, four 0.25 + 1 s. Though the last waited
    # longer for others still to come, that does not make their rank the slowest.
    assert found["slowest"].pop("over") > 1.0
    assert found["slowest"] == {
        "rank": 1,
        "layer": 0,
        "expert": 1,
        "coming": approx(3.1 / 5),
        "behind": approx(1.0 / 5),
        "service": approx((0.2 + 4 * 1.0) / 5),
    }
    assert (found["service"]["p50"], found["service"]["max"]) == approx((0.5, 1.0))
    assert found["tokens"] == 8


@given(st.integers(0, 2**32), st.integers(1, 40))
def test_imbalance_is_what_a_loop_over_rows_says(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    passes, layers, ranks = (rng.integers(0, n, rows) for n in (3, 4, 5))
    tokens = rng.integers(0, 4, rows)
    load: dict[tuple[int, int], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for one, layer, rank, n in zip(passes, layers, ranks, tokens, strict=True):
        load[one, layer][rank] += n
    wanted = [
        max(of_rank.values()) / (sum(of_rank.values()) / len(of_rank))
        for of_rank in load.values()
        if sum(of_rank.values())
    ]
    recorder = Recorder()
    waits = ("wait", "behind", "wait_p50", "wait_p99", "wait_max")
    times = dict.fromkeys(("first_arrival", "last_arrival", "served", "done", *waits), 0.0)
    places = {"token_batch": passes, "layer": layers, "rank": ranks, "ep_rank": ranks, "slot": 0, "expert": 0}
    recorder.rows("experts", **places, tokens=tokens, length=tokens, **times)
    recorder.rows("token_waits", phase="decode", wait=0.0, tokens=int(tokens.sum()))
    found = experts(recorder.finish(FACTS))
    if not wanted:
        assert found is None
        return
    assert found is not None
    assert found["imbalance"] == {"mean": approx(np.mean(wanted)), "max": approx(max(wanted))}


def test_memory_is_that_of_the_fullest_rank() -> None:
    assert summarize(tiny())["memory"] == {
        "rank": 1,
        "gpu": "s0/gpu1",
        "parts": {"weights": 60.0, "kv": 30.0},
        "total": 90.0,
        "capacity": 100.0,
    }


def test_claims_stand_beside_what_was_found() -> None:
    found = summarize(tiny(claimed=CLAIM))["claimed"]
    assert found["total_tokens_per_second"] == {"claimed": 450.0, "found": 0.5, "ratio": approx(0.5 / 450)}
    assert found["tpot"] == {"claimed": 1.0, "found": 4.0, "ratio": 4.0}
    assert (found["source"], found["against"]) == ("a brochure", "other")
    half = summarize(tiny(claimed={"source": "x", "tpot": None, "total_tokens_per_second": 1.0}))["claimed"]
    assert half["tpot"] is None


def test_claims_that_contradict_each_other_or_a_bound_are_named() -> None:
    notes = summarize(tiny(claimed=CLAIM))["notes"]
    # 450 tokens/s x 1 s = 450 sequences, there were 2; 1.5 s of HBM reading against 1 s; 200 FLOP at
    # 100/s, 30 bytes of HBM at 10/s, 50 bytes over a link of 10/s: 4 tokens take 5 s at least.
    assert "450 tokens/s x 1 s per token are 450 sequences in flight; the run had 2." in notes[0]
    assert "reading HBM alone takes 1.5 s per decode step; 1 s is shorter by a factor 1.5." in notes[1]
    assert "4 tokens occupy the busiest GPU or link for at least 5 s" in notes[2]
    assert "which allows 0.8 tokens/s at most; 450 tokens/s is more by a factor 562." in notes[2]


def test_a_claim_that_can_be_true_gets_no_sentence() -> None:
    claim = {"source": "x", "total_tokens_per_second": 0.75, "tpot": 2.6}
    assert not [note for note in summarize(tiny(claimed=claim))["notes"] if "claimed" in note]


def test_what_stands_out_is_said() -> None:
    said = " ".join(summarize(tiny(faults=True, simulated_seconds=6.0))["notes"])
    assert "Faults were at work: slow_gpu at rank 1." in said
    assert "Experts are unevenly loaded" in said
    assert "GPUs wait for others" not in said


def test_long_waits_full_links_and_full_memory_stand_out() -> None:
    trace = tiny(simulated_seconds=12.0)
    # Rank 1 now waits 6 of 12 s, rank 0 not at all: a quarter in the mean.
    for table, column, factor in (("sums", "wait", 3.0), ("links", "bytes", 1.9), ("memory", "bytes", 1.1)):
        trace.tables[table][column] = numbers(trace.tables[table], column) * factor
    said = summarize(trace)["notes"]
    assert "GPUs wait for others 25% of the time, most of all in combine." in said
    assert any("capacity used: 1, most of all s0/gpu0->s0/nvswitch with 95%." in note for note in said)
    assert "Memory is nearly full: 99% of the HBM of rank 1 is taken." in said


def test_prices_are_told_by_origin_by_table_and_by_what_lies_beyond_measurements() -> None:
    found = summarize(tiny())
    shares = {"measured": 0.5, "interpolated": 0.3, "extrapolated": 0.2, "formula": 0.0}
    assert found["prices"]["shares"] == pytest.approx(shares)
    assert found["prices"]["bases"] == [{"basis": "h100_sxm bf16 trtllm", "share": 1.0}]
    (beyond,) = found["prices"]["beyond"]
    assert (beyond["operator"], beyond["share"], beyond["octaves"]) == ("attention", 0.2, 1.5)
    assert (
        "100% of the computing time was priced by measurements of h100_sxm, scaled to the data sheet "
        "of h200_sxm." in found["notes"]
    )
    assert (
        "20% of the computing time lies beyond what was measured: attention (attention_decode, 20%, up to "
        "1.5 octaves outside)." in found["notes"]
    )


def test_the_bill_of_moving_experts_by_hand() -> None:
    summary = summarize(tiny(rebalances=True))
    found = summary["rebalancing"]
    assert (found["planned"], found["moved"], found["finished"], found["copies"]) == (2, 1, 1, 2)
    assert found["idle"] == {"below_threshold": 0, "nothing_better": 1, "too_late": 0}
    assert found["offered"] == {"before": 1.1, "wished": 1.08}
    assert (found["bytes"], found["moving"], found["stopped"], found["stopped_share"]) == (
        8.0,
        0.5,
        0.5,
        0.05,
    )
    # Busiest 3 and 4 of a mean of 2; at the first places 4 and 4.
    assert found["imbalance"] == {"mean": 1.75, "max": 2.0, "first": 2.0}
    assert found["of_moves"] == {"before": 1.5, "foreseen": 1.0, "after": 1.25, "unmoved": 1.75}
    # Ranks served 3, 1, 0 and 4 tokens in 0.5, 0.2, 0 and 1 s: by least squares 0.23 s for a token more,
    # and one was spared.
    assert found["gained"] == pytest.approx(0.23) and found["net"] == pytest.approx(-0.27)
    placed, estimate = summary["notes"][-2:]
    assert placed.startswith("Experts were placed anew once (2 planned): 8 B of weights")
    assert "1.75 x the mean tokens, at the first places it would have been 2.00 x." in placed
    assert "this cost 270 ms net of the stops" in estimate
    assert summarize(tiny())["rebalancing"] is None


VARIANTS: dict[str, Trace] = {
    "whole": tiny(claimed=CLAIM, faults=True, rebalances=True),
    "sums only": tiny(spans=False),
    "no experts": tiny(experts=False),
    "prefill": tiny(requests={"first_token": float("nan"), "input_tokens": 5, "output_tokens": 0}),
    "nothing happened": Recorder().finish({"name": "void", "simulated_seconds": 0.0}),
    "claim without run": Recorder().finish({"simulated_seconds": 0.0, "claimed": CLAIM}),
    "not a number": tiny(wall_seconds=float("nan")),
}


def test_algorithms_are_told_by_their_share_of_a_kinds_exchanges() -> None:
    assert summarize(VARIANTS["whole"])["algorithms"] == {
        "all_to_all": {"pairwise": 0.25, "hierarchical": 0.75},
        "point_to_point": {"direct": 1.0},
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_every_summary_is_json_without_nan_and_has_every_key(name: str) -> None:
    summary = summarize(VARIANTS[name])
    assert json.loads(json_text(summary)) == summary
    assert "NaN" not in json_text(summary) and "Infinity" not in json_text(summary)
    assert summary.keys() == {re.split(r"\W", key)[0] for key in SCHEMA}


def paths(value: Any, place: str = "") -> set[str]:
    """Every key path of a summary, written as the schema writes it."""
    if place in DISTRIBUTIONS:
        assert value is None or value.keys() == _DISTRIBUTION.keys()
        return {place}
    if isinstance(value, dict):
        free = {
            "phases": "<phase>",
            "prices.shares": "<origin>",
            "tiers": "<tier>",
            "queues": "<tier>",
            "memory.parts": "<part>",
            "algorithms": "<kind>",
            "algorithms.<kind>": "<algorithm>",
            "beside.found": "<number>",
            "beside.ratio": "<number>",
        }.get(place)
        parts = [paths(entry, f"{place}.{free or key}".lstrip(".")) for key, entry in value.items()]
        return set().union(*parts)
    if isinstance(value, list) and place != "notes":
        return set().union(*(paths(entry, f"{place}[]") for entry in value))
    return {place}


def test_the_schema_names_exactly_the_keys_of_a_summary() -> None:
    whole = summarize(VARIANTS["whole"])
    compared = {**whole, "beside": set_beside("itself", whole, whole)}
    # One cause has no layer, the other no places, and only with a slow GPU there is a second one.
    scattered = scenario(
        rail_tree(2, 4),
        deployment=parallel(dp=8),
        model={"experts": 16, "layers": 8, "ffn": 512},
        workload={"sequences": 256},
        gating={"skew": "zipf"},
        faults=[{"kind": "slow_gpu", "gpu": 5, "factor": 1.5}],
    )
    compared["cause"] = summarize(trace_of(scattered))["cause"]
    assert compared["cause"].keys() == whole["cause"].keys()
    found = paths(compared) - {"gpus[].waited_for"}
    assert found == SCHEMA.keys()


def test_the_schema_page_is_the_one_in_the_docs() -> None:
    page = Path(__file__).parent.parent / "docs" / "summary.md"
    assert page.read_text(encoding="utf-8") == schema_page(), "print it again: see docs/summary.md"
