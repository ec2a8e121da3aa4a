"""`clustersim rebalance`: what is tried, what is compared, what is said about it, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pytest import approx
from scenarios import NVLINK, parallel, single_server, tiny

from clustersim.cli import _status
from clustersim.errors import ClustersimError
from clustersim.spec.writing import to_toml
from clustersim.study import rebalancing as module
from clustersim.study.cases import Bench, Outcome
from clustersim.study.gains import gain_over, margin_of, mean_of, verdict_on
from clustersim.study.rebalancing import Asked, answer, bill_of, numbers, question, rebalance, sweep

MOVING = {"skew": "zipf", "exponent": 1.5, "motion": "rotating", "rotate_every": 12}


def asked_file(
    folder: Path,
    nvlink: float = NVLINK,
    memory: str = "80 GiB",
    how: dict[str, Any] | None = None,
    **gating: Any,
) -> str:
    """Eight wide experts over four GPUs, 48 decode steps: their products are most of a step."""
    scenario = tiny(
        single_server(4, nvlink=nvlink, memory=memory),
        model={"experts": 8, "layers": 2, "ffn": 4096, "top_k": 1},
        deployment=parallel(dp=4, experts={"rebalance": {"window": 2, **(how or {})}}),
        gating={**MOVING, **gating},
        workload={"sequences": 512, "decode_steps": 48},
        network={"startup": "none"},
    )
    path = folder / "asked.toml"
    path.write_text(to_toml(scenario), encoding="utf-8")
    return str(path)


def found_of(file: str, asked: Asked, workers: int = 1, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    with Bench(workers, work=bill_of) as bench:
        return rebalance(question(file, overrides, asked), bench)


def row_of(found: dict[str, Any], every: int, spare: int) -> dict[str, Any]:
    rows = (row for row in found["cases"] if not row["stated"])
    return next(row for row in rows if (row["every"], row["spare"]) == (every, spare))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = asked_file(tmp_path_factory.mktemp("found"))
    return found_of(path, Asked((3, 12), (0, 1), "packed", 3))


# ---- what is tried, and compared -------------------------------------------------------------------


def test_every_interval_is_run_with_every_number_of_spare_places_and_never_too(found: dict[str, Any]) -> None:
    tried = [(row["every"], row["spare"]) for row in found["cases"] if not row["stated"]]
    assert tried == [(0, 0), (3, 0), (12, 0), (0, 1), (3, 1), (12, 1)]
    assert not any(row["error"] for row in found["cases"])
    for row in found["cases"]:
        assert len(row["runs"]) == 3 and all(row["runs"])
        assert (row["planned"] == 0) == (row["every"] == 0)
        assert row["planned"] == row["moved"] + sum(row["idle"].values())


def test_gains_are_those_of_the_same_seed_against_the_fastest_that_never_moves(found: dict[str, Any]) -> None:
    never = max((row_of(found, 0, spare) for spare in (0, 1)), key=lambda row: row["tokens_per_second"])
    assert found["never"]["spare"] == never["spare"]
    for row in found["cases"]:
        alike = row_of(found, 0, row["spare"])
        for key, other in (("gain", never), ("gain_at_same_spare", alike)):
            pairs = zip(row["runs"], other["runs"], strict=True)
            each = [a["tokens_per_second"] / b["tokens_per_second"] - 1 for a, b in pairs]
            assert row[key]["each"] == approx(each) and row[key]["mean"] == approx(sum(each) / 3)


def test_the_file_as_it_stands_is_beside_what_is_tried_in_its_place(found: dict[str, Any]) -> None:
    stated = [row for row in found["cases"] if row["stated"]]
    assert [(row["policy"], row["every"]) for row in stated] == [("contiguous", 0)]
    assert any('"contiguous" looks at no load' in note and '"packed"' in note for note in found["notes"])


def test_where_the_hot_experts_move_on_following_them_is_worth_it(found: dict[str, Any]) -> None:
    best = found["best"]
    assert found["verdict"] == "worth" and best["gain"]["mean"] > best["gain"]["margin"] > 0
    assert found["answer"].startswith(f"Worth it: a plan every {best['every']} steps with ")
    assert f"{best['gain']['mean']:+.1%} ± {best['gain']['margin']:.1%} (95 %, 3 seeds)" in found["answer"]
    never, often = (row_of(found, every, 0) for every in (0, 3))
    assert often["imbalance"]["mean"] < never["imbalance"]["mean"]
    assert often["bytes"] > 0 and often["stopped"] > 0 and never["bytes"] == 0


def test_stops_are_in_the_token_that_they_keep_waiting(found: dict[str, Any]) -> None:
    for row in found["cases"]:
        for one in row["runs"]:
            # One batch: the gaps between a sequence's tokens are the whole run, stops and all.
            assert one["token"]["mean"] * found["steps"] == approx(one["seconds"])
            assert one["step"]["mean"] * found["steps"] + one["stopped"] == approx(one["seconds"])
    often = row_of(found, 12, 0)
    assert often["token"]["max"] > often["step"]["max"]


def test_where_weights_take_longer_than_any_balance_saves_it_says_so(tmp_path: Path) -> None:
    found = found_of(asked_file(tmp_path, nvlink=NVLINK / 1000), Asked((1,), (0,), seeds=2))
    assert found["verdict"] == "not_worth" and row_of(found, 1, 0)["gain"]["mean"] < 0
    assert found["answer"].startswith("Not worth it: leave the experts where they are, with no spare places")
    assert "every 1 steps" in found["answer"] and "passes stopped for" in found["answer"]
    # A stop far longer than a step is in the tail of the tokens, where steps alone would not show it.
    often = row_of(found, 1, 0)
    assert often["token"]["p99"] > 1.5 * often["step"]["p99"]


@pytest.mark.parametrize(
    ("how", "asked", "said"),
    [
        ({"threshold": 9.0}, Asked((3,), (0,), seeds=1), "below deployment.experts.rebalance.threshold = 9"),
        ({"least_gain": 0.99}, Asked((3,), (0,), seeds=1), "would have fallen by 99% (least_gain): it was "),
        ({"planning_time": "9 s"}, Asked((3,), (0,), seeds=1), "The run was over before"),
        ({}, Asked((99,), (0,), seeds=1), "No planning was due: the run has 48 steps"),
    ],
)
def test_what_moves_nothing_says_why(tmp_path: Path, how: dict[str, Any], asked: Asked, said: str) -> None:
    found = found_of(asked_file(tmp_path, how=how), asked)
    assert len(found["idle"]) == 1 and said in found["idle"][0]
    assert found["verdict"] == "not_worth" and "nothing that was tried moves anything" in found["answer"]


def test_one_place_per_rank_is_said_to_leave_no_choice(tmp_path: Path) -> None:
    asked = Asked((3, 6), (0,), seeds=1)
    found = found_of(asked_file(tmp_path), asked, overrides=("model.experts=4",))
    assert found["idle"] == [
        "Every 3, 6 with no spare places per rank: nothing moved. Every rank has one place, so no placement "
        "is better than another."
    ]


def test_what_does_not_fit_is_told_and_the_others_run(tmp_path: Path) -> None:
    # An expert is 1 MiB and a layer holds two; further places do not fit beside the KV cache.
    path = asked_file(tmp_path, memory="16 MiB")
    found = found_of(path, Asked((24,), (0, 6), seeds=1))
    errors = {row["spare"]: row["error"] for row in found["cases"]}
    assert errors[0] == "" and "does not fit" in errors[6]
    assert found["never"]["spare"] == 0


def test_more_workers_find_the_same(tmp_path: Path) -> None:
    path = asked_file(tmp_path)
    one, two = (found_of(path, Asked((12,), (0,), seeds=2), n) for n in (1, 2))
    assert json.dumps(one) == json.dumps(two)


def test_what_is_left_open_follows_from_the_scenario() -> None:
    scenario = tiny(workload={"decode_steps": 64})
    assert sweep(scenario, Asked()) == Asked((0, 2, 4, 8, 16), (0, 1, 2), "packed", 3)
    own = tiny(deployment=parallel(dp=2, experts={"policy": "balanced"}), workload={"decode_steps": 5})
    assert sweep(own, Asked()) == Asked((0, 1), (0,), "balanced", 3)
    assert sweep(own, Asked((7, 7), (1,), "eplb", 5)) == Asked((0, 7), (1,), "eplb", 5)
    much = parallel(dp=2, experts={"policy": "eplb", "spare": 2, "rebalance": {"every": 5}})
    asked = sweep(tiny(deployment=much, workload={"decode_steps": 64}), Asked())
    assert 5 in asked.every, "what the file states is tried, too"


# ---- how sure it is --------------------------------------------------------------------------------


def test_a_margin_is_that_of_students_t_by_hand() -> None:
    # Mean 2, standard deviation 1, three values: 4.303 / sqrt(3).
    assert margin_of([1.0, 2.0, 3.0]) == approx(2.4843, rel=1e-4)
    assert margin_of([1.0]) is None and margin_of([2.0, 2.0]) == 0.0


@pytest.mark.parametrize(
    ("mean", "margin", "verdict"),
    [
        (0.02, 0.01, "worth"),
        (0.02, 0.03, "open"),
        (-0.02, 0.03, "not_worth"),
        (0.0, 0.0, "not_worth"),
        (0.02, None, "worth"),
    ],
)
def test_what_seeds_differ_by_decides_whether_a_gain_is_one(
    mean: float, margin: float | None, verdict: str
) -> None:
    assert verdict_on({"mean": mean, "margin": margin}) == verdict


def test_seeds_that_only_one_of_two_rows_has_are_not_compared() -> None:
    runs = [{"tokens_per_second": rate} for rate in (1.0, 2.0)]
    gain = gain_over({"runs": [runs[1], runs[0]]}, {"runs": [runs[0], None]})
    assert gain == {"mean": 1.0, "margin": None, "each": [1.0]}
    assert gain_over({"runs": [None]}, {"runs": [runs[0]]}) is None and gain_over({"runs": []}, None) is None


def test_means_of_figures_are_key_by_key() -> None:
    figures = [{"a": 1, "b": {"c": 2.0}, "d": None}, {"a": 3, "b": {"c": 4.0}, "d": 1}]
    assert mean_of(figures) == {"a": 2, "b": {"c": 3.0}, "d": None}


def made_up(found: dict[str, Any], path: str, rates: dict[int, tuple[float, ...]]) -> dict[str, Any]:
    """The answer for given tokens per second of each interval and seed; the file's own are the slowest."""
    figures = row_of(found, 3, 0)["runs"][0]
    asked = question(path, (), Asked((3,), (0,), "balanced", 2))
    outcomes = {
        n * len(asked.cells) + at: Outcome({**figures, "tokens_per_second": rate})
        for at, cell in enumerate(asked.cells)
        for n, rate in enumerate(rates[-1 if cell.stated else cell.every])
    }
    return answer(asked, outcomes)


