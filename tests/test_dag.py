"""The drawn deployment: it shows what runs, all of it and nothing else; and its checks see what is wrong."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dag_page
import numpy as np
import pygraphviz
import pytest
from click.testing import CliRunner
from scenarios import fat_tree, parallel, rail_tree, single_server, tiny

from clustersim.cli import cli
from clustersim.errors import ClustersimError
from clustersim.plan.dag import COMMUNICATION, REST, ROUTING, Edge, Node, Part, Wish
from clustersim.plan.dag_checks import CHECKS, Inspection, Verdict
from clustersim.plan.dag_dot import dot_lines, quoted, said_gpus, to_svg
from clustersim.plan.dag_forms import FORMS, drawn
from clustersim.plan.dag_levels import coarser
from clustersim.plan.layout import Layout, lay_out
from clustersim.plan.lowering import gated, lower
from clustersim.plan.stepgraph import StepGraph
from clustersim.spec.batch import Piece, batch_of
from clustersim.spec.model import Model
from clustersim.spec.reading import read_catalogue
from clustersim.spec.scenario import Scenario
from clustersim.study import dag as study

WISHES = {
    "operators": Wish("layer"),
    "sampled": Wish("expert"),
    "full": Wish("expert", True),
}
PHASES = {"prefill": [Piece(0, 30, 0, 1), Piece(0, 7, 50, 0)], "decode": [Piece(0, 1, 60, 1)] * 3}


def pass_of(scenario: Scenario, phase: str = "decode") -> tuple[StepGraph, Layout]:
    layout, shards = lay_out(scenario), scenario.deployment.data_parallel
    # Shards are not alike: the last of several has a token more.
    pieces = [dataclasses.replace(piece, shard=shard) for shard in range(shards) for piece in PHASES[phase]]
    pieces += [Piece(shards - 1, 1, 20, 1)] if shards > 1 else []
    batch = batch_of(phase, pieces, shards, scenario.model.window)
    counts, distinct = gated(batch, scenario, layout, 0)
    return lower(batch, counts, layout, distinct), layout


def verdicts(graph: StepGraph, layout: Layout, parts: Iterator[Part]) -> dict[str, Verdict]:
    return {one.check: one for one in Inspection(graph, layout).look(parts).verdicts()}


def wrong(graph: StepGraph, layout: Layout, parts: Iterator[Part]) -> list[str]:
    return [str(one) for one in verdicts(graph, layout, parts).values() if not one.good]


def shallow(name: str) -> dict[str, Any]:
    """A model of the catalogue with a layer or two of each kind that it has."""
    model = read_catalogue("models")[name]
    assert isinstance(model, Model)
    layers = max(model.dense_layers + model.moe_layer_step, model.full_every, 2)
    return {**model.model_dump(exclude_none=True), "layers": layers}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", read_catalogue("models"))
def test_every_kind_of_model_is_drawn_as_it_runs(name: str, phase: str) -> None:
    values = shallow(name)
    deployment = parallel(tp=4) if values.get("experts") else {"tensor_parallel": 4}
    scenario = tiny(single_server(4, memory="4 TiB"), deployment=deployment, model=values)
    graph, layout = pass_of(scenario, phase)
    for wish in (WISHES["operators"], WISHES["sampled"]):
        assert not wrong(graph, layout, drawn(graph, layout, wish)), wish


GATED = {"shared_experts": 2, "dense_layers": 1, "dense_ffn": 96, "ffn_kind": "gated"}
DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "alone": {"topology": single_server(1), "deployment": parallel()},
    "experts only": {"deployment": parallel(dp=2)},
    "tensors only": {"deployment": parallel(tp=2)},
    "experts shared": {"topology": single_server(4), "deployment": parallel(tp=2, dp=2, etp=2)},
    "all of them": {"topology": fat_tree(4, 2), "deployment": parallel(tp=2, pp=2, dp=2, etp=2)},
    "slices handed over": {
        "topology": rail_tree(2, 4),
        "deployment": parallel(tp=2, pp=2, dp=2, algorithms={"point_to_point": "scatter_gather"}),
    },
    "copies": {"deployment": parallel(dp=2, experts={"policy": "replicated", "per_gpu": 4})},
    "one by one": {"deployment": parallel(dp=2, experts={"service": "by_expert"})},
    "chunks": {
        "deployment": parallel(dp=2, experts={"service": "by_expert", "start": "chunks", "chunk_tokens": 2})
    },
    "dropped": {"deployment": parallel(dp=2), "gating": {"skew": "hot", "capacity_factor": 1.0}},
    "few key heads": {"deployment": parallel(dp=2), "model": {"kv_heads": 2}},
    "key heads twice": {"topology": single_server(4), "deployment": parallel(tp=4), "model": {"kv_heads": 2}},
    "shared and dense": {"deployment": parallel(tp=2), "model": GATED},
    "many heads": {
        "deployment": parallel(dp=2),
        "model": {"heads": 32, "kv_heads": 8, "head_dim": 2, "experts": 64},
    },
}


def made(name: str) -> tuple[StepGraph, Layout]:
    wished = dict(DEPLOYMENTS[name])
    return pass_of(tiny(wished.pop("topology", None), **wished), "prefill")


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_kind_of_deployment_is_drawn_as_it_runs(name: str, wish: str) -> None:
    graph, layout = made(name)
    assert not wrong(graph, layout, drawn(graph, layout, WISHES[wish]))


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_drawing_with_layers_left_out_still_hangs_together(name: str) -> None:
    graph, layout = made(name)
    for layer in range(layout.model.layers):
        found = verdicts(graph, layout, drawn(graph, layout, Wish("expert", layers=frozenset([layer]))))
        assert found["no cycles"].good and found["connectivity"].good and found["dimensions"].good


@pytest.mark.parametrize("level", ["model", "stage"])
@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_coarser_drawing_hangs_together_and_does_all_the_work(name: str, level: str) -> None:
    graph, layout = made(name)
    parts = list(coarser(drawn(graph, layout, WISHES["operators"]), graph, level))
    found = verdicts(graph, layout, iter(parts))
    assert found["no cycles"].good and found["connectivity"].good
    assert sum(part.flop for part in parts if isinstance(part, Node)) == pytest.approx(graph.flop)


def test_a_small_layer_has_the_nodes_that_one_counts_by_hand() -> None:
    # One GPU, one layer with 4 heads and 4 experts. Input, embedding, norm, QKV, rotary, 4 heads,
    # their aggregation, output projection, residual: 12; norm, gate, top-k, order, dispatch, 4 x
    # (GEMM 1, GELU, GEMM 2), combine, aggregation, residual: 20; final norm, LM head, sampling,
    # output: 4.
    graph, layout = pass_of(tiny(single_server(1), deployment=parallel(), model={"layers": 1}))
    nodes = [part for part in drawn(graph, layout, Wish()) if isinstance(part, Node)]
    assert len(nodes) == 12 + 20 + 4
    kinds = {node.name: node.kind for node in nodes}
    assert {kinds[name] for name in ("dispatch", "combine")} == {COMMUNICATION}
    assert {kinds[name] for name in ("gate", "top_k", "unpermute", "attention_aggregation")} == {ROUTING}


def test_heads_and_experts_are_sampled_as_the_documents_do() -> None:
    heads = Wish().heads(32)
    assert [part[0] for part in heads if len(part) == 1] == [*range(8), *range(24, 32)]
    assert [part for part in heads if len(part) > 1] == [tuple(range(8, 24))]
    copies = Wish().copies(64)
    assert [part[0] for part in copies if len(part) == 1] == [0, 1, 2, 3, 31, 32, 60, 61, 62, 63]


@pytest.mark.parametrize("number", range(1, 70))
def test_a_sample_and_its_rest_are_everything_once(number: int) -> None:
    for wish in WISHES.values():
        for parts in (wish.heads(number), wish.copies(number)):
            assert sorted(one for part in parts for one in part) == list(range(number))


def test_what_the_gate_selects_is_dashed_and_nothing_else() -> None:
    graph, layout = made("experts shared")
    selected = {(e.source.rpartition(".")[2], e.taken.name) for e in edges_of(graph, layout) if e.selection}
    assert {name for _, name in selected} == {"choices", "arrived"}
    assert {source for source, name in selected if name == "arrived"} == {"dispatch"}


def edges_of(graph: StepGraph, layout: Layout) -> list[Edge]:
    return [part for part in drawn(graph, layout, Wish()) if isinstance(part, Edge)]


# ---- the checks see what is wrong -----------------------------------------------------------------


def _without_edge(parts: list[Part]) -> list[Part]:
    return [p for p in parts if not (isinstance(p, Edge) and ".l1.attention_output" in p.target)]


def _backwards(parts: list[Part]) -> list[Part]:
    edge = next(p for p in parts if isinstance(p, Edge) and ".l0.qkv" in p.source)
    return [*parts, Edge(edge.target, edge.source, edge.taken, edge.given)]


def _without_expert(parts: list[Part]) -> list[Part]:
    gone = {p.id for p in parts if isinstance(p, Node) and p.name.startswith("expert_") and p.experts == (2,)}
    return [p for p in parts if not ({p.id} if isinstance(p, Node) else {p.source, p.target}) & gone]


def _without_head(parts: list[Part]) -> list[Part]:
    gone = {p.id for p in parts if isinstance(p, Node) and p.name == "attention" and p.members == (1,)}
    return [p for p in parts if not ({p.id} if isinstance(p, Node) else {p.source, p.target}) & gone]


def _changed(parts: list[Part], name: str, **how: Any) -> list[Part]:
    return [dataclasses.replace(p, **how) if isinstance(p, Node) and p.name == name else p for p in parts]


def _wider(parts: list[Part]) -> list[Part]:
    found: list[Part] = []
    for part in parts:
        if isinstance(part, Edge) and part.taken.name == "up":
            taken = dataclasses.replace(part.taken, numbers=part.taken.numbers * 2)
            part = dataclasses.replace(part, taken=taken, given=taken)
        found.append(part)
    return found


FAULTS: dict[str, tuple[str, Callable[[list[Part]], list[Part]]]] = {
    "an edge is missing": ("connectivity", _without_edge),
    "and what it carried": ("dimensions", _without_edge),
    "an edge leads back": ("no cycles", _backwards),
    "an expert is missing": ("expert coverage", _without_expert),
    "a head is missing": ("head decomposition", _without_head),
    "a node has no GPU": (
        "GPU assignment",
        lambda parts: _changed(parts, "qkv", ranks=np.array([], dtype=int)),
    ),
    "a node has another's GPU": (
        "GPU assignment",
        lambda parts: _changed(parts, "gate", ranks=np.array([7])),
    ),
    "an exchange is missing": ("communications", lambda parts: _changed(parts, "dispatch", operator=-1)),
    "bytes are missing": ("communications", lambda parts: _changed(parts, "combine", sent=1.0)),
    "a tensor is too wide": ("dimensions", _wider),
    "work is missing": ("drawn is what runs", lambda parts: _changed(parts, "lm_head", flop=0.0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_check_sees_what_is_wrong(fault: str) -> None:
    graph, layout = made("experts shared")
    check, spoil = FAULTS[fault]
    parts = list(drawn(graph, layout, WISHES["full"]))
    assert verdicts(graph, layout, iter(parts))[check].good
    assert not verdicts(graph, layout, iter(spoil(parts)))[check].good


def test_there_is_a_fault_for_every_check() -> None:
    graph, layout = made("alone")
    checks = set(verdicts(graph, layout, drawn(graph, layout, Wish())))
    assert {check for check, _ in FAULTS.values()} == checks and len(CHECKS) == len(checks)


# ---- DOT and SVG ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_graphviz_reads_the_nodes_and_arrows_that_were_drawn(name: str) -> None:
    graph, layout = made(name)
    parts = list(drawn(graph, layout, Wish()))
    read = pygraphviz.AGraph(string="".join(dot_lines(parts, "a title")))
    assert set(read.nodes()) == {part.id for part in parts if isinstance(part, Node)}
    arrows = {(part.source, part.target) for part in parts if isinstance(part, Edge)}
    assert set(read.edges()) == arrows
    shapes = {
        "communication": "ellipse",
        "computation": "box",
        "routing": "parallelogram",
        "rest": "box",
        "end": "box",
    }
    for part in parts:
        if isinstance(part, Node):
            assert read.get_node(part.id).attr["shape"] == shapes[part.kind]


def test_nodes_stand_in_the_boxes_of_their_stage_and_layer() -> None:
    graph, layout = made("all of them")
    parts = list(drawn(graph, layout, Wish()))
    read = pygraphviz.AGraph(string="".join(dot_lines(parts, "")))
    for part in parts:
        if isinstance(part, Node) and part.layer >= 0 and part.kind != REST:
            box = read.get_subgraph(f"cluster_s{part.stage}").get_subgraph(
                f"cluster_s{part.stage}_l{part.layer}"
            )
            assert part.id in box.nodes(), part.id


@pytest.mark.parametrize(
    "text", ['say "no"', "C:\\N\\E", "a\nb", "tab\there", "<b>x</b>", "{a|b}", "\x1b[31m", "ß…", "\\"]
)
def test_no_text_breaks_out_of_its_label(text: str) -> None:
    read = pygraphviz.AGraph(string=f"digraph {{ a [label={quoted(text)}] }}")
    assert read.nodes() == ["a"] and not read.edges()
    label = read.get_node("a").attr["label"]
    assert label.replace("\\\\", "\\").replace("\\n", "\n") == re.sub(r"[\x00-\x09\x0b-\x1f]", "�", text)


def test_gpus_are_said_in_few_words() -> None:
    assert said_gpus(np.array([5])) == "GPU 5"
    assert said_gpus(np.arange(128)) == "GPUs 0-127"
    assert said_gpus(np.arange(0, 128, 2)) == "GPUs 0, 2, …, 126 (64)"
    assert said_gpus(np.array([3, 0, 1, 8])) == "GPUs 0-1, 3, 8"


def test_an_svg_has_every_node_and_keeps_experts_in_order() -> None:
    graph, layout = made("many heads")
    parts = list(drawn(graph, layout, Wish("expert", layers=frozenset([0]))))
    text = to_svg(parts, "a <title> & more")
    titles = set(re.findall(r'class="node">\n<title>(.*?)</title>', text))
    assert titles == {part.id.replace("-", "&#45;") for part in parts if isinstance(part, Node)}
    for begin in (r"s0\.l0\.expert_gemm_1\.c", r"s0\.l0\.attention\.h"):
        places = re.findall(rf'<title>{begin}(\d+)(?:&#45;\d+)?</title>.*?points="([\d.]+),', text, re.S)
        numbers = [int(number) for number, _ in sorted(places, key=lambda place: float(place[1]))]
        assert len(numbers) > 8 and numbers == sorted(numbers)
    assert "invis" not in text and "&lt;title&gt; &amp; more" in text


# ---- the seed deployments, and the command --------------------------------------------------------

SEEDS = {name: f"workloads/{name}.toml" for name in study.CLAIMED}
#: Claims of the documents that do not hold; the words are enough to know them by.
NOT_SO = {
    "moe_1024": {
        "Model Size: 30B parameters",
        "All-Gather: For column-parallel operations (QKV, ...)",
        "TP All-Gather: Combine tensor parallel outputs (before GELU)",
        "TP All-Reduce: Synchronize tensor parallel outputs (after MLP Layer 2)",
    },
    "large_ep": {"Throughput: 450,000 TPS, Latency: 2.2ms TPOT"},
    "baseline_tp8_pp2": {
        "8 experts per GPU x 16 GPUs = 128 experts total (replicated)",
        "16 experts distributed as 8 per GPU, requiring 2 GPUs per layer",
        "Hierarchical communication within pipeline stages",
        "Throughput: 120,000 TPS, Latency: 8.3ms TPOT",
    },
}


def ran(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["dag", *arguments], standalone_mode=False)


@pytest.mark.parametrize("name", SEEDS)
def test_a_seed_deployment_passes_the_list_and_some_claims_do_not_hold(name: str) -> None:
    done = ran(SEEDS[name], "--check", "--json")
    found = json.loads(done.stdout)
    assert done.return_value == 0 and found["good"] and len(found["checks"]) == len(CHECKS)
    assert {claim["words"] for claim in found["claims"] if not claim["holds"]} == NOT_SO[name]


def test_a_claim_is_reckoned_from_what_runs() -> None:
    fewer = study.load_deployment(SEEDS["baseline_tp8_pp2"], ["deployment.experts.per_gpu=2"])
    claims = {one["words"]: one for one in study.check(fewer, Wish("layer"))["claims"]}
    assert not claims["TP=8, PP=2, 8 experts per GPU"]["holds"]
    assert "2 expert places" in claims["TP=8, PP=2, 8 experts per GPU"]["found"]


def test_a_drawing_that_fails_a_check_ends_with_status_2(monkeypatch: pytest.MonkeyPatch) -> None:
    original = FORMS["lm_head"]

    def lazy(*arguments: Any) -> Iterator[Node]:
        yield from (dataclasses.replace(node, flop=0.0) for node in original(*arguments))

    monkeypatch.setitem(FORMS, "lm_head", lazy)
    done = ran(SEEDS["large_ep"], "--check")
    assert done.return_value == 2 and "lm_head" in done.stdout


def test_dot_goes_to_standard_output_and_the_same_to_a_file(tmp_path: Path) -> None:
    asked = (SEEDS["large_ep"], "--layers", "0", "--level", "layer")
    printed = ran(*asked).stdout
    done = ran(*asked, "--out", str(tmp_path / "a.dot"), "--json")
    assert (tmp_path / "a.dot").read_text(encoding="utf-8") == printed
    assert json.loads(done.stdout)["nodes"] == len(pygraphviz.AGraph(string=printed).nodes())


def test_json_has_the_gpus_and_sizes_of_every_node() -> None:
    found = json.loads(ran(SEEDS["moe_1024"], "--layers", "0", "--json").stdout)
    nodes = {node["id"]: node for node in found["nodes"]}
    head = nodes["s0.l0.attention.h31"]
    # Head 31 is on the second GPU of each of the 64 pairs of stage 0.
    assert head["gpus"] == list(range(1, 128, 2))
    sizes = {dim["name"]: (dim["least"], dim["most"], dim["whole"]) for dim in head["gives"][0]["dims"]}
    assert sizes == {"tokens": (128, 128, 8192), "heads": (1, 1, 1), "d": (128, 128, 128)}
    assert nodes["s0.l0.expert_gemm_1.c63"]["gpus"] == [126, 127]
    assert {edge["source"] for edge in found["edges"]} <= set(nodes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--level", "leyer"), 'did you mean "layer"'),
        (("--layers", "16"), "layers 0 to 15"),
        (("--layers", "1-"), "not a layer"),
        (("--layers", "3-1"), "layers 0 to 15"),
        (("--out", "a.png"), "neither in .dot nor in .svg"),
        (("--layers", "0", "--check"), "left out"),
        (("--full", "--out", "a.svg"), "--level layer draws"),
    ],
)
def test_a_wish_that_cannot_be_met_says_what_can(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = ran(SEEDS["large_ep"], *arguments)
    assert isinstance(done.exception, ClustersimError) and said in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_the_picture_of_the_docs_shows_what_runs() -> None:
    file, level, layers = dag_page.SHOWN
    deployment = study.load_deployment(file)
    parts = study.parts_of(deployment, level, study.wish_of(level, False, layers, deployment))
    text = dag_page.PICTURE.read_text(encoding="utf-8").replace("&#45;", "-")
    titles = set(re.findall(r'class="node">\n<title>(.*?)</title>', text))
    assert titles == {part.id for part in parts if isinstance(part, Node)}
    assert len(text) < 200_000
