"""The stress suite, breaking points, placements that help, and regime maps, on a tiny deployment."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from scenarios import MODEL, fat_tree, parallel, single_server, tiny

from clustersim.cli import _status
from clustersim.cli.stress import stress as command
from clustersim.errors import ClustersimError
from clustersim.report.stress import help_drawings, map_drawing
from clustersim.spec.reading import read_scenario
from clustersim.spec.writing import to_toml
from clustersim.study.cases import Base, Bench, Figures, figures_of, variant
from clustersim.study.regimes import AXES, MapWish, other_of, parse_axes, regime_map
from clustersim.study.run import run
from clustersim.study.stress import CAUSES, Listener, Wish, folder_of, prepared, stress
from clustersim.study.stress_cases import (
    EVEN,
    NEEDS,
    PLACEMENTS,
    STRESSES,
    Site,
    gini,
    placements_of,
    site_of,
    slow_gpu,
)
from clustersim.study.stress_schema import FIGURES, SCHEMA

#: Four GPUs in two servers, two experts each, six steps.
FOUR: dict[str, Any] = {
    "deployment": parallel(dp=4),
    "model": {"experts": 8},
    "workload": {"sequences": 32, "decode_steps": 6},
}


def written(tmp_path: Path, name: str = "tiny", **sections: Any) -> Base:
    path = tmp_path / f"{name}.toml"
    scenario = tiny(fat_tree(2, 2), **(FOUR | {"name": name} | sections))
    path.write_text(to_toml(scenario), encoding="utf-8")
    return Base(str(path))


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return written(tmp_path)


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole answer, with all parts."""
    base = written(tmp_path_factory.mktemp("stress"))
    with Bench(1) as bench:
        return stress(Wish(base, slo=""), bench)


def site(base: Base) -> Site:
    return site_of(prepared(Wish(base))[1], 6, 1e-4)


def figures(base: Base, *overrides: str) -> Figures:
    case = variant(base, "case", ("trace.level=sums", *overrides))
    assert case.scenario is not None and not case.problem, case.problem
    return figures_of(case.scenario)


def by_case(answer: dict[str, Any]) -> dict[str, Any]:
    return {row["case"]: row for row in answer["suite"]}


# --- the suite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRESSES)
def test_every_stress_is_a_scenario_that_runs_and_says_what_it_is(base: Base, name: str) -> None:
    one = STRESSES[name]
    assert not one.lacking(site(base))
    assert "{" not in one.said(site(base)) and figures(base, *one.overrides(site(base)))


def test_the_first_case_is_balanced_and_every_case_ran(answer: dict[str, Any]) -> None:
    rows = by_case(answer)
    assert next(iter(rows)) == "balanced" and set(STRESSES) <= set(rows)
    assert not [row["error"] for row in answer["suite"] if row["error"]]
    assert rows["balanced"]["against_balanced"] == {"tokens_per_second": 1, "p50_step": 1, "p99_step": 1}


def test_cases_share_their_random_numbers(base: Base) -> None:
    # Two placements of the same draws: as many tokens for each expert, whatever its place.
    skewed = gini(0.4)
    one, other = (
        figures(base, *skewed, f"deployment.experts.policy={p}") for p in ("contiguous", "round_robin")
    )
    assert one["hottest"]["expert"] is not None and one["steps"] == other["steps"]
    assert figures(base, *EVEN) == figures(base, *EVEN)


def test_the_same_call_gives_the_same_answer(base: Base, answer: dict[str, Any]) -> None:
    with Bench(2) as bench:
        again = stress(Wish(base), bench)
    again["file"] = answer["file"]
    assert json.dumps(again) == json.dumps(answer)


def test_overrides_of_a_case_give_the_same_run_by_themselves(base: Base, answer: dict[str, Any]) -> None:
    row = by_case(answer)["hot_on_slow_gpu"]
    alone = run(base.file, row["overrides"]).summary
    assert alone["latency"]["step"] == row["figures"]["latency"]["step"]