def test_a_gain_within_what_seeds_differ_by_is_not_called_one(found: dict[str, Any], tmp_path: Path) -> None:
    rates = {-1: (90.0, 90.0), 0: (100.0, 100.0), 3: (100.5, 103.1)}
    said = made_up(found, asked_file(tmp_path), rates)
    # Gains of 0.5 % and 3.1 %: 1.8 % in the mean, 12.706 x 1.3 % about it.
    assert said["verdict"] == "open" and said["answer"].startswith("Not to be told: a plan every 3 steps")
    assert "+1.8% ± 16.5%" in said["answer"] and "more --seeds" in said["answer"]


def test_a_file_that_is_faster_as_it_stands_is_said_to_be(found: dict[str, Any], tmp_path: Path) -> None:
    rates = {-1: (120.0, 120.0), 0: (100.0, 100.0), 3: (101.0, 101.0)}
    said = made_up(found, asked_file(tmp_path), rates)["answer"]
    assert 'But the file\'s own placement, "contiguous" with no spare places per rank, is faster' in said


# ---- the command -----------------------------------------------------------------------------------


def test_an_option_that_cannot_be_meant_is_named() -> None:
    for text in ("1,x", "-1", "1.5", "1,,2", "99999999"):
        with pytest.raises(ClustersimError, match=r"--every: .* is no whole number"):
            numbers(text, "--every")
    assert numbers(" 0, 10 ", "--every") == (0, 10) and numbers("", "--every") == ()


