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
from clustersim.spec.routing import Routing, choose, packed, read_routing, unpacked
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


def array(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values))
    return file.getvalue()


def wide() -> bytes:
    """Few rows that would make a table of several GB."""
    return ("layer,expert,count\n" + "".join(f"{n},65535,1\n" for n in range(10_000))).encode()


def grouped() -> bytes:
    return ("model,layer,expert,count\n" + "".join(f"m{n},0,0,1\n" for n in range(2000))).encode()


@pytest.mark.parametrize(
    "content, line, problem",
    [
        (b"", None, "is empty; wanted are layer,expert,count"),
        (b" \n\n", None, "is empty"),
        (b"layer,expert,count\n0,0,nan\n", 2, 'count "nan" is not a whole number'),
        (
            b"layer,expert,count\n99999999999999999999,0,1\n",
            2,
            "layer 99999999999999999999 is not within 0 to 10000",
        ),
        (b"layer,expert,count\n0,0,70368744177664\n0,0,1\n", 3, "expert 0 of layer 0 has more than"),
        (b"layer,expert,count\n0,0\n", 2, 'count "" is not'),
        (b"layer,expert,count\n0,0,5,6\n", 2, "more cells than the 3 of the header"),
        (b"layer,expert,count\n0,0," + b"1" * 200_000 + b"\n", 2, "field larger than"),
        (b"topk,layer,expert,count\nabc,0,0,5\n", 2, 'topk "abc"'),
        (b"topk,layer,expert,count\n0,0,0,5\n", 2, "topk 0 is not within 1 to"),
        (b"num_experts,layer,expert,count\n4,0,7,5\n", 2, "expert 7 is not one of num_experts = 4"),
        (b"layer;expert;count\n0;0;1\n", 1, "has columns layer;expert;count"),
        ("layer,expert,count\n0,0,1\n".encode("utf-16"), None, "neither text nor npz"),
        (b"\x1b[31mlayer,x\n0,0\n", 1, r"has columns \?\[31mlayer, x"),
        (wide(), None, "10000 layers of 65536 experts; at most 4194304 in all"),
        (grouped(), 1002, "one measurement more than the 1000"),
        (array([[0.5, 1.0]]), None, r"holds 0.5 at \[0, 0\]; counts of tokens are whole"),
        (array([[1.0, np.nan]]), None, r"holds nan at \[0, 1\]"),
        (array([[np.inf, 1.0]]), None, r"holds inf at \[0, 0\]"),
        (array([[2**62, 1]]), None, "holds 4611686018427387904"),
        (
            array([[[1, 2]], [[-1, 2]]]),
            None,
            r"holds -1 at \[1, 0, 0\]; experts are whole numbers within 0 to 65535",
        ),
        (array([[[2**40, 1]]]), None, "experts are whole"),
        (array(np.ones((2, 2), bool)), None, "holds bool"),
        (array(np.zeros((0, 2, 2), int)), None, r"holds int64 \[0, 2, 2\]"),
        (array(["x"]), None, "wanted are expert ids"),
        (array(np.ones((50, 50)))[:-100], None, "no readable array"),
        (zipped(array(np.zeros(3))), None, r"no array \[tokens, layers, top_k\]"),
        (b'{"tokens_per_expert": [1, NaN]}\n', 1, "NaN of expert 1 is not a whole number"),
        (b'{"tokens_per_expert": [Infinity, 1]}\n', 1, "Infinity of expert 0"),
        (b'{"tokens_per_expert": [1e400, 1]}\n', 1, "Infinity of expert 0"),
        (b'{"tokens_per_expert": [-1, 1]}\n', 1, "-1 of expert 0"),
        (b'{"tokens_per_expert": [true, 1]}\n', 1, "true of expert 0"),
        (b'{"tokens_per_expert": [' + b"9" * 400 + b"]}\n", 1, "of expert 0 is not a whole number within"),
        (b'{"tokens_per_expert": [[[1]]]}\n', 1, r"\[1\] of expert 0"),
        (b'{"tokens_per_expert": []}\n', 1, "not a list of 1 to 65536 counts"),
        (b'{"layer": "x", "tokens_per_expert": [1]}\n', 1, 'layer "x" is not within 0 to 10000'),
        (
            b'{"layer": 0, "tokens_per_expert": [1]}\n' + b'{"tokens_per_expert": [1, 2]}\n',
            2,
            "has 2 experts, and 1",
        ),
        (b'{"tokens_per_expert": [1,2', 1, "is neither JSON lines nor JSON: "),
        (b"[" * 100_000, None, "is neither JSON lines nor JSON"),
        (b'[{"tokens_per_expert": [1, 2]},\n{"x": 1}]', None, 'record 2: has no "tokens_per_expert"'),
        (b"[]", 1, 'no "tokens_per_expert"'),
        (b"a,b\n1,2\n", 1, "has columns a, b"),
        (b"layer,expert,count\n", None, "no rows below its header"),
        (b"layer,expert,count\n0,0,5\n0,x,5\n", 3, 'expert "x" is not a whole number'),
        (b"layer,expert,count\n0,0,-5\n", 2, "count -5"),
        (b"layer,expert,count\n0,99999999,5\n", 2, "expert 99999999 is not within"),
        (b"layer,expert,count\n0,0,0\n0,1,0\n", None, "layer 0 has no tokens"),
        (b'{"loss": 3}\n', 1, 'no "tokens_per_expert"'),
        (b'{"tokens_per_expert": [1, "2"]}\n', 1, '"2" of expert 1 is not a whole number'),
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
    assert '--measurement: "a", "b"' in capsys.readouterr().err and not out.exists()
    assert invoke("gating", "fit", counts, "--only", "b", "--out", out) == 0
    assert invoke("gating", "fit", counts, "--measurement", "A", "--out", out) == 0
    capsys.readouterr()
    assert invoke("gating", "fit", counts, "--measurement", "c") == 2
    assert 'holds no measurement "c"; there are "a", "b"' in capsys.readouterr().err
    assert invoke("gating", "fit", counts, "--only", "c") == 2
    assert 'there are "a", "b"' in capsys.readouterr().err
    assert invoke("gating", "fit", tmp_path / "none.csv") == 2
    assert "none.csv: there is no such file" in capsys.readouterr().err


def measured(*names: str) -> list[Routing]:
    return [Routing(name, 1, (0,), np.array([[1, 2]])) for name in names]


def test_a_measurement_is_found_by_words_that_no_other_has_in_its_name() -> None:
    found = measured("OLMoE c4 top-8", "OLMoE c4 top-1", "OLMoE book top-8", "c4")
    assert choose(found, "olmoe BOOK").name == "OLMoE book top-8"
    assert choose(found, "top-1 c4").name == "OLMoE c4 top-1"
    assert choose(found, "C4").name == "c4", "the whole name goes before words of others"
    assert choose(found[:1], "").name == "OLMoE c4 top-8"
    with pytest.raises(
        DocumentError, match=r'holds 2 measurements "olmoe c4": "OLMoE c4 top-8", "OLMoE c4 top-1"$'
    ):
        choose(found, "olmoe c4")
    with pytest.raises(DocumentError, match='did you mean "OLMoE book top-8"'):
        choose(found, "OLMoE bok top-8")
    with pytest.raises(DocumentError, match=r"holds 4 measurements; gating\.measurement names one of"):
        choose(found, "")


def test_what_a_file_says_of_its_tokens_is_not_overruled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts, bare = tmp_path / "counts.csv", tmp_path / "bare.csv"
    rows = [f"0,{e},{9000 - 500 * e}" for e in range(4)]
    counts.write_text("\n".join(["topk,layer,expert,count", *(f"2,{row}" for row in rows)]))
    bare.write_text("\n".join(["layer,expert,count", *rows]))
    assert (
        invoke("gating", "fit", counts, "--top-k", "2") == invoke("gating", "fit", bare, "--top-k", "2") == 0
    )
    capsys.readouterr()
    assert invoke("gating", "fit", counts, "--top-k", "3") == 2
    assert 'says top-2 of "top-2" itself; leave it out' in capsys.readouterr().err
    assert invoke("gating", "fit", bare, "--top-k", "99") == 2
    assert "has experts 0 to 3; at most 4 can be" in capsys.readouterr().err


def test_rows_that_name_an_expert_again_are_added_up_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = tmp_path / "counts.csv"
    counts.write_text("layer,expert,count\n0,0,4000\n0,1,5000\n0,0,2000\n")
    assert read_routing(counts)[0].counts.tolist() == [[6000, 5000]]
    assert invoke("gating", "fit", counts) == 0
    assert "1 row of the file names an expert of a layer once more" in capsys.readouterr().out
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"tokens_per_expert": [1, 2]}\n' * 3)
    assert read_routing(lines)[0].again == 2 == unpacked(packed(read_routing(lines)[0])).again


def test_the_mark_of_a_poor_fit_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = tmp_path / "b9.csv"
    counts.write_text("layer,expert,count\n0,0,1\n0,1,0\n0,2,0\n1,0,5000\n")
    assert invoke("gating", "fit", counts, "--top-k", "3") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "! Gini off by more than 0.02, max/mean by more than 10" in said
    assert "or more than 10.0% of the tokens at another rank" in said
    counts.write_text("layer,expert,count\n0,0,5\n")
    assert invoke("gating", "fit", counts) == 0
    assert "b9  1 expert\n" in capsys.readouterr().out


def test_that_so_few_tokens_are_noise_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = tmp_path / "few.csv"
    for each, noise in ((5, True), (5_000_000, False)):
        counts.write_text("layer,expert,count\n" + "".join(f"0,{e},{each}\n" for e in range(4)))
        # As even as that no draw of a few tokens is; of many it is, to the bound.
        assert invoke("gating", "fit", counts) == int(noise)
        assert ("mostly noise" in capsys.readouterr().out) == noise


def test_chance_alone_makes_about_the_gini_that_is_told() -> None:
    drawn = np.random.default_rng(0).multinomial(64 * 20, np.full(64, 1 / 64), size=50)
    found = summary([fit(Routing("x", 1, (0,), drawn[:1]))], Path("x"))["measurements"][0]["layers"][0]
    assert found["chance_gini"] == approx(float(gini(drawn).mean()), rel=0.05)


def test_one_expert_that_has_it_all_can_be_fitted() -> None:
    found = summary([fit(Routing("x", 0, (0,), np.array([[1000, 0, 0, 0]])))], Path("x"))["measurements"][0]
    assert found["kept"] and found["layers"][0]["fitted"]["max_over_mean"] == 4.0


def test_a_curve_that_misplaces_tokens_is_marked_though_gini_and_peak_fit() -> None:
    two = np.r_[100_000, 100_000, np.full(62, 100)][None]
    found = summary([fit(Routing("x", 2, (0,), two))], Path("x"))["measurements"][0]
    assert found["worst_gini_error"] <= 0.02 and found["worst_max_over_mean_error"] <= 0.10
    assert found["worst_misplaced"] > 0.10 and not found["kept"]


def test_a_fit_is_of_a_model_with_as_many_experts(tmp_path: Path) -> None:
    curve = [{"layer": 0, "gini": 0.2, "peak": 1.5}]
    for gating, problem in (
        ({"fitted_experts": 8, "layers": curve}, "fitted to 8 experts; tiny has 4"),
        # Two different experts take a token: of four none gets more than twice the mean.
        ({"layers": [{"layer": 0, "gini": 0.2, "peak": 3.0}]}, r"layers\.0\.peak: 3 cannot be: .* 2 times"),
    ):
        (tmp_path / "s.toml").write_text(
            to_toml(tiny(model={"experts": 4, "top_k": 2}, gating={"skew": "fitted", **gating}))
        )
        with pytest.raises(ScenarioError, match=problem):
            read_scenario(tmp_path / "s.toml")


def test_which_layers_stand_for_others_is_told() -> None:
    curves = [{"layer": n, "gini": 0.2, "peak": 1.5} for n in (1, 4, 30)]
    fitted = tiny(model={"experts": 4, "top_k": 2, "layers": 8}, gating={"skew": "fitted", "layers": curves})
    # Layer 2 is nearer to 1, layers 3 and 5 to 7 to 4; 30 is nobody's.
    notes = look(fitted)["notes"]
    spans = "layers 0 to 2 as layer 1, layers 3 to 7 as layer 4."
    assert notes[0].endswith(spans) and notes[1].startswith("1 fitted layer (30) stands for no layer")
    assert notes[0] in " ".join(run_scenario(fitted).summary["notes"])
    assert look(tiny(model={"experts": 4}))["notes"] == []


def test_even_load_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.toml"
    path.write_text(to_toml(tiny(model={"experts": 4})))
    assert invoke("gating", "show", path) == 0
    shown = capsys.readouterr().out
    assert "expected to get the same: 1/4 of a layer's choices, 0.25" in shown and "by rank" not in shown


def test_one_of_several_measurements_is_replayed(tmp_path: Path) -> None:
    rows = "".join(
        f"{d},0,{e},{n}\n" for d, first in (("c4", 9), ("book", 1)) for e, n in enumerate((first, 1, 1, 1))
    )
    (tmp_path / "c.csv").write_text(f"dataset,layer,expert,count\n{rows}")
    path = replaying(tmp_path, "c.csv")
    with pytest.raises(
        ScenarioError, match=r'gating\.counts: "c\.csv" holds 2 measurements; gating\.measurement'
    ):
        read_scenario(path)
    with pytest.raises(ScenarioError, match=r'gating\.measurement: "c\.csv" holds no measurement "boko"'):
        read_scenario(path, ["gating.measurement=boko"])
    book, c4 = (read_scenario(path, [f"gating.measurement={name}"]) for name in ("book", "c4"))
    assert look(book)["layers"][0]["max_over_mean"] == approx(1.0)
    assert look(c4)["layers"][0]["max_over_mean"] > 1.5
    # What was written out carries the one; another is read anew.
    again = tmp_path / "again.toml"
    again.write_text(to_toml(book))
    assert read_scenario(again) == book
    assert read_scenario(again, ["gating.measurement=c4"]).gating.content == c4.gating.content
    assert read_scenario(again, ["gating.skew=even"]).gating == Gating()


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
        ("c.csv", "layer,expert,count\n0,0,x\n", '"c.csv", line 2: count "x" is not'),
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


def test_a_label_follows_its_gating(tmp_path: Path) -> None:
    base, path = tmp_path / "base.toml", tmp_path / "s.toml"
    base.write_text(to_toml(uneven(beside={"label": "mild", "gating": {"skew": "gini", "gini": 0.2}})))
    path.write_text('extends = "base.toml"\n')

    def label(*overrides: str) -> str:
        beside = read_scenario(path, overrides).beside
        assert beside is not None
        return beside.label

    assert label() == label("gating.skew=even") == "mild"
    assert label("beside.gating.gini=0.7").startswith("skew gini, gini 0.7")
    assert label("beside.gating.gini=0.7", "beside.label=strong") == "strong"
    assert label("beside.label=strong") == "strong"
    path.write_text('extends = "base.toml"\nbeside.gating.gini = 0.6\n')
    assert label().startswith("skew gini, gini 0.6")
    path.write_text('extends = "base.toml"\nbeside = { label = "more", gating.gini = 0.6 }\n')
    assert label() == "more"


def test_mistakes_of_the_other_gating_are_told(tmp_path: Path) -> None:
    other = {"skew": "hot_rank", "hot_rank": 9, "hot_share": 0.8}
    (tmp_path / "s.toml").write_text(to_toml(uneven(beside={"label": "x", "gating": other})))
    with pytest.raises(ScenarioError, match=r"beside\.gating\.hot_rank: there is no EP rank 9"):
        read_scenario(tmp_path / "s.toml")