def test_a_hot_rank_is_named_with_its_layer_and_expert(base: Base, answer: dict[str, Any]) -> None:
    row, where = by_case(answer)["hot_rank"], site(base)
    hottest = row["figures"]["hottest"]
    assert hottest["ep_rank"] == where.ep_rank and hottest["rank"] == where.rank
    assert hottest["expert"] // where.each == where.ep_rank and 0 <= hottest["layer"] < MODEL["layers"]
    assert hottest["load"] == max(r["figures"]["hottest"]["load"] for r in answer["suite"] if r["figures"])


def test_nobody_comes_to_an_idle_rank(base: Base) -> None:
    overrides = STRESSES["idle_rank"].overrides(site(base))
    trace = run(base.file, overrides).trace["experts"]
    idle = trace.columns["ep_rank"] == site(base).ep_rank
    assert trace.columns["tokens"][idle].sum() == 0 < trace.columns["tokens"].sum()


def test_no_stress_is_faster_than_even_load_and_a_hot_slow_gpu_is_worst_of_its_parts(
    answer: dict[str, Any],
) -> None:
    ratios = {name: row["against_balanced"]["p99_step"] for name, row in by_case(answer).items()}
    assert min(ratios[name] for name in ("hot_rank", "slow_gpu", "throttled_gpu", "slow_link")) >= 1
    assert ratios["hot_on_slow_gpu"] >= max(ratios["hot_rank"], ratios["slow_gpu"])


def test_a_slower_gpu_never_speeds_up_a_step(base: Base) -> None:
    steps = [
        figures(base, *EVEN, slow_gpu(site(base), factor))["latency"]["step"]["p99"]
        for factor in (1.0, 1.2, 2.0, 5.0)
    ]
    assert steps == sorted(steps)


def test_the_faults_of_the_file_stay(tmp_path: Path) -> None:
    own = {"kind": "slow_gpu", "gpu": 0, "factor": 1.1, "start": "1 ms"}
    base = written(tmp_path, faults=(own,))
    kept = [base.scenario(STRESSES[name].overrides(site(base))).faults for name in ("slow_link", "hot_set")]
    assert all(faults[0].gpu == 0 and faults[0].start == 1e-3 for faults in kept)
    assert [len(faults) for faults in kept] == [2, 1]


def test_a_slow_link_is_that_of_the_troubled_gpu(base: Base, tmp_path: Path) -> None:
    # GPU 2 is the first of server 1; with one server there is no card to be slow.
    assert (site(base).rank, site(base).link) == (2, "server1/nic0")
    path = tmp_path / "one.toml"
    path.write_text(to_toml(tiny(single_server(4), **FOUR)), encoding="utf-8")
    assert site(Base(str(path))).link == tiny_gpu(path)


def tiny_gpu(path: Path) -> str:
    ranks = run(str(path)).trace["ranks"]
    return str(ranks.columns["gpu"].rows()[2])


def test_what_does_not_apply_is_told_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "one.toml"
    one = {"deployment": parallel(), "workload": {"sequences": 4, "decode_steps": 1}}
    path.write_text(to_toml(tiny(single_server(1), **one)), encoding="utf-8")
    with Bench(1) as bench:
        found = stress(Wish(Base(str(path))), bench)
    rows = by_case(found)
    assert not rows["hot_rank"]["applies"] and "one rank" in rows["hot_rank"]["error"]
    assert "one source" in rows["ragged_sources"]["error"] and found["help"] is None
    assert set(NEEDS) == {need for stress in STRESSES.values() for need in stress.needs}


# --- the bound -----------------------------------------------------------------------------------


def test_the_default_bound_is_kept_by_the_balanced_case(answer: dict[str, Any]) -> None:
    step = by_case(answer)["balanced"]["figures"]["latency"]["step"]["p99"]
    assert answer["slo"]["limit"] == pytest.approx(1.2 * step) and not answer["slo"]["stated"]
    assert not by_case(answer)["balanced"]["missed"]