QUICK = ("--every", "12", "--spare", "0", "--workers", "1", "--seeds", "2")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    asked_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    return "asked.toml"


def called(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    return _status(["rebalance", *arguments]), *capfd.readouterr()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--policy", "nonsense"), ('asked.toml: --policy: "nonsense"', '"packed"', '"eplb"')),
        (("--policy", "blanced"), ('did you mean "balanced"?',)),
        (("--policy", "contiguous"), ("looks at no load", 'the nearest is "balanced"')),
        (("--policy", "replicated"), ('the nearest is "eplb"',)),
        (("--policy", "balanced", "--spare", "0,1"), ("asked.toml: --spare 0,1", '"packed" have spare')),
        (("--every", "often"), ("--every", "no whole number")),
        (("--seeds", "0"), ("--seeds",)),
        (("--out", "full"), ("left alone",)),
        (("--out", "other"), ("no rebalance.json", "left alone")),
    ],
)
def test_a_mistake_says_so_and_leaves_nothing(
    here: str, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: tuple[str, ...]
) -> None:
    for name in ("full/mine.txt", "other/stress.json", "other/cases.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("mine")
    status, out, err = called(capfd, here, *arguments, "--workers", "1")
    assert status == 2 and out == "" and all(part in err for part in told), err
    assert sorted(path.name for path in Path().iterdir()) == ["asked.toml", "full", "other"]
    assert Path("other/cases.jsonl").read_text() == "mine"


def test_the_command_says_first_what_it_tries_and_last_whether_it_is_worth_it(
    here: str, capfd: pytest.CaptureFixture[str]
) -> None:
    status, out, err = called(capfd, here, *QUICK)
    (folder,) = Path("results").iterdir()
    assert (status, err) == (0, "") and folder.name.startswith("tiny-rebalance-")
    assert sorted(path.name for path in folder.iterdir()) == ["cases.jsonl", "rebalance.json"]
    said = json.loads((folder / "rebalance.json").read_text("utf-8"))
    flat = " ".join(out.split())
    assert flat.index('"packed" is tried in its place') < flat.index("Every so many steps")
    assert flat.endswith(f"Is it worth it? {said['answer']} Result: {folder}")
    assert "p99 token" in out and "stops included" in flat


def test_json_alone_is_on_standard_output(here: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = called(capfd, here, *QUICK, "--json", "--out", "it")
    assert (status, err) == (0, "")
    assert json.loads(out) == json.loads(Path("it/rebalance.json").read_text("utf-8"))


def test_resuming_gives_the_same_bytes_and_runs_nothing(
    here: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called(capfd, here, *QUICK, "--out", "it")
    before = {path.name: path.read_bytes() for path in Path("it").iterdir()}
    monkeypatch.setattr(module, "run_scenario", None)
    status, _, err = called(capfd, here, *QUICK, "--out", "it", "--resume")
    assert status == 0 and "6 cases were done already, 0 were run" in err
    assert {path.name: path.read_bytes() for path in Path("it").iterdir()} == before


def test_an_interruption_prints_the_table_so_far_and_keeps_what_is_done(
    here: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = module.run_scenario, []

    def interrupted(scenario: Any) -> Any:
        seen.append(scenario.seed)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(scenario)

    monkeypatch.setattr(module, "run_scenario", interrupted)
    status, out, err = called(capfd, here, *QUICK, "--out", "it")
    assert status == 130 and "3 finished cases are kept in it" in err
    assert "Every so many steps, so far" in out and "So far: " in out
    assert [path.name for path in Path("it").iterdir()] == ["cases.jsonl"]
    status, out, err = called(capfd, here, *QUICK, "--out", "it", "--resume")
    assert status == 0 and "3 cases were done already, 3 were run" in err and "so far" not in out.lower()
    assert len(seen) == 4 + 3


def test_the_shipped_drift_is_worth_following_and_shows_the_bill() -> None:
    asked = Asked((8,), (1,), seeds=1)
    found = found_of("workloads/drift.toml", asked, overrides=("workload.decode_steps=40",))
    assert found["verdict"] == "worth" and row_of(found, 8, 1)["stopped"] > 0
    assert "of weights, passes stopped for" in found["answer"]
