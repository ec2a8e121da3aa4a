"""Variants run side by side: what they give does not depend on who runs them, and what is done is kept."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scenarios import parallel, single_server, tiny

from clustersim.errors import ClustersimError, ResultError
from clustersim.spec.scenario import Scenario
from clustersim.spec.writing import to_toml
from clustersim.study import cases as module
from clustersim.study.cases import Base, Bench, Case, Outcome, figures_of, key_of, variant


@pytest.fixture
def base(tmp_path: Path) -> Base:
    path = tmp_path / "tiny.toml"
    path.write_text(to_toml(tiny(gating={"skew": "zipf"})), encoding="utf-8")
    return Base(str(path), ("trace.level=sums",))


def seeds(base: Base, *numbers: int) -> list[Case]:
    return [variant(base, f"seed {n}", (f"seed={n}",)) for n in numbers]


class Counted:
    """Work that says which scenarios it was given, and may fail or be interrupted at one of them."""

    def __init__(self, fails: dict[int, BaseException] | None = None) -> None:
        self.seen: list[int] = []
        self._fails = fails or {}

    def __call__(self, scenario: Scenario) -> dict[str, Any]:
        self.seen.append(scenario.seed)
        if scenario.seed in self._fails:
            raise self._fails[scenario.seed]
        return {"seed": scenario.seed}


def ran(
    cases: Sequence[Case], work: Counted, kept: Path | None = None, resume: bool = False
) -> list[Outcome]:
    with Bench(1, kept, resume, work) as bench:
        return bench.all(cases)


def test_workers_change_neither_what_is_found_nor_what_is_kept(base: Base, tmp_path: Path) -> None:
    cases = seeds(base, 1, 2, 3)
    found = []
    for workers in (1, 2):
        with Bench(workers, tmp_path / f"{workers}.jsonl") as bench:
            found.append(bench.all(cases))
    assert found[0] == found[1] and all(outcome.figures for outcome in found[0])
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_figures_are_json_and_the_same_every_time(base: Base) -> None:
    scenario = base.scenario()
    assert json.loads(json.dumps(figures_of(scenario), allow_nan=False)) == figures_of(scenario)


def test_a_resumed_bench_runs_only_what_is_missing(base: Base, tmp_path: Path) -> None:
    kept, work = tmp_path / "cases.jsonl", Counted()
    first = ran(seeds(base, 1, 2), work, kept)
    again = ran(seeds(base, 1, 2, 3), work, kept, resume=True)
    assert work.seen == [1, 2, 3] and again[:2] == first


def test_without_resume_all_is_run_anew(base: Base, tmp_path: Path) -> None:
    kept, work = tmp_path / "cases.jsonl", Counted()
    ran(seeds(base, 1), work, kept)
    ran(seeds(base, 1), work, kept)
    assert work.seen == [1, 1] and len(kept.read_text("utf-8").splitlines()) == 1


def test_an_interruption_keeps_what_is_done(base: Base, tmp_path: Path) -> None:
    kept = tmp_path / "cases.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ran(seeds(base, 1, 2, 3), Counted({2: KeyboardInterrupt()}), kept)
    rest = Counted()
    ran(seeds(base, 1, 2, 3), rest, kept, resume=True)
    assert rest.seen == [2, 3]


def test_a_line_that_was_cut_short_is_run_again(base: Base, tmp_path: Path) -> None:
    kept = tmp_path / "cases.jsonl"
    ran(seeds(base, 1, 2), Counted(), kept)
    kept.write_bytes(kept.read_bytes()[:-20])
    work = Counted()
    ran(seeds(base, 1, 2), work, kept, resume=True)
    assert len(work.seen) == 1
    assert all(json.loads(line) for line in kept.read_text("utf-8").splitlines())


def test_damaged_lines_are_numbered_and_only_their_cases_run_again(base: Base, tmp_path: Path) -> None:
    kept = tmp_path / "cases.jsonl"
    ran(seeds(base, 1, 2, 3, 4), Counted(), kept)
    lines = kept.read_bytes().splitlines(keepends=True)
    lines[1] = b"\xff not a line\n"
    lines[3] = lines[3].replace(b'"seed": ', b'"seed": 7')
    kept.write_bytes(b"".join(lines))
    work = Counted()
    with Bench(1, kept, True, work) as bench:
        assert bench.unreadable == (2, 4)
        assert [outcome.figures for outcome in bench.all(seeds(base, 1, 2, 3, 4))] == [
            {"seed": seed} for seed in (1, 2, 3, 4)
        ]
    assert len(work.seen) == 2


def test_cases_of_another_study_are_refused_and_left(base: Base, tmp_path: Path) -> None:
    kept = tmp_path / "cases.jsonl"
    with Bench(1, kept, work=Counted(), study="stress of one") as bench:
        bench.all(seeds(base, 1))
    before = kept.read_bytes()
    with pytest.raises(ResultError, match=r"line 1: holds cases of stress of one, and this call is .* other"):
        Bench(1, kept, True, Counted(), "stress of other")
    assert kept.read_bytes() == before


def test_only_cases_that_are_asked_for_count_as_done_already(base: Base, tmp_path: Path) -> None:
    kept = tmp_path / "cases.jsonl"
    ran(seeds(base, 1, 2, 3), Counted(), kept)
    with Bench(1, kept, True, Counted()) as bench:
        bench.all(seeds(base, 2, 4))
        bench.all(seeds(base, 2))
        assert (bench.resumed, bench.ran, bench.done) == (1, 1, 4)


def test_an_interrupted_bench_leaves_no_thread_that_closes_pipes_while_python_ends(base: Base) -> None:
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), Bench(2, work=seed_of) as bench:
        next(bench.run(seeds(base, 1, 2, 3, 4, 5, 6)))
        raise KeyboardInterrupt
    assert set(threading.enumerate()) <= before


def seed_of(scenario: Scenario) -> dict[str, Any]:
    return {"seed": scenario.seed}


def test_what_another_version_of_the_program_found_is_not_gone_on_with(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, work = tmp_path / "cases.jsonl", Counted()
    ran(seeds(base, 1), work, kept)
    monkeypatch.setattr(module, "code_digest", lambda: "another")
    ran(seeds(base, 1), work, kept, resume=True)
    assert work.seen == [1, 1]


def test_a_failing_case_is_an_entry_and_the_others_run(base: Base) -> None:
    work = Counted({1: ClustersimError("a  link\nis down"), 2: ValueError("ours")})
    found = ran(seeds(base, 1, 2, 3), work)
    assert [outcome.error for outcome in found] == [
        "a link is down",
        "internal error: ValueError: ours",
        "",
    ]
    assert found[2].figures == {"seed": 3}


def test_mistakes_stay_but_faults_of_ours_are_tried_again_on_resume(base: Base, tmp_path: Path) -> None:
    kept = tmp_path / "cases.jsonl"
    fails = {1: ClustersimError("wrong"), 2: ValueError("ours")}
    with pytest.raises(KeyboardInterrupt):
        ran(seeds(base, 1, 2, 3), Counted({**fails, 3: KeyboardInterrupt()}), kept)
    work = Counted()
    assert ran(seeds(base, 1, 2), work, kept, resume=True)[0].error == "wrong"
    assert work.seen == [2]


def test_faults_of_ours_are_tried_again_after_a_call_that_went_to_its_end_too(
    base: Base, tmp_path: Path
) -> None:
    kept, work = tmp_path / "cases.jsonl", Counted()
    ran(seeds(base, 1, 2), Counted({2: ValueError("ours")}), kept)
    ran(seeds(base, 1, 2), work, kept, resume=True)
    assert work.seen == [2]


@pytest.mark.parametrize("resume", [False, True])
def test_what_is_kept_stays_until_there_is_something_new(base: Base, tmp_path: Path, resume: bool) -> None:
    kept = tmp_path / "cases.jsonl"
    ran(seeds(base, 1), Counted(), kept)
    before, begun = kept.read_bytes(), list[bool]()
    for number, goes in ((2, KeyboardInterrupt()), (3, None)):
        work = Counted({number: goes} if goes else {})
        try:
            with Bench(1, kept, resume, work, anew=lambda: begun.append(kept.exists())) as bench:
                bench.all(seeds(base, number))
        except KeyboardInterrupt:
            assert kept.read_bytes() == before and not begun
    assert begun == ([] if resume else [True])
    assert len(kept.read_bytes().splitlines()) == (2 if resume else 1)


def test_damaged_lines_are_gone_once_they_were_told(base: Base, tmp_path: Path) -> None:
    kept = tmp_path / "cases.jsonl"
    ran(seeds(base, 1), Counted(), kept)
    before = kept.read_bytes()
    kept.write_bytes(before + b"junk\n")
    ran(seeds(base, 1), Counted(), kept, resume=True)
    assert kept.read_bytes() == before


def test_a_worker_that_dies_fails_its_own_case_only(base: Base) -> None:
    with Bench(2, work=dies_at_seed_2) as bench:
        found = bench.all(seeds(base, 1, 2, 3))
    assert [outcome.figures for outcome in found] == [{"seed": 1}, None, {"seed": 3}]
    assert "process died" in found[1].error


def dies_at_seed_2(scenario: Scenario) -> dict[str, Any]:
    if scenario.seed == 2:
        module.os._exit(9)
    return {"seed": scenario.seed}


def test_equal_scenarios_are_run_once_whatever_they_are_called(base: Base) -> None:
    work = Counted()
    cases = [variant(base, "one", ("seed=1",)), variant(base, "other", ("seed=1", "gating.shuffle=true"))]
    found = ran(cases, work)
    assert work.seen == [1] and found[0] == found[1]


def test_a_mistake_in_a_case_is_its_problem_and_nothing_is_run(base: Base) -> None:
    case = variant(base, "odd", ("deployment.expert_paralel=2",))
    work = Counted()
    assert 'did you mean "expert_parallel"' in ran([case], work)[0].error and work.seen == []


def test_what_does_not_fit_into_memory_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(to_toml(tiny()), encoding="utf-8")
    case = variant(Base(str(path)), "huge", ("workload.prompt_tokens=9000000", "workload.sequences=4000"))
    assert case.problem.startswith("does not fit: ")


def test_progress_counts_every_case_once(base: Base) -> None:
    told: list[tuple[int, int]] = []
    with Bench(1, work=Counted()) as bench:
        bench.all(seeds(base, 1, 1, 2), lambda done, all_: told.append((done, all_)))
        assert told == [(0, 3), (2, 3), (3, 3)]
        bench.all(seeds(base, 1, 2), lambda done, all_: told.append((done, all_)))
    assert told[3:] == [(2, 2)]


def test_the_key_follows_the_scenario(base: Base) -> None:
    one, other = (base.scenario((f"seed={n}",)) for n in (1, 2))
    assert key_of(one) == key_of(base.scenario(("seed=1",))) != key_of(other)


def test_a_folder_that_cannot_be_written_is_told(base: Base, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResultError, match="cannot be written"):
        ran(seeds(base, 1), Counted(), tmp_path / "file" / "cases.jsonl")


def test_a_slower_gpu_and_more_skew_are_seen_in_the_figures(tmp_path: Path) -> None:
    path = tmp_path / "four.toml"
    four = tiny(single_server(4), deployment=parallel(dp=4))
    path.write_text(to_toml(four), encoding="utf-8")
    base = Base(str(path), ("trace.level=sums",))
    slow = "faults=[{kind='slow_gpu', gpu=2, factor=3.0}]"
    with Bench(1) as bench:
        even, slowed = bench.all([variant(base, "even"), variant(base, "slow", (slow,))])
    assert even.figures and slowed.figures
    assert slowed.figures["tokens_per_second"] < even.figures["tokens_per_second"]
    worst = slowed.figures["worst_gpu"]
    assert worst["rank"] == 2 and worst["share"] > 0.9
