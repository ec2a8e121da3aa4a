"""The command line and the Python face: what is printed where, what is left behind, and the exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import clustersim
from clustersim.cli import _status
from clustersim.errors import ClustersimError
from clustersim.spec.reading import read_scenario
from clustersim.study.run import find, result_folder
from clustersim.trace.files import read
from clustersim.trace.record import TABLES, Text

TINY = """
name = "tiny"
model = { from = "olmoe_1b_7b", layers = 2 }

[topology]
family = "single_server"
server = "dgx_h100"

[deployment]
data_parallel = 8
expert_parallel = 8

[workload]
phase = "decode"
sequences = 16
prompt_tokens = 64
decode_steps = 3

[gating]
skew = "zipf"

[claimed]
source = "a brochure"
total_tokens_per_second = 1000
tpot = "1 ms"
against = "tiny_peer"
"""


class Streams:
    """What a call of the command line gave."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A scenario file in an empty folder, which is also where the command runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")
    return "tiny.toml"


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Any:
    def calling(*arguments: str) -> Streams:
        status = _status(list(arguments))
        out, err = capfd.readouterr()
        return Streams(status, out, err)

    return calling


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def simulate(*_: object) -> None:
        raise error

    monkeypatch.setattr("clustersim.study.run.simulate", simulate)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- run -----------------------------------------------------------------------------------------


def test_a_run_prints_its_summary_and_leaves_it_in_results(scenario: str, call: Any, tmp_path: Path) -> None:
    done = call("run", scenario)
    folder = tmp_path / result_folder(read_scenario(scenario))
    assert done.status == 0 and done.err == ""
    assert done.out.startswith("tiny  seed 0") and f"Result: {folder.relative_to(tmp_path)}" in done.out
    assert left_in(folder) == ["scenario.toml", "summary.json", "trace"]
    assert left_in(folder.parent) == [folder.name]
    assert read(folder / "trace").facts["name"] == "tiny"


def test_the_scenario_in_a_result_is_complete_and_means_the_same(scenario: str, call: Any) -> None:
    call("run", scenario, "--out", "result")
    assert read_scenario("result/scenario.toml") == read_scenario(scenario)


def test_json_alone_is_on_standard_output_and_is_the_summary(scenario: str, call: Any) -> None:
    done = call("run", scenario, "--json", "--out", "result")
    assert done.status == 0 and done.err == ""
    assert json.loads(done.out) == json.loads(Path("result/summary.json").read_text("utf-8"))


def test_a_quiet_run_prints_nothing(scenario: str, call: Any) -> None:
    done = call("run", scenario, "--quiet", "--out", "result")
    assert (done.status, done.out, done.err) == (0, "", "")
    assert Path("result/summary.json").is_file()


def test_seed_and_set_override_the_file(scenario: str, call: Any) -> None:
    arguments = ("--seed", "5", "--set", "workload.decode_steps=2", "--set", "network.chunk=1 MB")
    assert call("run", scenario, *arguments, "--quiet", "--out", "result").status == 0
    written = read_scenario("result/scenario.toml")
    assert (written.seed, written.workload.decode_steps, written.network.chunk) == (5, 2, 1e6)
    assert json.loads(Path("result/summary.json").read_text("utf-8"))["seed"] == 5


def test_the_same_run_leaves_the_same_trace_and_summary_but_for_the_wall_time(
    scenario: str, call: Any
) -> None:
    summaries = []
    for folder in (Path("one"), Path("two")):
        call("run", scenario, "--quiet", "--out", str(folder))
        summaries.append(json.loads((folder / "summary.json").read_text("utf-8")))
        assert summaries[-1].pop("wall_seconds") > 0
    assert summaries[0] == summaries[1]
    for path in Path("one/trace").iterdir():
        assert path.read_bytes() == (Path("two/trace") / path.name).read_bytes(), path.name


def test_another_seed_draws_other_gatings_for_as_many_tokens(scenario: str) -> None:
    one, other = (clustersim.run(scenario, seed=seed) for seed in (1, 2))
    assert one.summary["experts"]["tokens"] == other.summary["experts"]["tokens"]
    assert (one.trace["experts"].columns["tokens"] != other.trace["experts"].columns["tokens"]).any()


def test_an_older_result_is_replaced(scenario: str, call: Any) -> None:
    call("run", scenario, "--quiet", "--out", "result")
    assert call("run", scenario, "--quiet", "--out", "result", "--seed", "9").status == 0
    assert json.loads(Path("result/summary.json").read_text("utf-8"))["seed"] == 9
    assert left_in(Path("result")) == ["scenario.toml", "summary.json", "trace"]