def test_at_a_breaking_point_the_bound_is_missed_and_just_before_it_is_kept(
    base: Base, answer: dict[str, Any]
) -> None:
    row = next(row for row in answer["breaking"] if row["cause"] == "slow GPU")
    assert row["verdict"] == "breaks"
    kept, missed = (
        figures(base, *CAUSES["slow GPU"].overrides(site(base), row[key]))["latency"]["step"]["p99"]
        for key in ("kept_at", "missed_at")
    )
    assert kept <= answer["slo"]["limit"] < missed
    assert row["missed_at"] <= row["kept_at"] * 1.02


def test_every_cause_has_an_answer(answer: dict[str, Any]) -> None:
    assert [row["cause"] for row in answer["breaking"]] == list(CAUSES)
    assert all(row["verdict"] in ("breaks", "never", "always") for row in answer["breaking"])


def test_a_bound_that_nothing_can_keep_is_missed_at_its_mildest(base: Base) -> None:
    with Bench(1) as bench:
        found = stress(Wish(base, ("breaking",), "p99 step < 1 ns"), bench)
    assert {row["verdict"] for row in found["breaking"]} == {"always"}
    assert found["breaking"][0]["said"].startswith("even at 0 (no skew) the bound is missed: p99 step is ")
    assert found["breaking"][0]["said"].endswith(" against the bound 1 ns")


def test_a_bound_that_holds_throughout_is_told_with_the_range_and_the_worst_value(base: Base) -> None:
    with Bench(1) as bench:
        found = stress(Wish(base, ("breaking",), "p99 step < 1 s"), bench)
    said = [row["said"] for row in found["breaking"]]
    assert all("the bound holds: p99 step is at most" in one and "bound 1 s" in one for one in said)
    assert said[1].startswith("up to 16, the worst of 5 values tried")


def test_a_bound_on_what_the_scenario_does_not_have_is_refused_before_anything_runs(base: Base) -> None:
    def never(_: object) -> Figures:
        raise AssertionError("ran")

    with Bench(1, work=never) as bench, pytest.raises(ClustersimError, match="has no p99 TTFT"):
        stress(Wish(base, slo="p99 TTFT < 1 s"), bench)


# --- what helps ----------------------------------------------------------------------------------


def test_every_placement_is_tried_on_every_case(answer: dict[str, Any], base: Base) -> None:
    names = list(placements_of(site(base)))
    assert names[0] == "as_stated" and set(names[1:]) == {n for n in PLACEMENTS if "groups" not in n}
    assert [row["case"] for row in answer["help"]["rows"]] == [row["case"] for row in answer["suite"]]
    assert all([cell["placement"] for cell in row["cells"]] == names for row in answer["help"]["rows"])
    assert not [cell["error"] for row in answer["help"]["rows"] for cell in row["cells"] if cell["error"]]


def test_spare_places_even_out_a_hot_rank(answer: dict[str, Any]) -> None:
    row = next(row for row in answer["help"]["rows"] if row["case"] == "hot_rank")
    loads = {cell["placement"]: cell["imbalance"] for cell in row["cells"]}
    assert loads["packed + 2"] < loads["contiguous"] and loads["balanced"] < loads["contiguous"]


def test_a_placement_that_does_not_fit_is_an_entry(tmp_path: Path) -> None:
    # An expert of a layer takes 64 x 128 x 2 matrices x 2 B = 32 kB, of both layers 64 kB. Memory is chosen
    # so that two experts per rank fit and three do not.
    base = written(tmp_path)
    needs = run(base.file).summary["memory"]["total"]
    room = f"topology.server.gpu.memory={(needs + 40_000) / 0.9:.0f} B"
    with Bench(1) as bench:
        found = stress(Wish(Base(base.file, (room,)), ("help",)), bench)
    row = next(row for row in found["help"]["rows"] if row["case"] == "balanced")
    errors = {cell["placement"]: cell["error"] for cell in row["cells"]}
    assert errors["contiguous"] == "" and errors["eplb + 1"].startswith("does not fit: ")


