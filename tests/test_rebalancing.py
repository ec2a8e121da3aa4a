"""Experts placed anew while a model runs: the laws of a move, its bill, and cases reckoned by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from scenarios import MODEL, NVLINK, parallel, rail_tree, same_tables, single_server, table, tiny, trace_of

from clustersim.analysis.latency import token_gaps
from clustersim.analysis.rebalancing import rebalancing
from clustersim.analysis.summary import summarize
from clustersim.engine.rebalancing import PLANS
from clustersim.physics.exchanges import over_links
from clustersim.plan.amending import amended
from clustersim.plan.layout import Layout, lay_out
from clustersim.plan.memory import does_not_fit, needs
from clustersim.plan.moves import chunks, moves, settled
from clustersim.plan.packing import eplb, imbalance
from clustersim.spec.checks import gpu_of
from clustersim.spec.scenario import Scenario
from clustersim.trace.record import Trace

#: Bytes of an expert of MODEL: two matrices of 64 x 128 in bf16.
EXPERT = 2 * 64 * 128 * 2

#: Popularities so uneven that any policy that looks at loads moves something.
SKEWED = {"skew": "zipf", "exponent": 1.5, "shuffle": True}
DRIFT = {**SKEWED, "motion": "rotating", "rotate_every": 4}


def loop(
    topology: dict[str, Any] | None = None, gating: dict[str, Any] = SKEWED, policy: str = "balanced",
    spare: int = 0, tp: int = 1, pp: int = 1, dp: int = 4, etp: int = 1, **how: Any,
) -> Scenario:  # fmt: skip
    """Eight experts over four GPUs, twelve decode steps; rebalancing as in `how`."""
    workload = how.pop("workload", {})
    experts = {"policy": policy, "spare": spare, "rebalance": {"every": 3, "least_gain": 0.0, **how}}
    return tiny(
        topology or single_server(4, latency=1e-6, launch=1e-6),
        model={"experts": 8, "layers": 3},
        deployment=parallel(tp, pp, dp, etp, experts=experts),
        gating=gating,
        workload={"sequences": 64, "decode_steps": 12, **workload},
        trace={"level": "flows"},
        network={"startup": "none"},
    )


def contiguous(scenario: Scenario) -> Layout:
    """Where experts stand if nobody has looked at loads yet."""
    experts = scenario.deployment.experts.model_copy(update={"policy": "contiguous", "spare": 0})
    deployment = scenario.deployment.model_copy(update={"experts": experts})
    found = lay_out(scenario.model_copy(update={"deployment": deployment}))
    return replace(found, deployment=scenario.deployment)


def run(scenario: Scenario) -> Trace:
    """From a contiguous placement where there are no spare places."""
    return trace_of(scenario, None if scenario.deployment.experts.spare else contiguous(scenario))


def moved_flows(trace: Trace) -> dict[str, np.ndarray]:
    flows = table(trace, "flows")
    return {name: column[flows["operator"] == "rebalance"] for name, column in flows.items()}


VARIANTS = {
    "stop": lambda: loop(),
    "background": lambda: loop(transfer="background"),
    "drifting": lambda: loop(gating=DRIFT),
    "drifting, beside": lambda: loop(gating=DRIFT, transfer="background", layers_at_once=0),
    "with planning time": lambda: loop(gating=DRIFT, planning_time="20 us"),
    "spare places": lambda: loop(gating=DRIFT, policy="eplb", spare=1),
    "amended": lambda: loop(gating=DRIFT, plan="amended"),
    "amended, spare places": lambda: loop(gating=DRIFT, policy="packed", spare=1, plan="amended", window=3),
    "servers": lambda: loop(rail_tree(2, 2), gating=DRIFT, layers_at_once=2),
    "stages": lambda: loop(dp=2, pp=2, gating=DRIFT, workload={"microbatches": 2}),
    "shared experts": lambda: loop(tp=2, dp=2, etp=2, gating=DRIFT),
    "batches": lambda: loop(
        gating=DRIFT,
        transfer="background",
        workload={"batches": 3, "arrivals": "uniform", "interval": "40 us", "decode_steps": 6},
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def ran(request: pytest.FixtureRequest) -> tuple[Scenario, Trace]:
    scenario = VARIANTS[request.param]()
    return scenario, run(scenario)


# ---- laws of every run ----------------------------------------------------------------------------


def test_something_moves_and_every_move_is_on_the_bill(ran: tuple[Scenario, Trace]) -> None:
    _, trace = ran
    bill, flows = table(trace, "rebalances"), moved_flows(trace)
    began = ~np.isnan(bill["began"])
    assert began.any()
    assert (bill["copies"][~began] == 0).all() and (bill["bytes"][~began] == 0).all()
    assert bill["bytes"].sum() == approx(flows["bytes"].sum())
    assert (bill["bytes"] == bill["copies"] * EXPERT).all(), "all shares of an expert count"


def test_no_token_is_lost_across_a_move(ran: tuple[Scenario, Trace]) -> None:
    scenario, trace = ran
    experts, passes = table(trace, "experts"), table(trace, "token_batches")
    layers = scenario.model.layers
    came = np.zeros((len(passes["tokens"]), layers))
    np.add.at(came, (experts["token_batch"], experts["layer"]), experts["tokens"])
    order = np.argsort(passes["token_batch"])
    assert (came == passes["tokens"][order][:, None] * scenario.model.top_k).all()


def test_what_came_and_what_was_dropped_add_up_across_moves() -> None:
    scenario = loop(gating={**DRIFT, "capacity_factor": 1.0})
    trace = run(scenario)
    found = summarize(trace)["experts"]
    assert found["dropped"] > 0 and table(trace, "rebalances")["copies"].any()
    tokens = table(trace, "token_batches")["tokens"].sum()
    assert found["tokens"] + found["dropped"] == tokens * scenario.model.top_k * scenario.model.layers


def test_every_expert_always_stands_somewhere(ran: tuple[Scenario, Trace]) -> None:
    scenario, trace = ran
    experts = table(trace, "experts")
    pairs = {*zip(experts["token_batch"].tolist(), experts["layer"].tolist(), strict=True)}
    triples = {
        *zip(*(experts[name].tolist() for name in ("token_batch", "layer", "expert")), strict=True),
    }
    assert len(triples) == len(pairs) * scenario.model.experts


def test_times_of_a_bill_follow_each_other(ran: tuple[Scenario, Trace]) -> None:
    scenario, trace = ran
    bill = table(trace, "rebalances")
    how = scenario.deployment.experts.rebalance
    assert (bill["observed"] < bill["planned"]).all()
    there = ~np.isnan(bill["ready"])
    assert bill["ready"][there] == approx(bill["planned"][there] + how.planning_time)
    began = ~np.isnan(bill["began"])
    assert (bill["began"][began] >= bill["ready"][began]).all()
    done = ~np.isnan(bill["ended"])
    assert (bill["ended"][done] >= bill["began"][done]).all()
    starts, ends = bill["began"][done], bill["ended"][done]
    assert (starts[1:] >= ends[:-1]).all(), "one after the other"
    assert (bill["stopped"] >= 0).all()
    assert bill["stopped"][done] == approx(ends - starts) if how.transfer == "stop" else True


def test_passes_stand_still_only_while_the_scenario_says_stop(ran: tuple[Scenario, Trace]) -> None:
    scenario, trace = ran
    bill, spans = table(trace, "rebalances"), table(trace, "spans")
    for start, end in zip(bill["began"], bill["ended"], strict=True):
        busy = (spans["end"] > start) & (spans["start"] < end)
        if scenario.deployment.experts.rebalance.transfer == "stop":
            assert not busy.any()
        elif end > start:
            assert busy.any()


def test_links_carry_what_the_passes_and_the_moves_send(ran: tuple[Scenario, Trace]) -> None:
    scenario, trace = ran
    links, flows = table(trace, "links"), table(trace, "flows")
    assert (flows["via"] == "peer").all()
    paths = lay_out(scenario).paths.between(flows["source"], flows["target"]).links
    assert over_links(flows["wire"], paths, len(links["link"])) == approx(links["bytes"])


def test_the_same_scenario_gives_the_same_rows(ran: tuple[Scenario, Trace]) -> None:
    scenario, trace = ran
    assert same_tables(trace, run(scenario))


def test_tokens_choose_the_same_experts_with_and_without_rebalancing(ran: tuple[Scenario, Trace]) -> None:
    scenario, trace = ran
    experts = scenario.deployment.experts
    never = experts.model_copy(update={"rebalance": experts.rebalance.model_copy(update={"every": 0})})
    deployment = scenario.deployment.model_copy(update={"experts": never})
    other = run(scenario.model_copy(update={"deployment": deployment}))

    def chosen(of: Trace) -> np.ndarray:
        rows = table(of, "experts")
        shape = (rows["token_batch"].max() + 1, scenario.model.layers, scenario.model.experts)
        found = np.zeros(shape, dtype=np.int64)
        np.add.at(found, (rows["token_batch"], rows["layer"], rows["expert"]), rows["tokens"])
        return found

    assert np.array_equal(chosen(trace), chosen(other))
    assert not len(table(other, "rebalances")["rebalance"]) and rebalancing(other) is None


def test_what_the_first_places_would_have_given_is_what_a_run_without_moves_gives(
    ran: tuple[Scenario, Trace],
) -> None:
    scenario, trace = ran
    experts = scenario.deployment.experts
    never = experts.model_copy(update={"rebalance": experts.rebalance.model_copy(update={"threshold": 1e9})})
    deployment = scenario.deployment.model_copy(update={"experts": never})
    other = run(scenario.model_copy(update={"deployment": deployment}))
    found, without = table(trace, "placements"), table(other, "placements")
    by = [np.lexsort((t["layer"], t["token_batch"])) for t in (found, without)]
    assert np.array_equal(found["first"][by[0]], without["busiest"][by[1]])
    assert np.isnan(table(other, "rebalances")["began"]).all()
    bill = rebalancing(other)
    assert bill is not None and not bill["moved"] and bill["gained"] in (0.0, None)
    assert any("never placed anew" in note for note in summarize(other)["notes"])


# ---- by hand --------------------------------------------------------------------------------------


def two(transfer: str = "stop", **how: Any) -> Scenario:
    """Two GPUs with two experts each, one layer, no latency; experts 0 and 1 are hot."""
    box = {"nvlink": how.pop("nvlink")} if "nvlink" in how else {}
    experts = {"policy": "balanced", "rebalance": {"every": 2, "transfer": transfer, **how}}
    return tiny(
        single_server(2, **box),
        model={"layers": 1},
        deployment=parallel(dp=2, experts=experts),
        gating={"skew": "zipf", "exponent": 3.0, "shuffle": False},
        workload={"sequences": 64, "decode_steps": 4},
        trace={"level": "flows"},
        network={"startup": "none"},
    )


def test_a_stop_costs_just_what_the_bytes_take() -> None:
    # Experts 0 and 1 are on GPU 0. They are parted: one copy goes each way, and GPU 1's NVLink port
    # takes one expert, 32 KiB, at 10 GB/s; the other direction runs beside it.
    stopped = run(two())
    bill = table(stopped, "rebalances")
    seconds = EXPERT / NVLINK
    assert bill["copies"].tolist() == [2] and bill["bytes"].tolist() == [2 * EXPERT]
    assert bill["stopped"] == approx([seconds])
    assert bill["ended"] - bill["began"] == approx([seconds])
    # The run after it is that of the new places, only later by the stop.
    steps = table(stopped, "steps")
    assert steps["start"][2] - steps["end"][1] == approx(seconds)
    assert steps["start"][1] == steps["end"][0] and steps["start"][3] == steps["end"][2]


def test_beside_the_passes_weights_share_the_links_and_nobody_stops() -> None:
    beside, stopped = run(two("background")), run(two())
    bill, steps = table(beside, "rebalances"), table(beside, "steps")
    assert bill["stopped"].tolist() == [0.0]
    assert steps["start"][1:].tolist() == steps["end"][:-1].tolist()
    # Alone on the links they take EXPERT / NVLINK; beside dispatch and combine they take longer.
    assert bill["ended"][0] - bill["began"][0] > EXPERT / NVLINK
    # And the passes under way are slowed in turn: the third step is longer than the second.
    long = steps["end"] - steps["start"]
    assert long[2] > long[1]
    assert steps["end"][-1] < table(stopped, "steps")["end"][-1] + EXPERT / NVLINK


def test_planning_takes_its_time_while_steps_go_on() -> None:
    at_once, later = table(run(two()), "rebalances"), run(two(planning_time="1 us"))
    bill, steps = table(later, "rebalances"), table(later, "steps")
    assert at_once["ready"] == approx(at_once["planned"])
    assert bill["ready"] == approx(bill["planned"] + 1e-6)
    # The third step had begun when the plan was there: it ends first.
    assert bill["began"][0] == approx(steps["end"][2]) and bill["planned"][0] == approx(steps["end"][1])


def test_the_last_step_moves_nothing() -> None:
    scenario = two(every=4)
    assert not len(table(run(scenario), "rebalances")["rebalance"])
    planned_too_late = table(run(two(every=3, planning_time="1 s")), "rebalances")
    assert planned_too_late["outcome"].tolist() == ["too_late"]
    assert np.isnan(planned_too_late["ready"]).all() and np.isnan(planned_too_late["began"]).all()


def test_a_placement_that_is_right_stays() -> None:
    scenario = two()
    kept = trace_of(scenario)
    bill = table(kept, "rebalances")
    assert len(bill["rebalance"]) == 1 and np.isnan(bill["began"]).all() and not bill["bytes"].any()


@pytest.mark.parametrize(
    ("how", "why", "said"),
    [
        ({"threshold": 5.0}, "below_threshold", "found the imbalance below the threshold"),
        ({"least_gain": 0.9}, "nothing_better", "found no placement that lowers a layer's imbalance"),
        ({"planning_time": "1 s"}, "too_late", "came when the run was over"),
    ],
)
def test_where_nothing_moves_the_planning_says_why(how: dict[str, Any], why: str, said: str) -> None:
    trace = run(two(**how))
    bill = table(trace, "rebalances")
    assert bill["outcome"].tolist() == [why] and np.isnan(bill["began"]).all()
    assert np.isnan(bill["wished"]).all() == (why == "below_threshold")
    summary = summarize(trace)
    found = summary["rebalancing"]
    assert found["idle"] == {**dict.fromkeys(found["idle"], 0), why: 1} and not found["moved"]
    assert any(said in note for note in summary["notes"])


def test_weights_still_under_way_when_the_run_ends_are_no_finished_move() -> None:
    # A link a thousand times thinner: an expert takes longer than the two steps that are left.
    trace = run(two("background", nvlink=NVLINK / 1e6))
    bill, steps = table(trace, "rebalances"), table(trace, "steps")
    assert bill["outcome"].tolist() == ["moved"] and np.isnan(bill["ended"]).all()
    assert not bill["layers"].any() and not bill["copies"].any() and not bill["bytes"].any()
    # Nothing stands elsewhere, and nothing that came later was compared with anything.
    assert np.isnan(bill["after"]).all()
    placed = table(trace, "placements")
    assert np.array_equal(placed["busiest"], placed["first"])
    summary = summarize(trace)
    found = summary["rebalancing"]
    assert (found["planned"], found["moved"], found["finished"]) == (1, 1, 0)
    # They were under way from the end of the second step to that of the last.
    assert found["moving"] == approx(steps["end"][-1] - steps["end"][1])
    assert any(note.startswith("1 of these moves was still under way") for note in summary["notes"])
    whole = summarize(run(two("background")))
    assert whole["rebalancing"]["finished"] == 1
    assert not any("still under way" in note for note in whole["notes"])


@pytest.mark.parametrize("transfer", ["stop", "background"])
def test_gaps_between_tokens_add_up_to_the_run_whatever_it_waited_for(transfer: str) -> None:
    trace = run(two(transfer))
    steps, gaps = table(trace, "steps"), token_gaps(trace)
    assert gaps is not None
    # 64 sequences in one batch: every one makes one token per step, and waits for the weights in between.
    assert gaps["mean"] * len(steps["step"]) == approx(steps["end"][-1] - steps["start"][0])
    assert gaps["max"] == approx((steps["end"][1:] - steps["end"][:-1]).max())


def test_gaps_between_tokens_mean_what_tpot_does_with_prompts_and_micro_batches() -> None:
    workload = {"phase": "both", "microbatches": 2, "batches": 2, "interval": "1 ms", "arrivals": "uniform"}
    for how in ({"phase": "decode"}, {}):
        trace = run(loop(dp=2, pp=2, gating=DRIFT, workload={**workload, **how}))
        gaps, found = token_gaps(trace), summarize(trace)["latency"]["tpot"]
        assert gaps is not None and gaps["mean"] == approx(found["mean"])


# ---- under drift ----------------------------------------------------------------------------------


@pytest.mark.parametrize("transfer", ["stop", "background"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "motion",
    [
        {"motion": "rotating", "rotate_every": 30},
        {"motion": "drifting", "half_life": 30.0},
        {"motion": "bursting", "burst_every": 30, "burst_steps": 15},
    ],
    ids=lambda motion: motion["motion"],
)
def test_under_drift_rebalancing_lowers_the_imbalance(
    transfer: str, plan: str, motion: dict[str, Any]
) -> None:
    scenario = loop(
        gating={**SKEWED, **motion}, policy="packed", spare=1,
        plan=plan, transfer=transfer, every=6, window=4,
        workload={"decode_steps": 60, "sequences": 256},
    )  # fmt: skip
    found = summarize(run(scenario))["rebalancing"]
    assert found["imbalance"]["mean"] < 0.97 * found["imbalance"]["first"]
    assert found["of_moves"]["after"] < found["of_moves"]["unmoved"]
    assert found["of_moves"]["foreseen"] < found["of_moves"]["before"]


def test_what_costs_more_than_it_gains_is_said_to() -> None:
    # Links a thousand times thinner: weights take far longer than any balance can save.
    scenario = loop(single_server(4, nvlink=NVLINK / 1000), gating=DRIFT, every=1, window=1)
    summary = summarize(run(scenario))
    assert summary["rebalancing"]["net"] < 0
    assert any(" cost " in note and "net of the stops" in note for note in summary["notes"])


# ---- memory ---------------------------------------------------------------------------------------


def test_weights_on_their_way_need_room() -> None:
    one, all_, never = (needs(loop(layers_at_once=n, every=e))[0] for n, e in ((1, 3), (0, 3), (1, 0)))
    assert never.rebalancing_buffers == 0 and "rebalancing buffers" not in never.parts()
    assert one.rebalancing_buffers == 2 * EXPERT and all_.rebalancing_buffers == 3 * 2 * EXPERT
    assert one.total - never.total == one.parts()["rebalancing buffers"]


def test_a_scenario_whose_buffers_do_not_fit_is_refused() -> None:
    def problems(layers: int) -> list[Any]:
        need = needs(loop(layers_at_once=1))[0].total
        scenario = loop(layers_at_once=layers)
        gpu = gpu_of(scenario.topology)
        return does_not_fit(scenario, gpu.model_copy(update={"memory": need / 0.9 + 1}))

    assert not problems(1)
    assert "rebalancing buffers" in problems(0)[0].problem


# ---- plans that amend -----------------------------------------------------------------------------


@st.composite
def loads(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens [L, E], places [L, C] placed by other loads, ranks."""
    ranks, each, spare = draw(st.integers(2, 6)), draw(st.integers(1, 4)), draw(st.integers(0, 2))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    before, after = rng.pareto(1.5, (2, 3, ranks * each)) * draw(st.sampled_from([0.0, 1.0, 1000.0]))
    return after, eplb(before, ranks * (each + spare), 1, 1, ranks), ranks


