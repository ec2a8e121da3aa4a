"""Notes on what a scenario asks for and its run never comes to."""

from __future__ import annotations

from typing import Any

import pytest
from scenarios import parallel, rail_tree, tiny

from clustersim.plan.layout import lay_out
from clustersim.plan.popularity import popularity
from clustersim.spec.scenario import Scenario
from clustersim.study.gating_fit import look
from clustersim.study.idle import idle
from clustersim.study.preview import preview
from clustersim.study.run import run_scenario

ASKED = {"batches": 1, "decode_steps": 4, "sequences": 16}


def scenario(**parts: Any) -> Scenario:
    """Four ranks, four experts, top-2, four steps of decode."""
    workload = {**ASKED, **parts.pop("workload", {})}
    return tiny(
        rail_tree(2, 2), **{"deployment": parallel(dp=4)} | parts, workload=workload, model={"top_k": 2}
    )


def notes(**parts: Any) -> list[str]:
    one = scenario(**parts)
    found = idle(one, lay_out(one))
    ran = run_scenario(one).summary["notes"]
    assert set(found) <= set(ran), "a run says it"
    assert set(found) <= set(preview(one, lay_out(one))["notes"]), "and so does a preview"
    return found


@pytest.mark.parametrize(
    "motion, every, word",
    [("bursting", "burst_every", "No burst comes"), ("rotating", "rotate_every", "never moves on")],
)
def test_motion_is_noted_just_where_the_run_ends_before_it_begins(motion: str, every: str, word: str) -> None:
    def said(steps: int) -> bool:
        gating = {"skew": "gini", "gini": 0.2, "motion": motion, every: steps}
        gating |= {"burst_steps": 1} if motion == "bursting" else {}
        one = scenario(gating=gating)
        last = [
            popularity(one.gating, 4, 0, one.seed, step, 2).tolist()
            for step in (0, one.workload.decode_steps - 1)
        ]
        (told,) = {
            any(word in note for note in found) for found in (notes(gating=gating), look(one)["notes"])
        }
        assert told == (last[0] == last[1])
        return told

    assert [said(steps) for steps in (3, 4, 100)] == [False, True, True]


def test_rebalancing_is_noted_just_where_it_never_plans() -> None:
    for every in (2, 3, 4, 50):
        experts = {"policy": "packed", "spare": 1, "rebalance": {"every": every}}
        parts = {"deployment": parallel(dp=4, experts=experts), "gating": {"skew": "gini", "gini": 0.2}}
        planned = run_scenario(scenario(**parts)).summary["rebalancing"] is not None
        assert planned != any("never placed anew: rebalance.every" in note for note in notes(**parts))


def test_a_zipf_law_that_is_cut_says_so() -> None:
    assert notes(gating={"skew": "zipf", "exponent": 0.5}) == []
    (said,) = notes(gating={"skew": "zipf", "exponent": 5.0})
    # Four experts, top-2: at most twice the mean; 4 / (1 + 2^-5 + 3^-5 + 4^-5) = 3.86 is asked for.
    assert "1/2 of a layer's choices (top-2), 2.00 x the mean" in said and "3.86 x" in said
    assert look(scenario(gating={"skew": "zipf", "exponent": 5.0}))["notes"] == [said]
    (other,) = notes(beside={"label": "x", "gating": {"skew": "zipf", "exponent": 5.0}})
    assert other.startswith("Of what is beside it: no expert can get")


def test_a_tie_for_the_hottest_gpu_is_noted() -> None:
    faults = [{"kind": "slow_gpu", "gpu": "hottest", "factor": 2.0}]
    (said,) = notes(faults=faults)
    assert "4 ranks are expected to get as many tokens" in said and said.endswith(
        "the first of them, rank 0."
    )
    assert notes(faults=faults, gating={"skew": "hot_rank", "hot_rank": 1, "hot_share": 0.4}) == []


def test_faults_after_the_end_are_noted() -> None:
    def said(start: str) -> str:
        faults = [{"kind": "slow_gpu", "gpu": 1, "factor": 2.0, "start": start}]
        return " ".join(run_scenario(scenario(faults=faults)).summary["notes"])

    assert "slow_gpu at rank 1 from 100 s on" in said("100 s") and "at work" not in said("100 s")
    assert "never came" not in said("0 s") and "at work: slow_gpu at rank 1." in said("0 s")