def test_the_placement_of_the_file_is_replaced_whole(tmp_path: Path) -> None:
    slots = [[0, 1], [2, 3], [4, 5], [6, 7]]
    base = written(tmp_path, deployment=parallel(dp=4, experts={"policy": "explicit", "slots": slots}))
    for lay in placements_of(site(base)).values():
        assert not variant(base, "it", lay).problem


def test_where_load_moves_placing_experts_anew_has_rows_with_its_bill(answer: dict[str, Any]) -> None:
    rows = answer["help"]["moving"]["rows"]
    assert {row["case"] for row in rows} == {"rotating", "burst"}
    assert {row["transfer"] for row in rows} == {"stop", "background"}
    assert not [row["error"] for row in rows if row["error"]]
    for row in rows:
        rates = [row[side]["against_balanced"] for side in ("once", "anew")]
        assert row["gain"] == pytest.approx(rates[1] / rates[0] - 1) and row["bill"]["planned"] > 0
    stopped = [row for row in rows if row["transfer"] == "stop" and row["bill"]["moved"]]
    assert stopped and all(row["bill"]["stopped"] > 0 < row["bill"]["bytes"] for row in stopped)


def test_a_placement_that_helps_one_case_is_not_said_to_help_none(answer: dict[str, Any]) -> None:
    said = next(note for note in answer["notes"] if "single case" in note)
    better = [
        row["case"]
        for row in answer["help"]["rows"]
        if min(cell["p99_step"] for cell in row["cells"]) < 0.98 * row["cells"][0]["p99_step"]
    ]
    assert ("In no single case" in said) == (not better)
    named = re.findall(r"([\w.]+) from [\d.]+ to", said)
    assert named and set(named) <= set(better)


# --- what is left behind -------------------------------------------------------------------------


def keys(value: Any, place: str = "") -> set[str]:
    if isinstance(value, dict):
        return {k for key, child in value.items() for k in keys(child, f"{place}.{key}" if place else key)}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {k for child in value for k in keys(child, f"{place}[]")}
    return {place}


def test_every_key_of_the_answer_is_explained(answer: dict[str, Any]) -> None:
    whole = " ".join([*SCHEMA, *SCHEMA.values()])
    for row in answer["suite"]:
        for key in row["figures"]:
            assert any(known.split(".")[0] == key for known in FIGURES), key
    for key in keys({k: v for k, v in answer.items() if k != "suite"}):
        if "figures" not in key:
            assert key.split(".")[-1].removesuffix("[]") in whole, key


def test_the_drawings_are_well_formed_and_show_every_cell(answer: dict[str, Any]) -> None:
    drawings = help_drawings(answer)
    assert set(drawings) == {"placements.svg", "placements-load.svg"}
    cells = sum(len(row["cells"]) for row in answer["help"]["rows"])
    for text in drawings.values():
        root = ElementTree.fromstring(text)
        assert len(list(root.iter("{http://www.w3.org/2000/svg}g"))) == cells


def test_rows_are_told_in_order_as_soon_as_they_are_known(base: Base) -> None:
    told: list[tuple[str, Any]] = []
    with Bench(2) as bench:
        found = stress(Wish(base), bench, Listener(row=lambda kind, value: told.append((kind, value))))
    assert [kind for kind, _ in told][:2] == ["head", "suite"]
    assert [value["case"] for kind, value in told if kind == "suite"] == [r["case"] for r in found["suite"]]
    assert [kind for kind, _ in told][-4:] == ["breaking"] * 3 + ["help"]