@given(loads())
@settings(deadline=None)
def test_an_amended_plan_is_never_worse_and_leaves_no_expert_out(
    about: tuple[np.ndarray, np.ndarray, int],
) -> None:
    load, copies, ranks = about
    found = amended(load, copies, ranks)
    assert (imbalance(load, found, ranks) <= imbalance(load, copies, ranks)).all()
    for layer in found:
        assert set(layer.tolist()) == set(range(load.shape[1]))


def test_an_amended_plan_moves_less_than_one_made_anew() -> None:
    rng = np.random.default_rng(3)
    before = rng.pareto(1.5, (4, 64))
    after = before * rng.lognormal(0.0, 0.3, before.shape)
    for spare in (0, 2):
        places, domain = 8 * (8 + spare), np.zeros(8)
        old = eplb(before, places, 1, 1, 8)
        plans = {"anew": eplb(after, places, 1, 1, 8), "amended": amended(after, old, 8)}
        count = {
            name: sum(
                len(moves(0, one, settled(one, other, 8, domain), 8, domain))
                for one, other in zip(old, plan, strict=True)
            )
            for name, plan in plans.items()
        }
        left = {name: imbalance(after, plan, 8).mean() for name, plan in plans.items()}
        assert count["amended"] < 0.5 * count["anew"]
        assert left["amended"] < 1.05 * left["anew"] < imbalance(after, old, 8).mean()


