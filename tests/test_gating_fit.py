"""Generators fitted to measured counts, the files those come in, and runs set beside another gating."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest import approx
from scenarios import parallel, rail_tree, tiny

from clustersim.cli import cli, main
from clustersim.errors import ClustersimError, ScenarioError
from clustersim.plan.gating import expert_counts
from clustersim.plan.popularity import gini
from clustersim.spec.documents import DocumentError
from clustersim.spec.reading import read_scenario, to_toml
from clustersim.spec.routing import Routing, packed, read_routing, unpacked
from clustersim.spec.workload import Gating
from clustersim.study.gating_fit import fit, look, read, summary
from clustersim.study.run import run, run_scenario, with_beside

assert cli is not None


def loads(kind: str, experts: int, tokens: int, top_k: int, seed: int) -> np.ndarray:
    """Counts of three layers such as models show them, none of them the fit's own family."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(3):
        weight = {
            "gamma": rng.gamma(2.0, size=experts),
            "flat with a hot one": np.r_[6.0, rng.uniform(0.7, 1.3, experts - 1)],
            "some unused": np.r_[rng.gamma(1.0, size=experts - experts // 8), np.zeros(experts // 8)],
            "power law": np.arange(1, experts + 1.0) ** -0.7,
            "nearly even": rng.uniform(0.9, 1.1, experts),
        }[kind]
        share = np.minimum(weight / weight.sum(), 1 / top_k)
        rows.append(rng.multinomial(tokens * top_k, share / share.sum()))
    return np.minimum(np.stack(rows), tokens)


@pytest.mark.parametrize(
    "experts, top_k, tokens", [(64, 8, 20_000), (8, 2, 5000), (256, 8, 1000), (128, 4, 400)]
)
@pytest.mark.parametrize("kind", ["gamma", "flat with a hot one", "some unused", "power law", "nearly even"])
def test_a_fitted_generator_gives_loads_like_those_measured(
    kind: str, experts: int, top_k: int, tokens: int
) -> None:
    measured = Routing(kind, top_k, (0, 3, 7), loads(kind, experts, tokens, top_k, 1))
    found = summary([fit(measured)], Path("x"))["measurements"][0]
    # Loads that happen to be more even than as few tokens at random are cannot be drawn.
    assert found["worst_gini_error"] <= (0.03 if kind == "nearly even" else 0.02)
    assert found["worst_max_over_mean_error"] <= 0.10
    assert found["worst_misplaced"] <= 0.10
    # And other seeds, drawn as a run draws them, are like it, too.
    wish = Gating(skew="fitted", layers=fit(measured).curves)
    model = tiny(model={"experts": 4, "layers": 8}).model
    model = model.model_copy(update={"experts": experts, "top_k": top_k})
    drawn = expert_counts(np.array([tokens]), model, wish, 99, 0)[[0, 3, 7], 0]
    assert gini(drawn) == approx(gini(measured.counts), abs=0.03)


# ---- files --------------------------------------------------------------------------------------

COUNTS = np.array([[5, 1, 2], [1, 1, 6]])


def csv_text(header: str, extra: str = "") -> str:
    rows = [f"{extra}{layer},{e},{COUNTS[at, e]}" for at, layer in enumerate((3, 7)) for e in range(3)]
    return "\n".join([header, *rows]) + "\n"


FILES: dict[str, bytes] = {
    "sglang.csv": csv_text("layer_id,expert_id,count").encode(),
    "named.csv": csv_text("model,topk,layer,expert,count", "m,2,").encode(),
    "megatron.jsonl": "\n".join(
        json.dumps({"iteration": i, "layer": layer, "tokens_per_expert": (COUNTS[at] - i * 0).tolist()})
        for i in range(1)
        for at, layer in enumerate((3, 7))
    ).encode(),
    "whole.json": json.dumps(
        {"tokens_per_expert": {"3": COUNTS[0].tolist(), "7": COUNTS[1].tolist()}}
    ).encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_the_counts_of_every_tool_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    (found,) = read_routing(tmp_path / name)
    assert found.layers == (3, 7) and np.array_equal(found.counts, COUNTS)
    assert np.array_equal(unpacked(packed(found)).counts, COUNTS)
    assert unpacked(packed(found)).layers == (3, 7)


@pytest.mark.parametrize("ending", ["npz", "npy"])
def test_expert_ids_of_single_tokens_are_read(ending: str, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(8, dtype=np.uint8), (50, 3, 1)), axis=2)[
        :, :, :2
    ]
    path = tmp_path / f"ids.{ending}"
    if ending == "npz":
        np.savez(path, seq_lens=np.array([20, 30]), expert_ids=ids)
    else:
        np.save(path, ids)
    (found,) = read_routing(path)
    assert found.top_k == 2 and np.array_equal(found.ids, ids)
    assert found.counts.sum() == ids.size
    assert np.array_equal(unpacked(packed(found)).ids, ids)


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    return file.getvalue()


def huge() -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<i8", "fortran_order": False, "shape": (10**9, 61, 8)}
    )
    return file.getvalue()


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", content)
    return file.getvalue()


@pytest.mark.parametrize(
    "content, line, problem",
    [
        (b"", 1, "wanted are layer,expert,count"),
        (b"a,b\n1,2\n", 1, "has columns a, b"),
        (b"layer,expert,count\n", None, "no rows"),
        (b"layer,expert,count\n0,0,5\n0,x,5\n", 3, 'expert "x" is not a whole number'),
        (b"layer,expert,count\n0,0,-5\n", 2, "count -5"),
        (b"layer,expert,count\n0,99999999,5\n", 2, "expert 99999999 is not within"),
        (b"layer,expert,count\n0,0,0\n0,1,0\n", None, "layer 0 has no tokens"),
        (b'{"loss": 3}\n', 1, 'no "tokens_per_expert"'),
        (b'{"tokens_per_expert": [1, "2"]}\n', 1, "not a list of counts"),
        (b'{"tokens_per_expert": [1, 2]}\n{"tokens_per\n', 2, "is not JSON"),
        (b"\xff\xfe\x00", None, "neither text nor npz"),
        (b"PK\x03\x04broken", None, "no readable npz"),
        (pickled(), None, "Python objects"),
        (huge(), None, "more than 512 MiB"),
        (zipped(huge()), None, "more than 512 MiB"),
        (zipped(b"nothing"), None, "no readable array"),
    ],
)
def test_what_is_no_measurement_is_refused_with_its_line(
    content: bytes, line: int | None, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "counts.csv"
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=problem) as caught:
        read_routing(path)
    assert caught.value.line == line
    with pytest.raises(ClustersimError, match=r"counts\.csv"):
        read(path)


def test_a_token_takes_no_expert_twice(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([[[0, 1]], [[2, 2]]]))
    with pytest.raises(DocumentError, match="token 1 names an expert twice"):
        read_routing(tmp_path / "ids.npy")


# ---- commands and scenarios ---------------------------------------------------------------------


def invoke(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0)


def test_what_a_fit_writes_is_a_gating_that_a_scenario_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts, out, scenario = tmp_path / "counts.csv", tmp_path / "part.toml", tmp_path / "one.toml"
    table = loads("gamma", 16, 4000, 2, 3)
    rows = [f"{layer},{e},{table[layer, e]}" for layer in range(3) for e in range(16)]
    counts.write_text("\n".join(["layer_id,expert_id,count", *rows]))
    assert invoke("gating", "fit", counts, "--top-k", "2", "--out", out) == 0
    assert "Gini" in capsys.readouterr().out
    whole = to_toml(tiny(model={"experts": 16, "layers": 3}))
    sections = [part for part in whole.split("\n\n") if not part.startswith("[gating]")]
    scenario.write_text("\n\n".join(sections) + "\n" + out.read_text())
    shown = look(read_scenario(scenario))
    assert [row["gini"] for row in shown["layers"]] == approx(gini(table).tolist(), abs=0.02)
    assert invoke("gating", "show", scenario) == 0
    assert "by rank" in capsys.readouterr().out


def test_of_several_measurements_one_must_be_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts, out = tmp_path / "counts.csv", tmp_path / "part.toml"
    counts.write_text(
        "dataset,layer,expert,count\n"
        + "".join(f"{d},0,{e},{9000 - 500 * e}\n" for d in "ab" for e in range(4))
    )
    assert invoke("gating", "fit", counts, "--out", out) == 2
    assert '--only: "a", "b"' in capsys.readouterr().err and not out.exists()
    assert invoke("gating", "fit", counts, "--only", "b", "--out", out) == 0
    assert invoke("gating", "fit", tmp_path / "none.csv") == 2
    assert "no such file" in capsys.readouterr().err


def replaying(folder: Path, counts: str, **gating: Any) -> Path:
    sections = [part for part in to_toml(tiny(model={"experts": 4})).split("\n\n") if "[gating]" not in part]
    path = folder / "one.toml"
    path.write_text("\n\n".join(sections) + f'\n\n[gating]\nskew = "replayed"\ncounts = "{counts}"\n')
    return path


def test_a_replayed_file_travels_with_the_scenario(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("layer,expert,count\n" + "".join(f"0,{e},{10 + e}\n" for e in range(4)))
    scenario = read_scenario(replaying(tmp_path, "c.csv"))
    (tmp_path / "c.csv").unlink()
    again = tmp_path / "again.toml"
    again.write_text(to_toml(scenario))
    assert read_scenario(again) == scenario
    assert look(scenario)["layers"][0]["max_over_mean"] == approx(13 * 4 / 46)


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("c.csv", "layer,expert,count\n0,0,1\n0,7,1\n", "has 8 experts; tiny has 4"),
        ("c.csv", "layer,expert,count\n0,0,x\n", 'line 2 count "x"'),
        ("c.txt", "", "is no file of counts"),
        ("/etc/c.csv", "", "must be relative"),
        ("../../c.csv", "", "outside the folder"),
        ("d.csv", "", "there is no such file"),
    ],
)
def test_a_file_that_cannot_be_replayed_is_a_mistake_of_the_scenario(
    name: str, content: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "c.csv").write_text(content)
    with pytest.raises(ScenarioError, match=problem):
        read_scenario(replaying(tmp_path, name))