# --- regime maps ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("skew", "two names"),
        ("skew,tokens,spare", "two names"),
        ("skwe,tokens", 'did you mean "skew"'),
        ("skew,skew", "cannot be varied together"),
        ("bananas,skew", "there are skew, tokens, spare, slow_gpu, slow_link"),
        ("slow_gpu,slow_link", "cannot be varied together"),
    ],
)
def test_axes_that_make_no_map_are_refused(text: str, told: str) -> None:
    with pytest.raises(ClustersimError, match="--map") as caught:
        parse_axes(text)
    assert told in str(caught.value)


def test_the_help_of_the_command_lists_the_axes_there_are() -> None:
    (told,) = (one.help for one in command.params if one.name == "axes")
    assert told.rstrip(".").rpartition(" of ")[2].replace(" and ", ", ").split(", ") == list(AXES)


@pytest.mark.parametrize("name", AXES)
def test_every_axis_has_values_that_run(base: Base, name: str) -> None:
    axis, where = AXES[name], site(base)
    values = axis.values([where, where])
    assert len(values) >= 2 and list(values) == sorted(values)
    assert figures(base, *axis.overrides(where, values[0])) and figures(
        base, *axis.overrides(where, values[1])
    )


def test_a_map_of_a_deployment_against_itself_is_all_ties(base: Base) -> None:
    with Bench(1) as bench:
        found = regime_map(MapWish(base, base, "tokens", "slow_gpu"), bench)
    ran = [cell for cell in found["map"]["cells"] if cell["ratio"] is not None]
    assert (
        ran and {cell["better"] for cell in ran} == {"neither"} and {cell["ratio"] for cell in ran} == {1.0}
    )


def test_a_map_says_where_the_slower_deployment_is_worse(base: Base) -> None:
    slower = Base(base.file, ("topology.server.gpu.memory_bandwidth=10 GB/s",))
    with Bench(1) as bench:
        found = regime_map(MapWish(base, slower, "skew", "spare"), bench)
    cells = found["map"]["cells"]
    assert len(cells) == len(found["map"]["x"]["values"]) * len(found["map"]["y"]["values"])
    assert {cell["better"] for cell in cells} == {"a"}
    assert found["notes"][0].startswith("Of 18 points A is better at 18 (by ")
    root = ElementTree.fromstring(map_drawing(found))
    assert len(list(root.iter("{http://www.w3.org/2000/svg}g"))) == len(cells)


def test_the_other_deployment_is_that_of_the_claim(tmp_path: Path) -> None:
    claimed = {"source": "a brochure", "against": "peer"}
    base = written(tmp_path, claimed=claimed)
    with pytest.raises(ClustersimError, match=r"no .*peer\.toml"):
        other_of(base.file, base.scenario(), None)
    peer = written(tmp_path, "peer")
    assert other_of(base.file, base.scenario(), None) == peer.file
    with pytest.raises(ClustersimError, match="--against"):
        other_of(peer.file, peer.scenario(), None)


# --- the command ---------------------------------------------------------------------------------


