"""`clustersim rebalance`: what is tried, what is compared, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pytest import approx
from scenarios import NVLINK, parallel, single_server, tiny

from clustersim.cli import main
from clustersim.errors import ClustersimError
from clustersim.spec.writing import to_toml
from clustersim.study.rebalancing import Asked, numbers, rebalance, sweep

MOVING = {"skew": "zipf", "exponent": 1.5, "motion": "rotating", "rotate_every": 12}


def asked_file(folder: Path, nvlink: float = NVLINK, memory: str = "80 GiB", **gating: Any) -> str:
    """Eight wide experts over four GPUs, 48 decode steps: their products are most of a step."""
    scenario = tiny(
        single_server(4, nvlink=nvlink, memory=memory),
        model={"experts": 8, "layers": 2, "ffn": 4096, "top_k": 1},
        deployment=parallel(dp=4, experts={"rebalance": {"window": 2}}),
        gating={**MOVING, **gating},
        workload={"sequences": 512, "decode_steps": 48},
        network={"startup": "none"},
    )
    path = folder / "asked.toml"
    path.write_text(to_toml(scenario), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = asked_file(tmp_path_factory.mktemp("found"))
    return rebalance(path, asked=Asked((3, 12), (0, 1), "packed"), workers=1)


def test_every_interval_is_run_with_every_number_of_spare_places_and_never_too(found: dict[str, Any]) -> None:
    tried = [(case["every"], case["spare"]) for case in found["cases"]]
    assert tried == [(0, 0), (3, 0), (12, 0), (0, 1), (3, 1), (12, 1)]
    assert not any(case["error"] for case in found["cases"])
    for case in found["cases"]:
        never = next(c for c in found["cases"] if c["spare"] == case["spare"] and not c["every"])
        assert case["gain"] == approx(case["tokens_per_second"] / never["tokens_per_second"] - 1)
        assert (case["planned"] == 0) == (case["every"] == 0)


def test_the_best_is_the_one_with_most_tokens_per_second(found: dict[str, Any]) -> None:
    rates = {(case["every"], case["spare"]): case["tokens_per_second"] for case in found["cases"]}
    best = found["best"]
    assert rates[best["every"], best["spare"]] == best["tokens_per_second"] == max(rates.values())
    assert found["worth"] == (best["every"] > 0)


def test_where_the_hot_experts_move_on_following_them_is_worth_it(found: dict[str, Any]) -> None:
    assert found["worth"] and found["best"]["gain"] > 0.02
    assert found["sentences"][0].startswith("Best: a plan every")
    never, often = (
        next(case for case in found["cases"] if (case["every"], case["spare"]) == (every, 0))
        for every in (0, 3)
    )
    assert often["imbalance"]["mean"] < never["imbalance"]["mean"]
    assert often["bytes"] > 0 and often["stopped"] > 0 and never["bytes"] == 0


def test_where_weights_take_longer_than_any_balance_saves_it_says_so(tmp_path: Path) -> None:
    path = asked_file(tmp_path, nvlink=NVLINK / 1000)
    found = rebalance(path, asked=Asked((1,), (0,)), workers=1)
    assert not found["worth"] and found["best"]["every"] == 0
    assert found["cases"][1]["gain"] < 0
    assert (
        found["sentences"][0].startswith("Not worth it: never")
        and "against never: -" in found["sentences"][1]
    )


def test_what_does_not_fit_is_told_and_the_others_run(tmp_path: Path) -> None:
    # An expert is 1 MiB and a layer holds two; further places do not fit beside the KV cache.
    path = asked_file(tmp_path, memory="16 MiB")
    found = rebalance(path, asked=Asked((24,), (0, 6)), workers=1)
    errors = [case["error"] for case in found["cases"]]
    assert errors[:2] == ["", ""] and all("does not fit" in error for error in errors[2:])
    assert found["best"]["spare"] == 0


def test_more_workers_find_the_same(tmp_path: Path) -> None:
    path = asked_file(tmp_path)
    one, two = (rebalance(path, asked=Asked((12,), (0,)), workers=n) for n in (1, 2))
    assert json.dumps(one) == json.dumps(two)


def test_what_is_left_open_follows_from_the_scenario() -> None:
    scenario = tiny(workload={"decode_steps": 64})
    assert sweep(scenario, Asked()) == Asked((0, 2, 4, 8, 16), (0, 1, 2), "packed")
    own = tiny(deployment=parallel(dp=2, experts={"policy": "balanced"}), workload={"decode_steps": 5})
    assert sweep(own, Asked()) == Asked((0, 1), (0,), "balanced")
    assert sweep(own, Asked((7, 7), (1,), "eplb")) == Asked((0, 7), (1,), "eplb")


def test_an_option_that_cannot_be_meant_is_named(tmp_path: Path) -> None:
    for text in ("1,x", "-1", "1.5", "1,,2", "99999999"):
        with pytest.raises(ClustersimError, match=r"--every: .* is no whole number"):
            numbers(text, "--every")
    assert numbers(" 0, 10 ", "--every") == (0, 10) and numbers("", "--every") == ()
    with pytest.raises(ClustersimError, match=r'--policy.*"contiguous"'):
        rebalance(asked_file(tmp_path), asked=Asked(policy="contiguous"))
    with pytest.raises(ClustersimError, match="has no spare places"):
        rebalance(asked_file(tmp_path), asked=Asked((1,), (1,), "balanced"))


def test_the_command_prints_a_table_and_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = asked_file(tmp_path)
    with pytest.raises(SystemExit) as status:
        main(["rebalance", path, "--every", "12", "--spare", "0", "--workers", "1"])
    printed = capsys.readouterr().out
    assert not status.value.code and "against never" in printed and "Answer" in printed
    with pytest.raises(SystemExit):
        main(["rebalance", path, "--every", "12", "--spare", "0", "--workers", "1", "--json"])
    assert [case["every"] for case in json.loads(capsys.readouterr().out)["cases"]] == [0, 12]
    with pytest.raises(SystemExit) as status:
        main(["rebalance", path, "--every", "often"])
    assert status.value.code == 2
