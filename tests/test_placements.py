"""Placements of experts read from files: what they say, where they lie, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from clustersim.errors import ScenarioError
from clustersim.plan.layout import lay_out
from clustersim.spec.reading import read_scenario, to_toml

SCENARIO = """
name = "placed"

[topology]
family = "single_server"
server = "dgx_h100"

[model]
from = "mixtral_8x7b"
layers = 4
moe_layer_step = 2
dense_ffn = 14336

[deployment]
data_parallel = 8
expert_parallel = 8
experts = { policy = "explicit", slots_file = "FILE" }

[workload]
phase = "decode"
sequences = 64
prompt_tokens = 1024
decode_steps = 4
"""

FORWARD, BACKWARD = list(range(8)), list(range(7, -1, -1))
TWO_ROWS = [FORWARD + BACKWARD, BACKWARD + FORWARD]
AS_CSV = "layer,place,expert\n" + "".join(
    f"{layer},{place},{expert}\n" for layer in (1, 0) for place, expert in enumerate(TWO_ROWS[layer])
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "workloads").mkdir()
    (tmp_path / "placements").mkdir()
    return tmp_path


def scenario(folder: Path, name: str, text: str) -> Path:
    """Writes a scenario and its placement file, which lies in a folder beside the scenario's."""
    (folder / "placements" / name).write_text(text, encoding="utf-8")
    path = folder / "workloads" / "placed.toml"
    path.write_text(SCENARIO.replace("FILE", f"../placements/{name}"), encoding="utf-8")
    return path


def complaints(path: Path) -> str:
    with pytest.raises(ScenarioError) as caught:
        read_scenario(path)
    return "\n".join(caught.value.lines())


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.toml", f"layers = {TWO_ROWS}"),
        ("p.json", f'{{"layers": {TWO_ROWS}}}'),
        ("p.json", f'{{"physical_to_logical_map": {TWO_ROWS}}}'),
        ("p.csv", AS_CSV),
    ],
)
def test_every_format_says_the_same(folder: Path, name: str, text: str) -> None:
    found = read_scenario(scenario(folder, name, text))
    assert [list(row) for row in found.deployment.experts.slots_by_layer] == TWO_ROWS
    copies = lay_out(found).copies
    # Layers 1 and 3 have experts: the rows are theirs.
    assert copies[[1, 3]].tolist() == TWO_ROWS


def test_one_row_stands_for_all_layers(folder: Path) -> None:
    found = lay_out(read_scenario(scenario(folder, "p.toml", f"layers = [{BACKWARD}]"))).copies
    assert found.tolist() == [BACKWARD] * 4


def test_a_resolved_scenario_needs_the_file_no_longer(folder: Path) -> None:
    found = read_scenario(scenario(folder, "p.toml", f"layers = {TWO_ROWS}"))
    alone = folder / "workloads" / "alone.toml"
    alone.write_text(to_toml(found), encoding="utf-8")
    (folder / "placements" / "p.toml").unlink()
    assert read_scenario(alone) == found


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("p.toml", f"layers = {[FORWARD] * 3}", "layers: 3 layers, but Mixtral"),
        ("p.toml", f"layers = [{FORWARD[:7]}]", "7 places; every layer needs equally many"),
        ("p.toml", f"layers = [{FORWARD[:7]}]", "no rank holds expert 7"),
        ("p.toml", f"layers = [{[9, *FORWARD[1:]]}]", "there is no expert 9; a layer has 0 to 7"),
        ("p.toml", "layers = [[-1]]", "-1 is too small"),
        ("p.toml", "layers = 3", "has no key layers"),
        ("p.toml", "layers = [", "is not valid TOML"),
        ("p.json", "[", "is not valid JSON"),
        ("p.json", "[]", "has no key layers"),
        ("p.csv", "layer,rank\n", "does not begin with the columns layer,place,expert"),
        ("p.csv", "layer,place,expert\n0,0\n", "p.csv:2: is not three whole numbers"),
        ("p.csv", "layer,place,expert\n0,0,1\n0,0,2\n", "p.csv:3: fills place 0 of layer 0 again"),
        ("p.csv", "layer,place,expert\n0,1,1\n", "its places of layer 0 are not 0, 1, 2"),
        ("p.txt", "", "is not the name of a file of placements: .toml, .json, .csv"),
    ],
)
def test_mistakes_are_told_with_their_place(folder: Path, name: str, text: str, said: str) -> None:
    told = complaints(scenario(folder, name, text))
    assert said.lower() in told.lower()
    assert "has 0 lists" not in told, "a file that could not be read is one mistake"


def test_files_outside_the_folder_above_are_not_read(folder: Path, tmp_path: Path) -> None:
    path = scenario(folder, "p.toml", f"layers = [{FORWARD}]")
    path.write_text(SCENARIO.replace("FILE", "../../p.toml"), encoding="utf-8")
    (tmp_path.parent / "p.toml").write_text(f"layers = [{FORWARD}]", encoding="utf-8")
    assert "lies outside the folder above" in complaints(path)


def test_a_missing_file_is_named(folder: Path) -> None:
    path = scenario(folder, "p.toml", "")
    path.write_text(SCENARIO.replace("FILE", "../placements/q.toml"), encoding="utf-8")
    assert "there is no such file" in complaints(path)