def called(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = _status(["stress", *arguments])
    return status, *capfd.readouterr()


@pytest.fixture
def here(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    monkeypatch.chdir(tmp_path)
    return Base("tiny.toml")


def test_the_command_prints_and_leaves_the_answer(here: Base, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = called(capfd, here.file, "--workers", "1")
    folder = folder_of(prepared(Wish(here))[1], None)
    assert (status, err) == (0, "")
    assert out.startswith("tiny under stress  seed 0") and f"Result: {folder}" in out
    assert 'copy_choice = "least_loaded"' in out, "how copies share tokens stands under the table"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["cases.jsonl", "placements-load.svg", "placements.svg", "stress.json"]


def test_resuming_gives_the_same_bytes_and_runs_nothing(
    here: Base, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called(capfd, here.file, "--workers", "1", "--out", "it")
    before = {path.name: path.read_bytes() for path in Path("it").iterdir()}
    monkeypatch.setattr("clustersim.study.cases.run_scenario", None)
    status, _, err = called(capfd, here.file, "--workers", "1", "--out", "it", "--resume")
    assert status == 0 and "were done already, 0 were run" in err
    assert {path.name: path.read_bytes() for path in Path("it").iterdir()} == before


def test_resuming_one_part_keeps_the_others_and_their_drawings_and_runs_nothing(
    here: Base, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called(capfd, here.file, "--workers", "1", "--out", "it")
    before = {path.name: path.read_bytes() for path in Path("it").iterdir()}
    monkeypatch.setattr("clustersim.study.cases.run_scenario", None)
    status, out, _ = called(
        capfd, here.file, "--workers", "1", "--out", "it", "--resume", "--only", "breaking"
    )
    assert status == 0 and "Where the bound breaks" in out and "What would help" not in out
    assert {path.name: path.read_bytes() for path in Path("it").iterdir()} == before


def test_another_bound_judges_kept_runs_anew_and_leaves_breaking_points_out(
    here: Base, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called(capfd, here.file, "--workers", "1", "--out", "it")
    monkeypatch.setattr("clustersim.study.cases.run_scenario", None)
    bound = ("--slo", "p99 step < 1 ns")
    _, _, err = called(
        capfd, here.file, "--workers", "1", "--out", "it", "--resume", "--only", "help", *bound
    )
    found = json.loads(Path("it/stress.json").read_text("utf-8"))
    assert found["parts"] == ["suite", "help"] and all(row["missed"] for row in found["suite"])
    assert "breaking points are of another bound" in err and found["breaking"] == []


def test_a_call_begun_anew_leaves_no_drawing_of_an_earlier_one(
    here: Base, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("it").mkdir()
    for name in ("stress.json", "placements.svg", "cases.jsonl"):
        Path("it", name).write_text("")
    status, out, _ = called(capfd, here.file, "--workers", "1", "--out", "it", "--only", "breaking")
    assert status == 0 and "The suite" not in out and "tokens/s" not in out
    assert sorted(path.name for path in Path("it").iterdir()) == ["cases.jsonl", "stress.json"]


def test_a_call_that_is_refused_leaves_an_earlier_answer_as_it_was(
    here: Base, capfd: pytest.CaptureFixture[str]
) -> None:
    it = (here.file, "--workers", "1", "--out", "it")
    called(capfd, *it, "--only", "suite")
    before = {path.name: path.read_bytes() for path in Path("it").iterdir()}
    # The second is seen only when even load is laid out: it does not fit into memory.
    for refused in (("--slo", "p99 TTFT < 1 s"), ("--set", "workload.prompt_tokens=900000000")):
        assert called(capfd, *it, *refused)[0] == 2
        assert {path.name: path.read_bytes() for path in Path("it").iterdir()} == before


def test_parts_of_another_version_of_the_program_are_left_out_and_it_is_said(
    here: Base, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = (here.file, "--workers", "1", "--out", "it")
    called(capfd, *it, "--only", "suite")
    monkeypatch.setattr("clustersim.study.cases.code_digest", lambda: "another")
    _, _, err = called(capfd, *it, "--resume", "--only", "breaking")
    assert "suite there are of another version of the program and are left out" in err
    assert json.loads(Path("it/stress.json").read_text("utf-8"))["parts"] == ["breaking"]


def test_where_there_is_nothing_to_place_the_help_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    one = {"deployment": parallel(), "workload": {"sequences": 4, "decode_steps": 1}}
    Path("one.toml").write_text(to_toml(tiny(single_server(1), **one)), encoding="utf-8")
    _, out, _ = called(capfd, "one.toml", "--workers", "1", "--out", "it", "--only", "help")
    assert "There is nothing to place in another way" in out


def test_cases_of_another_scenario_or_question_are_refused(
    here: Base, capfd: pytest.CaptureFixture[str]
) -> None:
    called(capfd, here.file, "--workers", "1", "--out", "it", "--only", "suite")
    before = {path.name: path.read_bytes() for path in Path("it").iterdir()}
    status, _, err = called(capfd, here.file, "--workers", "1", "--out", "it", "--resume", "--seed", "9")
    assert status == 2 and "it/cases.jsonl: line 1: holds cases of stress of tiny (" in err
    Path("it/stress.json").unlink()
    assert _status(["rebalance", here.file, "--workers", "1", "--out", "it"]) == 2
    assert "holds cases of stress of tiny" in capfd.readouterr().err
    assert Path("it/cases.jsonl").read_bytes() == before["cases.jsonl"]


def test_damaged_lines_are_told_with_their_numbers(here: Base, capfd: pytest.CaptureFixture[str]) -> None:
    called(capfd, here.file, "--workers", "1", "--out", "it", "--only", "suite")
    kept = Path("it/cases.jsonl")
    whole = kept.read_bytes()
    kept.write_bytes(b"junk\n" + b"".join(whole.splitlines(keepends=True)[1:]))
    _, _, err = called(capfd, here.file, "--workers", "1", "--out", "it", "--resume", "--only", "suite")
    assert "it/cases.jsonl: 1 line unreadable (1)" in err and " 1 were run" in err
    assert kept.read_bytes() == whole


def test_json_alone_is_on_standard_output(here: Base, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = called(capfd, here.file, "--json", "--workers", "1", "--out", "it", "--only", "suite")
    assert (status, err) == (0, "")
    assert json.loads(out) == json.loads(Path("it/stress.json").read_text("utf-8"))


def test_a_map_is_printed_and_left(here: Base, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = called(
        capfd,
        here.file,
        "--map",
        "skew,spare",
        "--set-b",
        "workload.sequences=16",
        "--workers",
        "1",
        "--out",
        "m",
    )
    assert (
        status == 0
        and "A: tiny (tiny.toml) as it stands\nB: tiny (tiny.toml) with workload.sequences=16" in out
    )
    assert sorted(path.name for path in Path("m").iterdir()) == ["cases.jsonl", "map.svg", "stress.json"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nowhere.toml",), "nowhere.toml"),
        (("tiny.toml", "--slo", "p99 stp < 5 ms"), 'did you mean "step"'),
        (("tiny.toml", "--slo", "p99 TTFT < 5 ms"), "has no p99 TTFT"),
        (("tiny.toml", "--map", "skew"), "two names"),
        (("tiny.toml", "--map", "skew,tokens"), "--against"),
        (("tiny.toml", "--map", "skew,tokens", "--slo", "p99 step < 1 s"), "leave --slo"),
        (("tiny.toml", "--set-b", "seed=1"), "--map"),
        (("tiny.toml", "--set", "gating.skew=hott"), "hot"),
        (("tiny.toml", "--steps", "0"), "--steps"),
        (("tiny.toml", "--only", "sweet"), "suite"),
        (("tiny.toml", "--out", "full"), "left alone"),
    ],
)
def test_a_mistake_says_so_and_leaves_nothing(
    here: Base, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    status, out, err = called(capfd, *arguments, "--workers", "1")
    assert status == 2 and told in err and out == "" and "Traceback" not in err
    assert sorted(path.name for path in Path().iterdir()) == ["full", "tiny.toml"]


def test_fewer_steps_are_run_than_a_long_file_has_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = written(tmp_path, workload={"sequences": 32, "decode_steps": 40})
    _, out, _ = called(capfd, base.file, "--workers", "1", "--only", "suite", "--out", "it")
    assert "8 decode steps per case, the file's 40 cut short" in out
    assert read_scenario(base.file).workload.decode_steps == 40
    assert json.loads(Path("it/stress.json").read_text("utf-8"))["decode_steps"] == {"run": 8, "in_file": 40}
