"""Keys that a choice has no use for are told; a later layer's choice puts aside what earlier ones said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scenarios import tiny

from clustersim.errors import ScenarioError
from clustersim.plan.popularity import popularity
from clustersim.spec.choices import EXPERTS, GATING
from clustersim.spec.deployment import Experts
from clustersim.spec.gating_checks import check_gating
from clustersim.spec.reading import _option_value, read_scenario, to_toml
from clustersim.spec.scenario import Scenario
from clustersim.spec.workload import Gating
from clustersim.spec.writing import write_toml
from clustersim.study.stress_cases import STRESSES, Site


def written(folder: Path, name: str, *, base: str = "", **sections: Any) -> Path:
    """A scenario file: a small one whole, or what is laid over another."""
    values: dict[str, Any] = {"extends": base} if base else tiny().model_dump(exclude_none=True)
    if not base:
        values.pop("gating")
        values["deployment"].pop("experts")
    for key, section in sections.items():
        values[key] = {**values.get(key, {}), **section}
    path = folder / name
    path.write_text(write_toml(values))
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ScenarioError) as caught:
        read_scenario(path, overrides)
    return caught.value.lines()


#: Key → a value that differs from its default.
OTHER = {
    "motion": "drifting",
    "exponent": 2.0,
    "gini": 0.1,
    "hot_experts": 1,
    "hot_share": 0.3,
    "hot_rank": 1,
    "topics": 3,
    "topic_exponent": 0.5,
    "topic_requests": 2,
    "layers": [{"layer": 0, "gini": 0.1, "peak": 1.2}],
    "fitted_experts": 4,
    "counts": "c.csv",
    "measurement": "c",
    "content": "x",
    "half_life": 5.0,
    "burst_every": 30,
    "burst_steps": 3,
    "burst_share": 0.1,
    "rotate_every": 3,
    "correlation": 0.5,
    "node_limited": True,
}


def test_every_key_of_the_table_is_one_of_the_tables_it_is_for() -> None:
    assert set(GATING) == set(OTHER) <= set(Gating.model_fields)
    assert set(EXPERTS) <= set(Experts.model_fields)
    assert {c for use in GATING.values() for c in use.choosers} == {"skew", "motion"}


@pytest.mark.parametrize("key", sorted(set(OTHER) - {"content"}))
def test_a_key_without_a_use_is_told_wherever_it_stands(key: str, tmp_path: Path) -> None:
    even = written(tmp_path, "even.toml", gating={"skew": "even", key: OTHER[key]})
    (told,) = problems(even)
    assert f"gating.{key}:" in told and "even.toml:" in told
    # Without a skew it is the even one that is meant, and an option comes later than the file.
    (told,) = problems(written(tmp_path, "bare.toml", gating={key: OTHER[key]}))
    assert f"gating.{key}:" in told
    beside = {"label": "other", "gating": {"skew": "uniform", key: OTHER[key]}}
    if key != "node_limited":
        (told,) = problems(written(tmp_path, "beside.toml", beside=beside))
        assert f"beside.gating.{key}:" in told


@pytest.mark.parametrize(
    "option, known",
    [
        ("gating.gini=0.2", 'where skew = "even"; it is a key of skew gini and topics (from --set)'),
        ("gating.burst_every=100", 'where motion = "still"; it is a key of motion bursting (from --set)'),
        ("gating.hot_experts=2", "a key of skew hot and hot_rank and of motion rotating (from --set)"),
        ("deployment.experts.copy_choice=least_loaded", 'where policy = "contiguous"; it is a key of policy'),
    ],
)
def test_an_option_without_a_use_is_told_even_where_it_is_the_default(
    option: str, known: str, tmp_path: Path
) -> None:
    (told,) = problems(written(tmp_path, "one.toml", gating={"skew": "even"}), option)
    assert f"{option.split('=')[0]}: changes nothing " in told and known in told


@pytest.mark.parametrize("key", sorted(set(OTHER) - {"content", "layers", "fitted_experts"}))
def test_a_later_choice_puts_aside_what_was_said_for_another(key: str, tmp_path: Path) -> None:
    own = {key: OTHER[key]}
    if "motion" in GATING[key].choosers and key != "hot_experts":
        own |= {"motion": {"half_life": "drifting", "rotate_every": "rotating"}.get(key, "bursting")}
    skews = ("zipf", "gini", "hot", "hot_rank", "topics", "replayed")
    skew = next(s for s in skews if GATING[key].used({"skew": s, "motion": own.get("motion", "still")}))
    below = written(tmp_path, "below.toml", gating={"skew": skew, **own})
    assert read_scenario(below, ["gating.skew=even"]).gating == Gating()
    above = written(tmp_path, "above.toml", base="below.toml", gating={"skew": "even"})
    assert read_scenario(above).gating == Gating()


def test_a_choice_that_is_named_again_keeps_what_was_said_for_it(tmp_path: Path) -> None:
    path = written(tmp_path, "one.toml", gating={"skew": "gini", "gini": 0.3})
    assert read_scenario(path, ["gating.skew=gini"]).gating.gini == 0.3
    assert read_scenario(path, ["gating.skew=topics"]).gating.gini == 0.3
    assert read_scenario(path, ["gating.skew=zipf"]).gating.gini == Gating().gini


def test_a_motion_goes_with_the_skew_that_it_could_move_and_its_keys_with_it(tmp_path: Path) -> None:
    wish = {"skew": "gini", "motion": "drifting", "half_life": 7.0}
    path = written(tmp_path, "one.toml", gating=wish)
    assert read_scenario(path, ["gating.skew=hot_rank"]).gating == Gating(skew="hot_rank")
    assert read_scenario(path, ["gating.skew=zipf"]).gating.half_life == 7.0
    (told,) = problems(path, "gating.skew=uniform", "gating.motion=drifting")
    assert "move nothing" in told and "still and bursting" in told


def test_the_choice_of_copies_goes_with_the_copies(tmp_path: Path) -> None:
    experts = {"policy": "eplb", "spare": 1, "copy_choice": "least_loaded"}
    path = written(tmp_path, "one.toml", deployment={"experts": experts})
    assert read_scenario(path).deployment.experts.copy_choice == "least_loaded"
    assert read_scenario(path, ["deployment.experts.spare=0"]).deployment.experts.copy_choice == "round_robin"
    option = "deployment.experts.copy_choice=least_loaded"
    assert len(problems(path, "deployment.experts.spare=0", option)) == 1


def test_a_scenario_that_was_written_out_reads_back_whatever_its_keys(tmp_path: Path) -> None:
    values = tiny().model_dump(exclude_none=True)
    values["gating"] |= {"exponent": 3.0, "gini": 0.4}
    scenario = Scenario.model_validate(values)
    path = tmp_path / "out.toml"
    path.write_text(to_toml(scenario))
    assert read_scenario(path) == scenario
    (told,) = problems(path, "gating.exponent=3")
    assert "gating.exponent" in told
    # Nor does it matter what was chosen last.
    assert read_scenario(path, ["gating.skew=gini"]).gating.gini == 0.4


def test_what_is_chosen_below_is_not_guessed_where_that_file_cannot_be_read(tmp_path: Path) -> None:
    told = problems(written(tmp_path, "one.toml", base="none.toml", gating={"gini": 0.3}))
    assert not any("changes nothing" in line for line in told)


@pytest.mark.parametrize(
    "gating, most",
    [
        ({"skew": "hot", "hot_experts": 1, "hot_share": 0.9}, "hot_experts = 1 can get at most 0.5"),
        ({"skew": "hot_rank", "hot_experts": 1, "hot_share": 0.6}, "can get at most 0.5 of all choices"),
        (
            {"skew": "gini", "motion": "bursting", "burst_share": 0.7},
            "the hot ones (1) can get at most 0.5",
        ),
    ],
)
def test_a_share_that_top_k_does_not_allow_is_refused(
    gating: dict[str, Any], most: str, tmp_path: Path
) -> None:
    # A token takes 2 different experts: one of them gets at most half of the choices.
    model = {"model": {"experts": 4, "top_k": 2}}
    (told,) = problems(written(tmp_path, "one.toml", gating=gating, **model))
    assert most in told


def test_hot_experts_are_as_few_as_can_get_their_share(tmp_path: Path) -> None:
    model = {"experts": 8, "top_k": 4}
    path = written(tmp_path, "one.toml", gating={"skew": "hot", "hot_share": 0.6}, model=model)
    found = popularity(read_scenario(path).gating, 8, 0, 0, 0, 4)
    # Three experts of a quarter at most are needed for 0.6 of the choices; each gets 0.2.
    assert sorted(found.round(9))[-3:] == [0.2] * 3 and found.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "experts, top_k, ep", [(8, 2, 8), (16, 4, 16), (64, 8, 64), (256, 8, 128), (32, 8, 16)]
)
def test_no_stress_asks_for_more_than_top_k_allows(experts: int, top_k: int, ep: int) -> None:
    model = {"experts": experts, "top_k": top_k}
    scenario = tiny(model=model)
    site = Site(scenario, experts, ep, ep // 2, 0, "gpu0", 12, 1e-3)
    for name, stress in STRESSES.items():
        pairs = (text.split("=", 1) for text in stress.overrides(site) if text.startswith("gating."))
        keys = {key.removeprefix("gating."): _option_value(value) for key, value in pairs}
        wish = Gating.model_validate(keys)
        ranks = scenario.deployment.model_copy(update={"expert_parallel": ep})
        assert list(check_gating(wish, scenario.model, ranks)) == [], name
        assert "{" not in stress.said(site)