# ---- from placement to placement ------------------------------------------------------------------


@st.composite
def placements(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    """Old and wished places of one layer, ranks, and their NVLink domains."""
    ranks, slots = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    experts = draw(st.integers(1, ranks * slots))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))

    def places() -> np.ndarray:
        more = rng.integers(0, experts, ranks * slots - experts)
        return rng.permutation(np.concatenate([np.arange(experts), more])).astype(np.int32)

    return places(), places(), ranks, rng.integers(0, 3, ranks)


@given(placements())
@settings(deadline=None)
def test_arranging_a_placement_changes_no_load(about: tuple[np.ndarray, np.ndarray, int, np.ndarray]) -> None:
    old, wished, ranks, domain = about
    found = settled(old, wished, ranks, domain)
    load = np.arange(1.0, old.max() + 2)[None, :]
    assert imbalance(load, found[None], ranks) == approx(imbalance(load, wished[None], ranks))
    for here in set(domain.tolist()):
        rows = [np.sort(p.reshape(ranks, -1)[domain == here], axis=1).tolist() for p in (found, wished)]
        assert sorted(rows[0]) == sorted(rows[1]), "ranks swap within their domain only"


@given(placements())
@settings(deadline=None)
def test_moves_bring_just_what_a_rank_lacks_from_one_that_holds_it(
    about: tuple[np.ndarray, np.ndarray, int, np.ndarray],
) -> None:
    old, wished, ranks, domain = about
    arranged = settled(old, wished, ranks, domain)
    before, after = (places.reshape(ranks, -1) for places in (old, arranged))
    found = moves(7, old, arranged, ranks, domain)
    lacking = {(r, e) for r in range(ranks) for e in set(after[r].tolist()) - set(before[r].tolist())}
    assert {(one.target, one.expert) for one in found} == lacking and len(found) == len(lacking)
    for one in found:
        assert one.layer == 7 and one.expert in before[one.source]
        near = [r for r in range(ranks) if one.expert in before[r] and domain[r] == domain[one.target]]
        assert not near or domain[one.source] == domain[one.target]
    unsettled = moves(7, old, wished, ranks, domain)
    assert len(found) <= len(unsettled), "arranging never makes more of them"


