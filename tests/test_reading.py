"""Reading, writing and overriding scenarios."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.errors import ScenarioError
from clustersim.spec.hardware import FatTree, RailFatTree, SingleServer, VertexByVertex
from clustersim.spec.reading import (
    gpu_count,
    gpu_of,
    json_schema,
    read_catalogue,
    read_scenario,
    scenario_hash,
    to_toml,
)
from clustersim.spec.scenario import Scenario
from clustersim.spec.writing import write_toml

ROOT = Path(__file__).parent.parent
WORKLOADS = sorted((ROOT / "workloads").glob("*.toml"))
TOPOLOGIES = sorted((ROOT / "topologies").glob("*.toml"))

BODY = """
model = "mixtral_8x7b"

[topology]
family = "single_server"
server = "dgx_h100"

[deployment]
data_parallel = 8
expert_parallel = 8

[workload]
phase = "decode"
sequences = 64
prompt_tokens = 1024
decode_steps = 4
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a scenario and returns its path; names with folders make the folders."""

    def write(text: str = f'name = "small"\n{BODY}', name: str = "workloads/small.toml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        return path

    return write


def lines(path: Path, *overrides: str) -> list[str]:
    """The mistakes of a scenario that must have some, without its folder."""
    with pytest.raises(ScenarioError) as caught:
        read_scenario(path, overrides)
    return [line.replace(f"{path.parent}{os.sep}", "") for line in caught.value.lines()]


# --- the files we ship ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
def test_a_shipped_scenario_is_read_under_the_name_of_its_file(path: Path) -> None:
    assert read_scenario(path).name == path.stem


@pytest.mark.parametrize("path", TOPOLOGIES, ids=lambda path: path.stem)
def test_a_shipped_topology_is_sound(path: Path, write: Write) -> None:
    write(path.read_text("utf-8"), "topologies/it.toml")
    scenario = write(f'name = "x"\ntopology = "../topologies/it.toml"\n{_without_topology(BODY)}')
    try:
        read_scenario(scenario)
    except ScenarioError as error:
        # The little deployment does not fill every machine; nothing else may be wrong.
        assert {mistake.place for mistake in error.mistakes} == {"deployment"}


def _without_topology(text: str) -> str:
    return text.replace('[topology]\nfamily = "single_server"\nserver = "dgx_h100"\n', "")


def test_the_seed_deployments_are_as_the_documents_say() -> None:
    large = read_scenario(ROOT / "workloads/large_ep.toml")
    base = read_scenario(ROOT / "workloads/baseline_tp8_pp2.toml")
    wide = read_scenario(ROOT / "workloads/moe_1024.toml")
    assert [gpu_count(s.topology) for s in (large, base, wide)] == [16, 16, 1024]
    assert large.model == base.model and large.model.experts == 16
    assert isinstance(large.topology, RailFatTree) and isinstance(wide.topology, FatTree)
    assert base.deployment.experts.per_gpu == 8 and base.deployment.pipeline_parallel == 2
    assert wide.deployment.expert_parallel == 64 and wide.deployment.pipeline_parallel == 8
    assert large.claimed is not None and large.claimed.tpot == pytest.approx(2.2e-3)
    assert large.claimed.against == base.name


def test_a_file_that_extends_another_keeps_what_it_does_not_say() -> None:
    decode = read_scenario(ROOT / "workloads/large_ep.toml")
    prefill = read_scenario(ROOT / "workloads/large_ep_prefill.toml")
    assert prefill.workload.phase == "prefill" and prefill.workload.decode_steps == 0
    assert prefill.workload.sequences == decode.workload.sequences
    assert (prefill.model, prefill.topology) == (decode.model, decode.topology)


# --- writing and hashing -------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
def test_a_resolved_scenario_reads_back_equal_from_any_folder(path: Path, write: Write) -> None:
    scenario = read_scenario(path)
    again = read_scenario(write(to_toml(scenario), "some/where/else.toml"))
    assert again == scenario
    assert to_toml(again) == to_toml(scenario)
    assert scenario_hash(again) == scenario_hash(scenario)


def test_every_default_is_written_out() -> None:
    text = to_toml(read_scenario(ROOT / "workloads/large_ep.toml"))
    values = tomllib.loads(text)
    assert values["network"] == {
        "fidelity": "fluid",
        "tolerance": 0.0,
        "chunk": "262144.0 B",
        "startup": "measured",
        "queueing": "fair",
        "switching": "store_and_forward",
        "window": 2,
        "buffer": "0.0 B",
        "on_down": "wait",
        "reroute_after": "0.001 s",
    }
    assert values["deployment"]["experts"]["policy"] == "contiguous"
    assert not re.search(r"^from = ", text, re.MULTILINE)


SMALL = Scenario.model_validate(
    {
        "name": "small",
        "topology": {
            "family": "explicit",
            "gpu": read_catalogue("gpus")["h100_sxm"],
            "vertices": [{"name": "g", "kind": "gpu"}],
            "cables": [],
        },
        "model": read_catalogue("models")["olmoe_1b_7b"],
        "deployment": {},
        "workload": {"phase": "prefill", "sequences": 1, "prompt_tokens": 1},
    }
)

texts = st.text(st.characters(codec="utf-8"), max_size=60)

faults = st.builds(
    lambda factor, start, length, period: {
        "kind": "flapping_link",
        "link": "gpu0<->server0/nvswitch",
        "factor": factor,
        "start": f"{start!r} s",
        "end": f"{start + length!r} s",
        "period": f"{period!r} us",
    },
    st.floats(1, 1e6),
    st.floats(0, 1e3),
    st.floats(1, 1e3),
    st.floats(1, 1e3),
)

changes = st.fixed_dictionaries(
    {},
    optional={
        "description": texts,
        "seed": st.integers(0, 2**63 - 1),
        "gating": st.fixed_dictionaries(
            {"skew": st.sampled_from(["even", "zipf"]), "exponent": st.floats(0, 10)}
        ),
        "network": st.fixed_dictionaries({"chunk": st.floats(1, 1e12).map(lambda value: f"{value!r} B")}),
        "faults": st.lists(faults, max_size=3),
        "claimed": st.fixed_dictionaries({"source": texts.filter(bool)}),
        "deployment": st.fixed_dictionaries({"memory_fraction": st.floats(0, 1)}),
    },
)


def _changed(values: dict[str, Any]) -> Scenario:
    return Scenario.model_validate({**{name: getattr(SMALL, name) for name in _SECTIONS}, **values})


_SECTIONS = ("name", "topology", "model", "deployment", "workload")


@given(values=changes)
@settings(deadline=None)
def test_any_scenario_survives_being_written_and_read(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    scenario = _changed(values)
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_bytes(to_toml(scenario).encode())
    again = read_scenario(path)
    assert again == scenario
    assert to_toml(again) == to_toml(scenario)
    assert scenario_hash(again) == scenario_hash(scenario)


@given(one=changes, other=changes)
@settings(deadline=None)
def test_scenarios_share_a_hash_just_when_they_are_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    a, b = _changed(one), _changed(other)
    assert (a == b) == (scenario_hash(a) == scenario_hash(b))


def test_minus_zero_hashes_as_zero() -> None:
    a, b = _changed({"gating": {"exponent": 0.0}}), _changed({"gating": {"exponent": -0.0}})
    assert a == b and scenario_hash(a) == scenario_hash(b)


@given(
    values=st.recursive(
        st.dictionaries(
            st.text(st.characters(codec="utf-8")),
            st.text(st.characters(codec="utf-8"))
            | st.integers()
            | st.booleans()
            | st.floats(allow_nan=False),
        ),
        lambda tables: st.dictionaries(
            st.text(st.characters(codec="utf-8")), tables | st.lists(tables) | st.lists(st.integers())
        ),
        max_leaves=8,
    )
)
def test_what_is_written_is_toml_and_means_the_same(values: dict[str, Any]) -> None:
    assert tomllib.loads(write_toml(values)) == values


# --- references ----------------------------------------------------------------------------------


def test_a_name_and_a_table_with_from_are_the_same(write: Write) -> None:
    by_name = read_scenario(write())
    by_table = read_scenario(
        write(
            'name = "small"\n'
            + BODY.replace('model = "mixtral_8x7b"', "").replace(
                'server = "dgx_h100"', 'server = { from = "dgx_h100" }'
            )
            + '[model]\nfrom = "mixtral_8x7b"\n'
        )
    )
    assert by_name == by_table


def test_keys_beside_from_override(write: Write) -> None:
    text = _without_topology(BODY).replace('model = "mixtral_8x7b"', "")
    scenario = read_scenario(
        write(
            f'name = "small"\n{text}\n'
            '[model]\nfrom = "mixtral_8x7b"\ntop_k = 1\n'
            '[topology]\nfamily = "single_server"\n'
            '[topology.server]\nfrom = "dgx_h100"\nnic_bandwidth = "200 Gb/s"\ngpu = "h200_sxm"\n'
        )
    )
    assert scenario.model.top_k == 1 and scenario.model.name == "mixtral_8x7b"
    assert isinstance(scenario.topology, SingleServer)
    assert scenario.topology.server.nic_bandwidth == 25e9
    assert gpu_of(scenario.topology).name == "h200_sxm"


def test_a_topology_file_can_be_changed_in_part(write: Write) -> None:
    write('family = "rail_fat_tree"\nserver = "dgx_h100"\nservers = 2\n', "topologies/two.toml")
    scenario = read_scenario(
        write(
            f'name = "small"\n{_without_topology(BODY)}\n'
            '[topology]\nfrom = "../topologies/two.toml"\nservers = 1\n'
            "[topology.server]\nnics = 4\n"
        )
    )
    assert isinstance(scenario.topology, RailFatTree)
    assert (scenario.topology.servers, scenario.topology.server.nics) == (1, 4)
    assert scenario.topology.server.name == "dgx_h100"


def test_references_are_relative_to_the_file_that_names_them(write: Write) -> None:
    write('family = "single_server"\nserver = "dgx_h100"\n', "workloads/inner/one.toml")
    write(f'name = "base"\ntopology = "one.toml"\n{_without_topology(BODY)}', "workloads/inner/base.toml")
    path = write('extends = "inner/base.toml"\nname = "outer"\n')
    assert gpu_count(read_scenario(path).topology) == 8


def test_a_new_reference_replaces_the_extended_one_whole(write: Write) -> None:
    write(f'name = "base"\n{BODY}', "workloads/base.toml")
    path = write('extends = "base.toml"\nname = "next"\nmodel = "olmoe_1b_7b"\n')
    assert read_scenario(path).model == read_catalogue("models")["olmoe_1b_7b"]


def test_a_table_without_from_changes_the_extended_one(write: Write) -> None:
    write(f'name = "base"\n{BODY}', "workloads/base.toml")
    path = write('extends = "base.toml"\n[model]\ntop_k = 4\n[topology.server]\nnics = 2\n')
    scenario = read_scenario(path)
    assert (scenario.name, scenario.model.top_k, scenario.model.experts) == ("base", 4, 8)


def test_eight_files_may_extend_one_another_and_nine_may_not(write: Write) -> None:
    write(f'name = "last"\n{BODY}', "workloads/0.toml")
    for depth in range(1, 10):
        write(f'extends = "{depth - 1}.toml"\n', f"workloads/{depth}.toml")
    folder = write().parent
    assert read_scenario(folder / "8.toml").name == "last"
    assert lines(folder / "9.toml")[0].startswith('1.toml:1: extends: "0.toml" is too deep')


def test_a_link_does_not_lead_outside(write: Write, tmp_path: Path) -> None:
    write('family = "single_server"\nserver = "dgx_h100"\n', "topology.toml")
    path = write(f'name = "s"\ntopology = "link.toml"\n{_without_topology(BODY)}', "inside/workloads/s.toml")
    (path.parent / "link.toml").symlink_to(tmp_path / "topology.toml")
    assert lines(path) == [
        's.toml:2: topology: "link.toml" lies outside the folder above the scenario\'s own'
    ]


def test_only_plain_files_of_a_sane_size_are_read(write: Write) -> None:
    path = write(f'name = "s"\ntopology = "odd.toml"\n{_without_topology(BODY)}')
    odd = path.parent / "odd.toml"
    odd.mkdir()
    assert lines(path) == ['small.toml:2: topology: "odd.toml": is not a file']
    odd.rmdir()
    os.mkfifo(odd)
    assert lines(path) == ['small.toml:2: topology: "odd.toml": is not a file']
    odd.unlink()
    odd.write_bytes(b"#" * (16 * 2**20 + 1))
    assert lines(path) == ['small.toml:2: topology: "odd.toml": is larger than 16 MiB']


def test_a_missing_scenario_is_an_error_of_ours(tmp_path: Path) -> None:
    assert lines(tmp_path / "none.toml") == ["none.toml: there is no such file"]
    assert lines(tmp_path / "no\0ne.toml")


@pytest.mark.parametrize("text", ["a." * 5000 + "a = 1", "a = " + "[" * 5000 + "]" * 5000])
def test_absurd_nesting_is_refused(text: str, write: Write) -> None:
    assert lines(write(text)) == ["small.toml: is nested too deeply"]


def test_a_quoted_value_cannot_write_to_the_terminal(write: Write) -> None:
    assert lines(write('name = "a\\n\\u001b[2J"\n' + BODY)) == [
        'small.toml:1: name: "a\\n\\x1b[2J" may hold only letters, digits, "_" and "-", '
        "and must start with a letter or digit"
    ]


# --- overrides -----------------------------------------------------------------------------------


@given(sequences=st.integers(1, 1000), seed=st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_an_override_is_as_if_it_stood_in_the_file(sequences: int, seed: int) -> None:
    path = ROOT / "workloads/large_ep.toml"
    scenario = read_scenario(path, [f"workload.sequences={16 * sequences}", f"seed = {seed}"])
    before = read_scenario(path)
    workload = before.workload.model_copy(update={"sequences": 16 * sequences})
    assert scenario == before.model_copy(update={"workload": workload, "seed": seed})


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("topology.server.nic_bandwidth=200 Gb/s", lambda s: s.topology.server.nic_bandwidth, 25e9),
        ('topology.server.nic_bandwidth="200 Gb/s"', lambda s: s.topology.server.nic_bandwidth, 25e9),
        ("topology.server=dgx_h200", lambda s: s.topology.server.gpu.name, "h200_sxm"),
        ("model=moe_64x16", lambda s: s.model.experts, 64),
        ("model.top_k=1", lambda s: s.model.top_k, 1),
        ("gating.shuffle=false", lambda s: s.gating.shuffle, False),
        ("description=a = b", lambda s: s.description, "a = b"),
        ("description=a\nb = 1", lambda s: s.description, "a\nb = 1"),
        ("gating={skew = 'zipf'}", lambda s: s.gating.skew, "zipf"),
        ("faults=[{kind='slow_gpu', gpu=1, factor=2.0}]", lambda s: s.faults[0].gpu, 1),
        ("topology=../topologies/two_dgx_h100.toml", lambda s: s.topology.family, "rail_fat_tree"),
    ],
)
def test_overrides_take_toml_or_plain_text(
    override: str, read: Callable[[Scenario], object], value: object
) -> None:
    assert read(read_scenario(ROOT / "workloads/large_ep.toml", [override])) == value


def test_an_override_may_reach_into_a_list(write: Write) -> None:
    path = write(f'name = "s"\n{BODY}\n[[faults]]\nkind = "slow_gpu"\ngpu = 1\nfactor = 2.0\n')
    assert read_scenario(path, ["faults.0.factor=3.0"]).faults[0].factor == 3.0
    assert lines(path, "faults.1.factor=3.0") == [
        "small.toml: faults.1.factor: there is no such list element (from --set)"
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=1", 'sede: unknown key (did you mean "seed"?)'),
        ("seed=one", 'seed: must be a whole number, not "one"'),
        ("workload.phase=x", 'workload.phase: "x" is not known; allowed are prefill, decode, both'),
        ("model.name.first=x", "model.name: must be text, not a table"),
        (
            "deployment.expert_parallel=3",
            "deployment.expert_parallel: 3 does not divide 8 experts; 2 and 4 do",
        ),
        *(
            (text, f'"{text}" is not an override; write KEY=VALUE, such as deployment.tensor_parallel=4')
            for text in ("seed", "=1", "a..b=1")
        ),
    ],
)
def test_a_wrong_override_says_that_it_came_from_the_command_line(
    override: str, message: str, write: Write
) -> None:
    assert f"small.toml: {message} (from --set)" in lines(write(), override)


# --- mistakes ------------------------------------------------------------------------------------


def test_lines_are_found_however_the_key_is_written(write: Write) -> None:
    path = write(
        f'name = "s"\ngating.exponent = -1\n"network" . "chunk" = 5 # bytes?\n{BODY}'
        "[[faults]]\nkind = 'slow_gpu'\ngpu = 0\nfactor = 0.1\n"
        "[[faults]]\nkind = 'slow_gpu'\n\ngpu = 0\nfactor = 0.2\n"
    )
    assert [line.split(" ")[:2] for line in lines(path)] == [
        ["small.toml:2:", "gating.exponent:"],
        ["small.toml:3:", "network.chunk:"],
        ["small.toml:23:", "faults.0.factor:"],
        ["small.toml:28:", "faults.1.factor:"],
    ]


def test_an_endless_list_of_mistakes_is_cut(write: Write) -> None:
    path = write(f'name = "s"\n{BODY}' + "[[faults]]\nkind = 'slow_gpu'\nfactor = 0.1\n" * 60)
    found = lines(path)
    assert len(found) == 51 and found[-1] == "small.toml: 10 more mistakes"


#: Values of every TOML type, right and wrong ones.
anything = st.sampled_from(
    [
        *(0, 1, -1, 8, 10**30, 1.5, float("inf"), float("nan"), True),
        *("", "x", "1 s", "400 Gb/s", "h100_sxm", "a.toml", "../x.toml"),
        *([], {}, [1], [[1]], [{}], {"from": "x"}, {"from": 3}, {"a": {"b": 1}}),
    ]
)


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_whatever_stands_in_a_file_it_is_a_scenario_or_a_scenario_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values: Any = tomllib.loads(to_toml(SMALL))
    for _ in range(data.draw(st.integers(1, 3))):
        table = values
        while True:
            key = data.draw(st.sampled_from([*sorted(table), "from", "extends"]))
            if not isinstance(table.get(key), dict) or not table[key] or data.draw(st.booleans()):
                break
            table = table[key]
        table[key] = deepcopy(data.draw(anything))
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(write_toml(values), "utf-8")
    try:
        assert isinstance(read_scenario(path), Scenario)
    except ScenarioError as error:
        assert error.mistakes


# --- the schema for editors ----------------------------------------------------------------------


def test_the_schema_is_json_and_every_reference_in_it_leads_somewhere() -> None:
    schema = json_schema()
    text = json.dumps(schema)
    for name in {part.split('"')[0] for part in text.split("#/$defs/")[1:]}:
        assert name in schema["$defs"]


def test_the_schema_knows_what_may_be_left_out() -> None:
    schema = json_schema()
    assert "extends" in schema["properties"]
    assert schema["then"]["required"] == ["name", "topology", "model", "deployment", "workload"]
    assert schema["if"] == {"not": {"required": ["extends"]}}
    for name in ("Model", "Server", "Gpu"):
        named, table = schema["$defs"][name]["anyOf"]
        assert named["type"] == "string" and "from" in table["properties"]
    assert "required" not in schema["$defs"]["Workload"]


def test_vertices_make_a_topology() -> None:
    values = tomllib.loads((ROOT / "topologies/pair_by_vertices.toml").read_text("utf-8"))
    topology = VertexByVertex.model_validate({**values, "gpu": read_catalogue("gpus")["h100_sxm"]})
    assert gpu_count(topology) == 4
    # Through the leaf: GPU, card, leaf, card, GPU; latencies as of a DGX H100.
    assert sum(cable.latency for cable in topology.cables[4:8]) == pytest.approx(2.68e-6)