def test_claimed_stands_beside_found_and_the_peer_beside_both(scenario: str, call: Any) -> None:
    before = call("run", scenario).out
    assert "Claimed and found" in before and "claimed by a brochure" in before
    assert "Beside other results" not in before
    peer = call("run", scenario, "--set", "name=tiny_peer", "--set", "workload.prompt_tokens=32000")
    assert peer.status == 0
    after = call("run", scenario).out
    assert "Beside other results" in after and "tiny_peer (other work): tokens/s" in after
    there, here = (
        json.loads(next(Path("results").glob(f"{name}-*/summary.json")).read_text("utf-8"))
        for name in ("tiny_peer", "tiny")
    )
    ratio = here["throughput"]["total_tokens_per_second"] / there["throughput"]["total_tokens_per_second"]
    line = next(line for line in after.splitlines() if "tiny_peer (other work): tokens/s" in line)
    assert line.endswith(f"{ratio:.3g} x")


# --- mistakes, interruptions, faults of ours -----------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "nowhere.toml"), "nowhere.toml"),
        (("run", "tiny.toml", "--set", "deployment.expert_paralel=4"), 'did you mean "expert_parallel"'),
        (("run", "tiny.toml", "--set", "deployment.expert_parallel=3"), "expert_parallel"),
        (("run", "tiny.toml", "--set", "workload.sequences=1600000"), "kv"),
        (("run", "tiny.toml", "--set", "nonsense"), "KEY=VALUE"),
        (("run", "tiny.toml", "--set", "deployment.algorithms.all_to_all=pairwize"), "pairwise"),
        (("run", "tiny.toml", "--sed", "3"), "--seed"),
        (("run", "tiny.toml", "--seed", "-1"), "--seed"),
        (("run",), "FILE"),
        (("rum", "tiny.toml"), "run"),
        (("preview", "tiny.toml", "--set", "gating.skew=zip"), "zipf"),
    ],
)
def test_a_mistake_says_so_on_standard_error_and_leaves_nothing(
    scenario: str, call: Any, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = call(*arguments)
    assert done.status == 2
    assert said in done.err and done.out == ""
    assert "Traceback" not in done.err
    assert left_in(tmp_path) == [scenario]


def test_all_mistakes_are_told_at_once(scenario: str, call: Any) -> None:
    done = call("run", scenario, "--set", "workload.phase=decod", "--set", "gating.exponent=-1")
    assert "workload.phase" in done.err and "gating.exponent" in done.err


def test_a_folder_that_is_no_result_is_left_alone(scenario: str, call: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear", encoding="utf-8")
    done = call("run", scenario, "--out", "mine")
    assert done.status == 2 and "mine" in done.err and done.out == ""
    assert (tmp_path / "mine" / "thesis.txt").read_text("utf-8") == "dear"
    assert left_in(tmp_path / "mine") == ["thesis.txt"]


def test_an_interruption_leaves_nothing_half_written(
    scenario: str, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    done = call("run", scenario)
    assert (done.status, done.out, done.err.strip()) == (130, "", "interrupted")
    assert left_in(tmp_path) == [scenario]


def test_an_interruption_while_writing_leaves_nothing_half_written(
    scenario: str, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clustersim.trace.results.files.write", write)
    assert call("run", scenario, "--out", "deep/result").status == 130
    assert left_in(tmp_path / "deep") == []


def test_a_fault_of_ours_leaves_a_result_that_tells_of_it(
    scenario: str, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, ZeroDivisionError("no GPUs left"))
    done = call("run", scenario, "--out", "result")
    assert done.status == 1 and done.out == ""
    assert "ZeroDivisionError: no GPUs left" in done.err and "report it" in done.err
    summary = json.loads(Path("result/summary.json").read_text("utf-8"))
    assert summary["error"] == "ZeroDivisionError: no GPUs left"
    assert left_in(Path("result")) == ["scenario.toml", "summary.json"]


def test_as_a_process_it_exits_with_its_status(scenario: str) -> None:
    def exit_status(*arguments: str) -> int:
        command = [sys.executable, "-m", "clustersim.cli", *arguments]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert exit_status("run", scenario, "--quiet", "--out", "result") == 0
    assert exit_status("run", "nowhere.toml") == 2


# --- preview and schema --------------------------------------------------------------------------


def test_a_preview_shows_what_the_scenario_is_and_writes_nothing(
    scenario: str, call: Any, tmp_path: Path
) -> None:
    done = call("preview", scenario)
    assert done.status == 0 and done.err == ""
    for said in (
        "olmoe_1b_7b",
        "active per token",
        "Memory of a rank",
        "exchange buffers",
        "Groups",
        "8 gpu",
        "450 GB/s",
        "The first decode step: 16 tokens, 1 microbatch",
        "no such step is faster than: ",
        "dispatch 2",
    ):
        assert said in done.out, said
    assert max(map(len, done.out.splitlines())) <= 100
    assert left_in(tmp_path) == [scenario]


def test_a_preview_as_json_is_json_alone(scenario: str, call: Any) -> None:
    done = call("preview", scenario, "--json")
    found = json.loads(done.out)
    assert done.err == ""
    assert set(found) >= {"name", "model", "memory", "groups", "topology", "phases", "notes"}
    assert found["phases"]["decode"]["operators"]["combine"] == 2


def test_a_preview_says_what_does_not_fit(scenario: str, call: Any) -> None:
    done = call("preview", scenario, "--set", "workload.prompt_tokens=4000000")
    assert done.status == 0 and "does not fit" in done.out


def test_a_preview_takes_stages_that_are_alike_together(call: Any) -> None:
    done = call("preview", "workloads/moe_1024.toml")
    assert "stages 1-6" in done.out and "44 in stage 0, 43 in stages 1-6, 45 in stage 7" in done.out
    assert "its source states 30 billion" in done.out and "Notes" in done.out


def test_the_schema_is_one_of_scenarios(call: Any) -> None:
    schema = json.loads(call("schema").out)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["type"] == "object"
    assert set(schema["properties"]) >= {"name", "model", "topology", "deployment", "workload", "extends"}


@pytest.mark.parametrize("command", ["run", "preview", "network", "schema", "examples"])
def test_every_command_has_help_with_a_sentence(call: Any, command: str) -> None:
    done = call(command, "--help")
    assert (
        done.status == 0 and done.out.startswith("Usage: ") and "  --help" in done.out.replace("-h, ", "  ")
    )


# --- the Python face -----------------------------------------------------------------------------


def test_a_run_from_python_gives_summary_and_tables_and_writes_nothing(scenario: str, tmp_path: Path) -> None:
    result = clustersim.run(scenario, seed=1)
    assert result.summary["seed"] == 1 and result.scenario.seed == 1
    assert set(result.trace) == set(TABLES)
    assert len(result.trace["spans"]) > 0
    assert set(result.trace["spans"].describe()) == set(TABLES["spans"])
    assert left_in(tmp_path) == [scenario]


def test_what_was_loaded_can_be_run(scenario: str) -> None:
    loaded = clustersim.load(scenario)
    assert clustersim.run(loaded).summary["throughput"] == clustersim.run(scenario).summary["throughput"]
    with pytest.raises(ClustersimError, match="give them to load"):
        clustersim.run(loaded, seed=3)


def test_overrides_may_be_texts_or_a_mapping(scenario: str) -> None:
    texts = clustersim.run(scenario, ["workload.decode_steps=2"])
    mapping = clustersim.run(scenario, {"workload.decode_steps": 2})
    assert texts.scenario == mapping.scenario
    assert texts.scenario.workload.decode_steps == 2


def test_a_result_is_written_where_it_is_wished(scenario: str) -> None:
    clustersim.run(scenario, out="one")
    assert clustersim.run(scenario).save("two") == Path("two")
    assert left_in(Path("one")) == left_in(Path("two")) == ["scenario.toml", "summary.json", "trace"]


def test_arrow_tables_share_their_memory_with_the_trace(scenario: str) -> None:
    table = clustersim.run(scenario).trace["spans"]
    arrow = table.to_arrow()
    assert arrow.num_rows == len(table)
    for name, column in table.columns.items():
        chunk = arrow.column(name).chunk(0)
        codes = chunk.indices if isinstance(column, Text) else chunk
        numbers = column.codes if isinstance(column, Text) else column
        assert codes.buffers()[1].address == numbers.ctypes.data, name


def test_an_unknown_table_is_answered_with_the_known_ones(scenario: str) -> None:
    with pytest.raises(clustersim.ClustersimError, match=r'did you mean "spans"'):
        clustersim.run(scenario).trace["span"]


def test_mistakes_reach_python_as_one_exception(scenario: str) -> None:
    with pytest.raises(clustersim.ScenarioError) as caught:
        clustersim.load(scenario, ["workload.phase=decod", "gating.exponent=-1"])
    assert len(caught.value.mistakes) == 2


def test_the_face_shows_all_it_promises_and_nothing_else() -> None:
    for name in clustersim.__all__:
        assert name in dir(clustersim) and getattr(clustersim, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'runs'"):
        clustersim.runs  # noqa: B018


def test_help_waits_for_no_large_library() -> None:
    heavy = "{'numpy', 'pyarrow', 'networkx', 'pydantic', 'simpy', 'rich'} & set(sys.modules)"
    code = f"import sys, clustersim.cli; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_says_that_it_is_typed() -> None:
    assert resources.files("clustersim").joinpath("py.typed").is_file()


@pytest.mark.parametrize("example", ["large_ep", "baseline_tp8_pp2", "moe_1024"])
def test_examples_are_found_from_everywhere(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert clustersim.load(f"workloads/{example}.toml").name == example
    (tmp_path / "workloads").mkdir()
    (tmp_path / "workloads" / f"{example}.toml").write_text("", encoding="utf-8")
    assert find(f"workloads/{example}.toml").read_text("utf-8") == ""
    assert find("workloads/../pyproject.toml") == Path("workloads/../pyproject.toml")


# --- what fresh readers stumbled over --------------------------------------------------------------


def test_a_reader_that_has_gone_is_no_fault(scenario: str) -> None:
    for command in (f"run {scenario}", f"preview {scenario}", "schema"):
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} -m clustersim.cli {command} | true; exit ${{PIPESTATUS[0]}}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), command


def test_a_full_standard_output_is_told_and_is_no_fault_of_ours(scenario: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "clustersim.cli", "run", scenario],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2 and done.stderr.startswith("standard output: ")


def test_a_place_that_cannot_be_written_is_told_before_the_run(
    scenario: str, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, AssertionError("simulated all the same"))
    Path("taken").write_text("a file", encoding="utf-8")
    done = call("run", scenario, "--out", "taken/result")
    assert done.status == 2 and "taken/result" in done.err and "Traceback" not in done.err


def test_a_topology_is_not_run(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.toml").write_text('family = "single_server"\nserver = "dgx_h100"\n', encoding="utf-8")
    done = call("run", "one.toml")
    assert done.status == 2
    assert done.err.splitlines() == [
        'one.toml: is a topology, not a scenario; a scenario names it: topology = "../topologies/mine.toml"'
    ]


def test_a_byte_order_mark_is_no_mistake(scenario: str, call: Any) -> None:
    Path("bom.toml").write_bytes(b"\xef\xbb\xbf" + Path(scenario).read_bytes())
    assert call("run", "bom.toml", "--quiet").status == 0


def test_an_algorithm_is_checked_even_where_it_is_not_needed(scenario: str, call: Any) -> None:
    done = call("preview", scenario, "--set", "deployment.algorithms.all_reduce=rings")
    assert done.status == 2 and 'did you mean "ring"' in done.err


def test_python_overrides_may_be_any_value_or_one_text(scenario: str) -> None:
    fault = {"kind": "slow_gpu", "gpu": 1, "factor": 2.0}
    found = clustersim.run(
        scenario, {"gating.shuffle": False, "faults": [fault], "deployment.experts": {"service": "by_expert"}}
    ).scenario
    assert not found.gating.shuffle and found.faults[0].gpu == 1
    assert found.deployment.experts.service == "by_expert"
    assert clustersim.run(scenario, "workload.decode_steps=1").scenario.workload.decode_steps == 1


def test_results_and_tables_say_in_a_line_what_they_are(scenario: str) -> None:
    result = clustersim.run(scenario)
    assert repr(result).startswith("<Result of tiny: ")
    assert "steps: 3" in repr(result.trace)
    assert repr(result.trace["steps"]).startswith("<Table steps: 3 rows of step, ")


def test_arrivals_stay_where_the_clock_is_fine(scenario: str, call: Any) -> None:
    done = call(
        "run", scenario, "--set", "workload.batches=3", "--set", "workload.arrivals=uniform",
        "--set", 'workload.interval="1e12 s"',
    )  # fmt: skip
    assert done.status == 2 and "workload.interval" in done.err


def test_a_fault_after_the_end_was_not_at_work(scenario: str) -> None:
    def notes(start: str) -> str:
        fault = {"kind": "slow_gpu", "gpu": 1, "factor": 2.0, "start": start}
        return " ".join(clustersim.run(scenario, {"faults": [fault]}).summary["notes"])

    assert "Faults were at work" in notes("0 s")
    assert "Faults were at work" not in notes("2 s")
