"""`clustersim trace why` and `clustersim trace bounds`: what they print, and what they say to wrong words."""

from __future__ import annotations

import json
from math import fsum
from pathlib import Path
from typing import Any

import pytest
from scenarios import parallel, single_server, tiny

from clustersim.analysis.critical_path import CAUSES
from clustersim.analysis.what_if import CHANGES
from clustersim.cli import main
from clustersim.study.bound_checks import CHECKS
from clustersim.study.run import run_scenario


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scenario = tiny(
        single_server(4, launch=1e-6),
        deployment=parallel(dp=2, pp=2),
        gating={"skew": "zipf", "exponent": 1.0},
        workload={"sequences": 64, "decode_steps": 4, "microbatches": 2},
    )
    return run_scenario(scenario).save(tmp_path_factory.mktemp("results") / "tiny-0123456789ab")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    with pytest.raises(SystemExit) as exit:
        main(["trace", *arguments])
    found = capsys.readouterr()
    assert exit.value.code == status, found.err
    return found.err if status else found.out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(printed(capsys, *arguments, "--json"))


@pytest.mark.parametrize("what", ["2", "step:2", "slowest", "request:5"])
def test_the_parts_that_are_printed_add_up_to_the_latency(
    folder: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    whole = as_json(capsys, "why", str(folder), what, "--all")
    assert abs(fsum(part["seconds"] for part in whole["parts"]) - whole["latency"]) < 1e-9
    assert abs(fsum(whole["causes"].values()) - whole["latency"]) < 1e-9
    for by in ("cause", "operator", "layer"):
        lines = as_json(capsys, "why", str(folder), what, "--by", by)["lines"]
        assert abs(fsum(line["seconds"] for line in lines) - whole["latency"]) < 1e-9


def test_a_path_is_told_by_cause_and_in_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "why", str(folder), "0")
    assert said.startswith("step 0: why it took ")
    assert all(title in said for title in ("By cause", "What was waited for longest", "In order"))
    assert "waiting for straggler rank" in said
    assert "layer 0" in said
    assert CAUSES["compute"] in said


def test_the_result_may_stand_before_the_view_or_after_the_step(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = printed(capsys, "why", str(folder), "1")
    assert printed(capsys, str(folder), "why", "1") == usual
    assert printed(capsys, "why", "1", str(folder)) == usual


def test_bounds_are_labelled_as_such_and_come_with_shares(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = printed(capsys, "bounds", str(folder))
    assert "at most" in said
    assert "no prediction" in said
    assert all(name in said for name in CHANGES)
    found = as_json(capsys, "bounds", str(folder))
    assert [one["name"] for one in found["bounds"]] == list(CHANGES)
    assert found["unexplained"] < 1e-9
    mean = found["shares"]["mean"]
    assert abs(fsum(mean["by"].values()) - mean["seconds"]) < 1e-9


def test_bounds_are_held_against_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "bounds", str(folder), "--check", "--set", "workload.decode_steps=1")
    assert [one["name"] for one in found] == list(CHECKS)
    assert all(one["holds"] for one in found), found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("why", "99"), "there is no step 99 in this result; steps: 0 to 3"),
        (("why", "slowets"), 'did you mean "slowest"'),
        (("why", "1", "2", "3"), "name a result and a step or request"),
    ],
)
def test_wrong_words_are_answered_with_right_ones(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert said in printed(capsys, str(folder), *arguments, status=2)
