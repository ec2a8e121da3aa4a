"""The committed summaries of the permanent examples are what a run gives now."""

from __future__ import annotations

from pathlib import Path

import pytest

from clustersim.study.examples import EXAMPLES, differences, page_of, small_summary
from clustersim.study.run import find, load, run_scenario

FOLDER = Path(__file__).parent.parent / "results" / "seeds"
QUICK = [name for name in EXAMPLES if not name.startswith("moe_1024")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_kept_summary_is_not_stale(name):
    assert differences(FOLDER, [name]) == []


def test_a_changed_number_is_found_stale(tmp_path):
    for path in FOLDER.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    kept = tmp_path / "large_ep.json"
    kept.write_text(kept.read_text().replace('"bound_by": "memory"', '"bound_by": "network"', 1))
    stale = differences(tmp_path, ["large_ep"])
    assert any("bound_by has changed" in line for line in stale)
    assert any("README.md does not follow" in line for line in stale)


def test_the_page_says_what_each_document_claims():
    page = page_of({name: small_summary(name) for name in QUICK})
    for number in ("450,000", "120,000", "2.2 ms", "8.3 ms", "3.75"):
        assert number in page


def test_no_step_of_an_example_is_faster_than_its_bounds():
    for name in QUICK:
        for phase in small_summary(name)["phases"].values():
            floor = phase["bounds"][phase["bounds"]["bound_by"]]
            assert phase["step"]["min"] >= floor


def test_with_each_expert_held_once_the_baseline_is_as_fast_as_large_ep_within_a_twentieth():
    once = ["deployment.experts.policy=contiguous", "deployment.experts.per_gpu=0"]
    rates = [
        run_scenario(load(find(f"workloads/{name}.toml"), changes)).summary["throughput"]
        for name, changes in (("baseline_tp8_pp2", once), ("large_ep", []))
    ]
    baseline, large_ep = (rate["total_tokens_per_second"] for rate in rates)
    assert 0.95 < baseline / large_ep < 1.05