def uneven(**more: Any) -> Any:
    return tiny(
        rail_tree(2, 2),
        deployment=parallel(dp=4),
        model={"experts": 8, "top_k": 2},
        workload={"sequences": 32, "decode_steps": 2, "phase": "decode"},
        **more,
    )


def test_a_run_is_set_beside_the_same_run_under_the_other_gating() -> None:
    hot = {"skew": "hot_rank", "hot_share": 0.8}
    both = uneven(beside={"label": "a hot rank", "gating": hot})
    found, there = with_beside(run_scenario(both)), run_scenario(uneven(gating=hot)).summary
    beside = found.summary["beside"]
    assert beside["label"] == "a hot rank"
    assert beside["found"]["imbalance"] == there["experts"]["imbalance"]["mean"]
    assert beside["found"]["tpot"] == there["latency"]["tpot"]["mean"]
    rate = there["throughput"]["total_tokens_per_second"]
    assert beside["ratio"]["total_tokens_per_second"] == approx(
        found.summary["throughput"]["total_tokens_per_second"] / rate
    )
    assert run(both, alone=True).summary["beside"] is None
    assert with_beside(run_scenario(uneven())).summary["beside"] is None


def test_beside_it_the_same_gpu_is_slow_though_another_would_be_the_hottest() -> None:
    here, there = ({"skew": "hot_rank", "hot_rank": rank, "hot_share": 0.8} for rank in (1, 3))
    slow = {"kind": "slow_gpu", "factor": 4.0}
    both = uneven(gating=here, faults=[{**slow, "gpu": "hottest"}], beside={"label": "x", "gating": there})
    beside = with_beside(run_scenario(both)).summary["beside"]["found"]
    same, other = (
        run_scenario(uneven(gating=there, faults=[{**slow, "gpu": gpu}])).summary["latency"]["step"]["mean"]
        for gpu in (1, "hottest")
    )
    assert beside["step"] == same != other
    assert run_scenario(both).scenario.faults[0].gpu == "hottest"