@given(placements())
@settings(deadline=None)
def test_a_placement_that_only_names_ranks_otherwise_moves_nothing(
    about: tuple[np.ndarray, np.ndarray, int, np.ndarray],
) -> None:
    old, _, ranks, _ = about
    together = np.zeros(ranks, dtype=int)
    turned = np.roll(old.reshape(ranks, -1)[:, ::-1], 1, axis=0).ravel()
    assert np.array_equal(settled(old, turned, ranks, together), old)


def test_places_that_keep_their_expert_stay_by_hand() -> None:
    # Rank 0 keeps expert 1 in its second place and takes 3; rank 1 keeps 2 and takes 0.
    old, wished = np.array([0, 1, 2, 3]), np.array([1, 3, 0, 2])
    found = settled(old, wished, 2, np.array([0, 0]))
    assert found.tolist() == [3, 1, 2, 0]
    assert [(m.expert, m.source, m.target) for m in moves(0, old, found, 2, np.zeros(2))] == [
        (3, 1, 0),
        (0, 0, 1),
    ]


def test_a_copy_comes_from_the_own_domain_and_from_who_sends_least() -> None:
    # Ranks 0, 1 | 2, 3. Expert 0 is on 0 and 2: rank 3 takes it from 2. Expert 5 only from afar.
    old = np.array([0, 1, 2, 5, 0, 3, 4, 4])
    new = np.array([0, 1, 2, 5, 0, 5, 0, 4])
    found = moves(0, old, new, 4, np.array([0, 0, 1, 1]))
    assert [(m.expert, m.source, m.target) for m in found] == [(5, 1, 2), (0, 2, 3)]


def test_layers_move_so_many_of_every_stage_at_a_time() -> None:
    stages = [range(3), range(3, 6)]
    assert chunks([0, 1, 2, 4], stages, 1) == [[0, 4], [1], [2]]
    assert chunks([0, 1, 2, 4], stages, 2) == [[0, 1, 4], [2]]
    assert chunks([0, 1, 2, 4], stages, 0) == [[0, 1, 2, 4]]
    assert chunks([], stages, 0) == []
    assert MODEL["experts"] == 4
