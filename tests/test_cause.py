"""The bottleneck of a run and its reason, from the trace alone: a case per reason, and none where none is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pytest import approx
from scenarios import parallel, rail_tree, single_server, table, tiny, trace_of

from clustersim.analysis.cause import EXCHANGE, EXPERT, GPU, SHARD, SPREAD, cause, cause_notes
from clustersim.analysis.hot_experts import AFTER_SERVICE
from clustersim.analysis.summary import summarize
from clustersim.trace.record import Trace

HOT = {"skew": "zipf", "shuffle": False}


def run(**more: Any) -> Trace:
    """Eight ranks with two experts each, in two servers."""
    sections = {
        "deployment": parallel(dp=8),
        "model": {"experts": 16, "layers": 4, "hidden": 256, "ffn": 512},
        **more,
    }
    work = {"sequences": 256, "decode_steps": 3} | more.get("workload", {})
    return trace_of(tiny(rail_tree(2, 4), **{**sections, "workload": work}))


def slow(gpu: object, factor: float) -> list[dict[str, Any]]:
    return [{"kind": "slow_gpu", "gpu": gpu, "factor": factor}]


def note(trace: Trace) -> str:
    """The one line on the bottleneck; empty where there is none."""
    lines = [line for line in summarize(trace)["notes"] if "bottleneck" in line]
    assert lines == list(cause_notes(cause(trace))) and len(lines) <= 1
    return lines[0] if lines else ""


def test_where_all_is_even_nothing_is_the_bottleneck() -> None:
    trace = run()
    assert cause(trace) is None and note(trace) == "" and summarize(trace)["cause"] is None


@pytest.mark.parametrize("level", ["sums", "spans"])
def test_a_hot_rank_is_named_with_its_layer_and_expert(level: str) -> None:
    trace = run(gating=HOT, trace={"level": level})
    found = cause(trace)
    assert found is not None and found["reasons"] == [EXPERT]
    # Without shuffling expert 0 is the hottest of every layer, and rank 0 holds it.
    assert (found["rank"], found["expert"]) == (0, 0)
    queues = table(trace, "experts")
    here = queues["layer"] == found["layer"]
    tokens = queues["tokens"][here].sum()
    assert found["expert_load"] == approx(
        queues["tokens"][here & (queues["expert"] == 0)].sum() * 16 / tokens
    )
    assert found["rank_load"] == approx(queues["tokens"][here & (queues["rank"] == 0)].sum() * 8 / tokens)
    said = note(trace)
    assert said.startswith("Rank 0 (gpu0) is the bottleneck: expert 0 gets ")
    # Every layer draws from the same popularity.
    assert (
        f"gets {found['expert_load']:.1f} x the mean tokens in every layer" in said and "of each step" in said
    )
    assert "slow" not in said


def test_what_the_others_wait_is_what_their_spans_say() -> None:
    trace = run(gating=HOT)
    found, spans = cause(trace), table(trace, "spans")
    assert found is not None
    by_number = np.argsort(spans["span"])
    waited = spans["met"] - spans["start"]
    culprit = spans["rank"][by_number][spans["after"]]
    mine = (spans["kind"] == "exchange") & (waited > 0) & (culprit == found["rank"])
    # Seven others, three steps.
    assert found["wait"] == approx(waited[mine].sum() / 7 / 3)
    assert found["share"] == approx(found["wait"] / summarize(trace)["phases"]["decode"]["period"])


def test_a_slow_gpu_is_told_from_an_overloaded_one() -> None:
    trace = run(faults=slow(5, 2.0))
    found = cause(trace)
    assert found is not None and (found["rank"], found["reasons"]) == (5, [GPU])
    assert found["slowness"] == approx(2.0) and found["expert"] is None
    assert "its GPU takes 2.00 x as long" in note(trace) and "slow, not overloaded" in note(trace)


def test_a_gpu_that_throttles_is_slow_by_what_it_is_on_average() -> None:
    hot = {"kind": "throttled_gpu", "gpu": 5, "factor": 3.0, "period": "50 us", "duty": 0.5}
    found = cause(run(faults=[hot]))
    assert found is not None and (found["rank"], found["reasons"]) == (5, [GPU])
    assert 1.5 < found["slowness"] < 2.5


def test_a_hot_expert_on_a_slow_gpu_tells_both() -> None:
    trace = run(gating=HOT, faults=slow("hottest", 1.5))
    found = cause(trace)
    assert found is not None and found["rank"] == 0 and set(found["reasons"]) == {EXPERT, GPU}
    said = note(trace)
    assert "expert 0 gets" in said and "1.50 x as long" in said and "not overloaded" not in said


def test_a_slow_gpu_is_not_said_to_be_spared_where_it_has_most_tokens() -> None:
    # Attention over long contexts is most of a step, so that the tokens hardly count beside the slowness.
    trace = run(gating=HOT, faults=slow("hottest", 3.0), workload={"prompt_tokens": 20_000})
    found = cause(trace)
    assert found is not None and found["reasons"] == [GPU] and found["rank_load"] > 2.0
    assert "3.00 x as long" in note(trace) and "not overloaded" not in note(trace)


def test_a_slow_gpu_that_nobody_waits_for_is_not_the_cause() -> None:
    # The hot rank takes longer than the slow one.
    found = cause(run(gating=HOT, faults=slow(5, 1.2)))
    assert found is not None and (found["rank"], found["reasons"]) == (0, [EXPERT])


def test_a_slow_link_is_named_and_no_rank_is_blamed() -> None:
    trace = run(faults=[{"kind": "slow_link", "link": "server0/nic1", "factor": 4.0}])
    found = cause(trace)
    assert found is not None and found["reasons"] == ["slow link"] and found["rank"] is None
    assert "server0/nic1" in found["link"]
    links = table(trace, "links")
    here = [
        f"{a}->{b}" == found["link"] for a, b in zip(links["source"], links["target"], strict=True)
    ].index(True)
    # At a quarter of its bandwidth its bytes take four times as long, so three more.
    assert found["wait"] == approx(3 * links["bytes"][here] / links["bandwidth"][here] / 3)
    # What leaves and what enters by it is as much.
    assert found["vertex"] == "server0/nic1" and found["links"] > 1
    assert note(trace).startswith(f"The {found['links']} links of server0/nic1 are the bottleneck")
    assert f"such as {found['link']}, take " in note(trace)


def test_a_link_that_is_slow_but_carries_nothing_costs_nothing() -> None:
    alone = run(faults=[{"kind": "slow_link", "link": "server0/nic1", "factor": 4.0, "start": "100 s"}])
    assert cause(alone) is None


def test_a_fuller_shard_is_the_reason_where_sources_are_ragged() -> None:
    trace = run(workload={"shard_skew": 1.0, "prompt_tokens": 4000})
    found = cause(trace)
    assert found is not None and found["reasons"][0] == SHARD and EXPERT not in found["reasons"]
    shards = np.bincount(table(trace, "requests")["shard"], minlength=8)
    assert found["rank"] == shards.argmax()
    assert "its shard has more to do" in note(trace)


def test_the_cause_is_found_with_pipelines_and_with_sharers_of_an_expert() -> None:
    for deployment in (parallel(dp=4, pp=2), parallel(dp=8, etp=2), parallel(tp=2, dp=4)):
        found = cause(run(gating=HOT, deployment=deployment))
        assert found is not None and found["reasons"] == [EXPERT] and found["expert"] == 0
        assert found["rank"] in (0, 1, 4)
        slowed = cause(run(deployment=deployment, faults=slow(2, 3.0)))
        assert slowed is not None and (slowed["rank"], slowed["reasons"]) == (2, [GPU])
        assert EXCHANGE not in slowed["reasons"]


def test_a_model_without_experts_and_a_single_gpu_have_causes_or_none() -> None:
    dense = {"experts": 0, "top_k": 0, "ffn": 0, "dense_ffn": 512}
    deployment = {"tensor_parallel": 8, "data_parallel": 1, "expert_parallel": 1}
    sections = {"model": dense | {"heads": 8, "kv_heads": 8}, "deployment": deployment}
    found = cause(run(**sections, faults=slow(3, 2.0)))
    assert found is not None and (found["rank"], found["reasons"]) == (3, [GPU])
    assert cause(run(**sections)) is None
    alone = tiny(single_server(1), deployment=parallel(), faults=slow(0, 2.0))
    assert cause(trace_of(alone)) is None


# ---- hot experts on many ranks ------------------------------------------------------------------

#: Gatings whose hot experts lie on another rank in every layer, or in every step.
SCATTERED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "hot": ({"skew": "hot", "hot_experts": 1, "hot_share": 0.5}, ["layer"]),
    "zipf": ({"skew": "zipf"}, ["layer"]),
    "gini": ({"skew": "gini", "gini": 0.6}, ["layer"]),
    "drifting": ({"skew": "gini", "gini": 0.6, "motion": "drifting", "half_life": 10.0}, ["layer"]),
    "rotating": (
        {"skew": "hot", "hot_experts": 2, "motion": "rotating", "rotate_every": 1, "shuffle": False},
        ["step"],
    ),
    "both": (
        {"skew": "hot", "hot_experts": 2, "motion": "rotating", "rotate_every": 1},
        ["layer", "step"],
    ),
}
MANY = {"experts": 16, "layers": 12, "hidden": 256, "ffn": 512}


@pytest.mark.parametrize("name", SCATTERED)
def test_hot_experts_on_a_rank_of_their_own_in_every_layer_or_step_are_the_cause_together(name: str) -> None:
    gating, moves = SCATTERED[name]
    trace = run(model=MANY, gating=gating, workload={"decode_steps": 6})
    found, steps = cause(trace), 6
    assert found is not None and found["reasons"] == [SPREAD] and found["moves"] == moves
    waits = table(trace, "waits")
    served = np.isin(waits["operator"], ["combine"])
    whole = waits["seconds"][served].sum() / 8 / steps
    # Most of what is waited for after the service, and no more.
    assert 0.5 * whole < found["wait"] <= whole * (1 + 1e-9)
    assert found["share"] == approx(found["wait"] / summarize(trace)["phases"]["decode"]["period"])
    # The loss is real: with even load a step takes less, by about that.
    even = run(model=MANY, workload={"decode_steps": 6}).facts["simulated_seconds"] / steps
    lost = trace.facts["simulated_seconds"] / steps - even
    assert found["wait"] == approx(lost, rel=0.5) and 2 <= found["ranks"] <= 8
    said = note(trace)
    assert said.startswith("Hot experts are the bottleneck, on another rank from ")
    worst = found["places"][0]
    assert f"Worst is layer {worst['layer']}: expert {worst['expert']} on rank {worst['rank']} " in said
    assert (found["layer"], found["rank"], found["expert"]) == tuple(
        worst[key] for key in ("layer", "rank", "expert")
    )


def test_the_worst_place_is_the_one_whose_rank_is_done_latest() -> None:
    trace = run(model=MANY, gating={"skew": "gini", "gini": 0.6}, workload={"decode_steps": 1})
    found, queues = cause(trace), table(trace, "experts")
    assert found is not None
    late = {}
    for layer in range(12):
        here = queues["layer"] == layer
        done = np.array([queues["done"][here & (queues["rank"] == rank)].max() for rank in range(8)])
        late[layer, int(done.argmax())] = done.max() - done.mean()
    three = sorted(late, key=lambda place: -late[place])[:3]
    assert [(one["layer"], one["rank"]) for one in found["places"]] == three
    for one in found["places"]:
        here = queues["layer"] == one["layer"]
        tokens, mine = queues["tokens"][here], here & (queues["rank"] == one["rank"])
        assert one["rank_load"] == approx(queues["tokens"][mine].sum() * 8 / tokens.sum())
        most = np.flatnonzero(mine)[queues["tokens"][mine].argmax()]
        assert one["expert"] == queues["expert"][most]
        assert one["expert_load"] == approx(queues["tokens"][most] * 16 / tokens.sum())
        assert one["wait"] == approx(late[one["layer"], one["rank"]], rel=1e-6)


@pytest.mark.parametrize("hot", [0, 3, 5, 7])
def test_a_hot_rank_is_the_cause_alone_whatever_its_number(hot: int) -> None:
    gating = {"skew": "hot_rank", "hot_rank": hot, "hot_share": 0.5}
    for more in ({}, {"deployment": parallel(dp=8, experts={"service": "by_expert"})}):
        found = cause(run(model=MANY, gating=gating, **more))
        assert found is not None and (found["rank"], found["reasons"]) == (hot, [EXPERT])
        assert found["expert"] in (2 * hot, 2 * hot + 1) and found["places"] == []


def test_a_slow_gpu_that_costs_more_than_scattered_hot_experts_is_the_cause_and_less_is_not() -> None:
    gating = {"skew": "gini", "gini": 0.6}
    found = cause(run(model=MANY, gating=gating, faults=slow(5, 8.0)))
    assert found is not None and found["rank"] == 5 and GPU in found["reasons"]
    found = cause(run(model=MANY, gating=gating, faults=slow(5, 1.05)))
    assert found is not None and found["reasons"] == [SPREAD]
    # A slow GPU alone has no hot expert, however many layers it holds up.
    found = cause(run(model=MANY, faults=slow(5, 1.5)))
    assert found is not None and (found["rank"], found["reasons"]) == (5, [GPU])


def test_scattered_hot_experts_are_found_with_pipelines_and_with_sharers_of_an_expert() -> None:
    gating = {"skew": "gini", "gini": 0.6}
    for deployment in (parallel(dp=4, pp=2), parallel(dp=8, etp=2), parallel(tp=2, dp=4)):
        trace = run(model=MANY, gating=gating, deployment=deployment)
        found, waits = cause(trace), table(trace, "waits")
        assert found is not None and found["reasons"] == [SPREAD] and found["moves"] == ["layer"]
        served = np.isin(waits["operator"], AFTER_SERVICE)
        assert found["wait"] <= waits["seconds"][served].sum() / 8 / 3 * (1 + 1e-9)


# ---- what else ----------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [3.0, 2.0])
def test_of_two_slow_gpus_the_second_is_told_with_what_would_stay_without_the_first(second: float) -> None:
    trace = run(faults=[*slow(3, 3.0), *slow(6, second)])
    found = cause(trace)
    assert found is not None and found["reasons"] == [GPU]
    after = found["next"]
    assert {found["rank"], after["rank"]} == {3, 6} and after["reasons"] == [GPU] and after["more"] == 0
    assert after["slowness"] == approx(second, rel=1e-6)
    alone = cause(run(faults=slow(int(after["rank"]), second)))
    assert alone is not None and alone["next"] is None
    # As long as the run without the first really says.
    assert after["wait"] == approx(alone["wait"], rel=0.15)
    said = note(trace)
    assert f"; without it, rank {after['rank']} (gpu{after['rank']}), whose GPU takes {second:.2f} x" in said
    assert said.count("more") == 0


def test_many_equals_are_counted_and_not_listed() -> None:
    found = cause(run(faults=[one for gpu in (1, 4, 6) for one in slow(gpu, 3.0)]))
    assert found is not None and found["next"]["more"] == 1
    (said,) = cause_notes(found)
    assert "whose GPU takes 3.00 x as long, and 1 more would hold the others up" in said


def test_a_hot_rank_that_is_waited_for_beside_a_slow_gpu_is_told() -> None:
    gating = {"skew": "hot_rank", "hot_rank": 5, "hot_share": 0.5}
    trace = run(gating=gating, faults=slow(2, 2.0), workload={"prompt_tokens": 4000})
    found = cause(trace)
    assert found is not None
    assert (found["rank"], found["next"]["rank"]) == (2, 5)
    waits = table(trace, "waits")
    seconds = waits["seconds"][waits["rank"] == found["next"]["rank"]].sum()
    assert found["next"]["now"] == approx(seconds / 7 / 3)
    assert "they also wait" in note(trace) and "which gets " in note(trace)


def test_sharers_of_the_hot_expert_are_not_told_as_a_second_cause() -> None:
    gating = {"skew": "hot_rank", "hot_rank": 1, "hot_share": 0.5}
    found = cause(run(gating=gating, deployment=parallel(dp=8, etp=2)))
    assert found is not None and found["reasons"] == [EXPERT]
    assert found["next"] is None or found["next"]["rank"] // 2 != found["rank"] // 2


def test_a_slow_link_that_a_hot_rank_fills_tells_both() -> None:
    gating = {"skew": "hot_rank", "hot_rank": 1, "hot_share": 0.6}
    link = {"kind": "slow_link", "link": "server0/nic1", "factor": 20.0}
    trace = run(gating=gating, faults=[link])
    found = cause(trace)
    assert found is not None and found["reasons"] == ["slow link"]
    assert found["link_load"] > 1.5 and found["next"]["rank"] == 1
    assert f" {found['link_load']:.1f} x the mean bytes" in note(trace) and "rank 1 (gpu1), which" in note(
        trace
    )


def test_where_steps_overlap_the_share_is_said_to_be_of_the_period() -> None:
    split = run(deployment=parallel(dp=4, pp=2), workload={"microbatches": 2}, faults=slow(5, 3.0))
    found = cause(split)
    assert found is not None and found["step"] > 1.01 * found["period"]
    assert f"({found['share']:.0%} of the " in note(split) and "from one step to the next)" in note(split)
    assert "from one step to the next" not in note(run(faults=slow(5, 3.0)))


def test_layers_alike_are_told_as_one_and_places_that_cost_nothing_are_left_out() -> None:
    trace = run(model=MANY, gating={"skew": "hot_rank", "hot_rank": 5, "hot_share": 0.5})
    found = cause(trace)
    assert found is not None
    assert found["every_layer"] == ("in every layer" in note(trace))
    even = dict(found, every_layer=True)
    assert f"expert {found['expert']} gets" in next(cause_notes(even))
    trace = run(model=MANY, gating={"skew": "gini", "gini": 0.6})
    found = cause(trace)
    assert found is not None and "Worst is" in note(trace)
    faint = dict(found, places=[dict(one, share=0.004) for one in found["places"]])
    assert "Worst is" not in next(cause_notes(faint))