def test_dropped_choices_stand_beside_the_throughput_of_both_runs() -> None:
    zipf = {"skew": "zipf"}
    capped = {**zipf, "capacity_factor": 1.0}
    found = with_beside(run_scenario(uneven(gating=capped, beside={"label": "all", "gating": zipf}))).summary
    share, experts = found["throughput"]["dropped_share"], found["experts"]
    # 32 sequences choose 2 experts in each of 2 layers, in 2 steps.
    assert 0 < share == experts["dropped"] / (32 * 2 * 2 * 2)
    assert (
        found["beside"]["found"]["dropped_share"] == 0.0 and found["beside"]["ratio"]["dropped_share"] is None
    )
    assert any(f"{share:.1%} of all; they were dropped" in note for note in found["notes"])
    # However small the factor, every expert that is chosen takes one token.
    least = run_scenario(uneven(gating={**zipf, "capacity_factor": 1e-6})).trace.raw.tables["experts"]
    assert np.asarray(least["tokens"]).max() == 1


def test_mistakes_of_the_other_gating_are_told(tmp_path: Path) -> None:
    other = {"skew": "hot_rank", "hot_rank": 9, "hot_share": 0.8}
    (tmp_path / "s.toml").write_text(to_toml(uneven(beside={"label": "x", "gating": other})))
    with pytest.raises(ScenarioError, match=r"beside\.gating\.hot_rank: there is no EP rank 9"):
        read_scenario(tmp_path / "s.toml")
