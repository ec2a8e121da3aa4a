"""StepGraphs over many deployments: their laws, their FLOP and bytes by closed forms, prices by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from pytest import approx
from scenarios import fat_tree, gpu, parallel, rail_tree, single_server, tiny

from clustersim.physics.compute import price
from clustersim.plan.builder import load_of
from clustersim.plan.gating import GATINGS, expert_counts
from clustersim.plan.layout import lay_out
from clustersim.plan.lowering import gated, lower
from clustersim.plan.memory import needs, weights_held
from clustersim.plan.parameters import active_parameters, total_parameters
from clustersim.plan.stepgraph import Exchange, Operator, StepGraph, check
from clustersim.spec.batch import Batch, Piece, batch_of
from clustersim.spec.hardware import Gpu
from clustersim.spec.model import Model
from clustersim.spec.scenario import Scenario

LATENT: dict[str, Any] = {
    "kv_heads": 0,
    "head_dim": 0,
    "mla": {"kv_lora_rank": 32, "qk_nope_head_dim": 12, "qk_rope_head_dim": 6, "v_head_dim": 10},
}
MODELS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"kv_heads": 2, "ffn_kind": "gated"},
    "one key head": {"kv_heads": 1, "tied_embeddings": True, "vocab": 101},
    "top-1, fp8": {"top_k": 1, "format": "fp8", "kv_format": "fp8"},
    "eight experts, top-3": {"experts": 8, "top_k": 3, "ffn_kind": "gated"},
    "fp4 experts": {"expert_format": "fp4", "format": "fp8_block", "ffn_kind": "gated"},
    "latent": {**LATENT, "layers": 3, "shared_experts": 2, "shared_ffn": 24, "ffn_kind": "gated"},
    "latent, compressed": {**LATENT, "mla": {**LATENT["mla"], "q_lora_rank": 48}, "kv_format": "fp8"},
    "a dense layer first": {"layers": 5, "dense_layers": 1, "dense_ffn": 96, "shared_experts": 1},
    "every other layer": {"layers": 3, "moe_layer_step": 2, "dense_ffn": 96, "qk_norm": True},
    "windows": {"layers": 4, "window": 3, "full_every": 2, "attention_bias": True},
    "dense": {"experts": 0, "top_k": 0, "ffn": 0, "dense_ffn": 96, "ffn_kind": "gated", "kv_heads": 2},
}
DEPLOYMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one GPU": (single_server(1), parallel()),
    "TP4": (single_server(4), parallel(tp=4)),
    "DP4": (rail_tree(2, 2), parallel(dp=4)),
    "TP2 DP2, experts cut in two": (single_server(4), parallel(tp=2, dp=2, etp=2)),
    "experts cut in four": (single_server(4), parallel(dp=4, etp=4)),
    "TP2 PP2": (single_server(4), parallel(tp=2, pp=2)),
    "all at once": (fat_tree(4, 4), parallel(tp=4, dp=2, pp=2, etp=2)),
    "two copies": (
        rail_tree(2, 4),
        parallel(dp=8, etp=2, experts={"policy": "replicated", "per_gpu": 4, "copy_choice": "local_first"}),
    ),
    "dealt, one by one": (
        single_server(2),
        parallel(dp=2, experts={"policy": "round_robin", "service": "by_expert"}),
    ),
}
BATCHES: dict[str, Any] = {
    "prefill": lambda shard: [Piece(shard, 9, 0, 1), Piece(shard, 9, 0, 1)],
    "decode": lambda shard: [Piece(shard, 1, 10, 1), Piece(shard, 1, 12, 1), Piece(shard, 1, 10, 1)],
    "chunk": lambda shard: [Piece(shard, 5, 7, 1), Piece(shard, 2, 0, 0)],
    "uneven shards": lambda shard: [Piece(shard, 1 + 3 * shard, shard, 1)],
    "an idle shard": lambda shard: [] if shard == 1 else [Piece(shard, 3, 0, 1)],
}


@dataclass(frozen=True)
class Case:
    scenario: Scenario
    pieces: list[Piece]
    batch: Batch
    graph: StepGraph


def lowered(deployment: str, model: str, batch: str, skew: str = "zipf") -> Case:
    scenario = placed(deployment, model, skew)
    shards = scenario.deployment.data_parallel
    pieces = [piece for shard in range(shards) for piece in BATCHES[batch](shard)]
    phase = "decode" if batch == "decode" else "prefill"
    summed = batch_of(phase, pieces, shards, scenario.model.window)
    layout = lay_out(scenario)
    counts, _ = gated(summed, scenario, layout, 0)
    return Case(scenario, pieces, summed, lower(summed, counts, layout))


def placed(deployment: str, model: str, skew: str = "zipf") -> Scenario:
    topology, cut = DEPLOYMENTS[deployment]
    if MODELS[model].get("experts") == 0:
        cut = {**cut, "expert_parallel": 1, "expert_tensor_parallel": 1}
    return tiny(
        topology,
        deployment=cut,
        model=MODELS[model],
        workload={"sequences": 8},
        gating={"skew": skew},
    )


def fits(deployment: str, model: str) -> bool:
    """A rank cannot hold an expert twice, nor four of them where there are more, nor place none."""
    experts = MODELS[model].get("experts", 4)
    if not experts:
        return "experts" not in DEPLOYMENTS[deployment][1]
    return deployment != "two copies" or experts == 4


def routed(m: Model) -> list[int]:
    """Layers with experts."""
    step = range(m.moe_layer_step - 1, m.layers, m.moe_layer_step)
    return [layer for layer in step if layer >= m.dense_layers] if m.experts else []


EVERYWHERE = pytest.mark.parametrize(
    "deployment, model, batch",
    [case for case in product(DEPLOYMENTS, MODELS, BATCHES) if fits(*case[:2])],
)


@EVERYWHERE
def test_the_flop_of_a_pass_are_those_of_the_closed_form(deployment: str, model: str, batch: str) -> None:
    case = lowered(deployment, model, batch)
    m, tp = case.scenario.model, case.scenario.deployment.tensor_parallel
    tokens = sum(piece.new for piece in case.pieces)
    outputs = sum(piece.makes for piece in case.pieces)
    matrices = {"plain": 2, "gated": 3}[m.ffn_kind]
    expected = 2.0 * outputs * m.hidden * m.vocab
    for layer in range(m.layers):
        # Every new token looks at what was there, at the new ones before it, and at itself.
        window = m.window if m.window and not (m.full_every and (layer + 1) % m.full_every == 0) else 1 << 30
        seen = [min(piece.past + i + 1, window) for piece in case.pieces for i in range(piece.new)]
        expected += attention_flop(case, tokens, sum(seen), tp)
        if layer in routed(m):
            shared = m.shared_experts * (m.shared_ffn or m.ffn)
            expected += 2 * tokens * m.hidden * (m.experts + matrices * (m.top_k * m.ffn + shared))
        else:
            expected += 2 * tokens * m.hidden * matrices * m.dense_ffn
    assert sum(op.flop.sum() for op in case.graph.operators) == approx(expected, rel=1e-12)
    assert case.graph.flop == approx(expected, rel=1e-12)


def attention_flop(case: Case, tokens: int, pairs: int, tp: int) -> float:
    """Of one layer over all ranks."""
    m, mla = case.scenario.model, case.scenario.model.mla
    if mla is None:
        key_heads = max(m.kv_heads, tp)  # more ranks than key heads: each holds one all the same
        return (
            2 * tokens * m.hidden * m.head_dim * (2 * m.heads + 2 * key_heads)
            + 4 * pairs * m.heads * m.head_dim
        )
    nope, rope, wide, rank = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim, mla.kv_lora_rank
    # Every TP rank projects into latent vectors for itself.
    flop = 2.0 * tokens * tp * m.hidden * (mla.q_lora_rank + rank + rope)
    flop += 2.0 * tokens * m.heads * (nope + rope) * (mla.q_lora_rank or m.hidden)
    flop += 2.0 * tokens * m.heads * wide * m.hidden
    if case.batch.phase == "decode":
        absorbed = 2.0 * tokens * m.heads * rank * (nope + wide)
        return flop + absorbed + 2.0 * pairs * m.heads * (rank + rope + rank)
    read = sum(piece.past + piece.new for piece in case.pieces)
    return flop + 2.0 * read * m.heads * rank * (nope + wide) + 2.0 * pairs * m.heads * (nope + rope + wide)


@EVERYWHERE
def test_each_token_goes_to_top_k_experts_in_every_layer(deployment: str, model: str, batch: str) -> None:
    case = lowered(deployment, model, batch)
    m, tokens = case.scenario.model, sum(piece.new for piece in case.pieces)
    queued = {op.layer: op.queue for op in case.graph.operators if op.queue is not None}
    assert sorted(queued) == routed(m)
    for queue in queued.values():
        assert queue is not None
        assert queue.tokens.sum() == tokens * m.top_k
        assert set(queue.copies.tolist()) == set(range(m.experts))
    rows = {op.layer: 0 for op in case.graph.operators}
    for op in case.graph.operators:
        if op.name == "expert_gemm_1":
            assert op.call is not None
            rows[op.layer] += int(op.call.columns["counts"].sum())
    sharers = case.scenario.deployment.expert_tensor_parallel
    assert all(rows[layer] == tokens * m.top_k * sharers for layer in queued), "all sharers see every token"


@EVERYWHERE
def test_what_is_sent_is_what_is_gathered(deployment: str, model: str, batch: str) -> None:
    case = lowered(deployment, model, batch)
    m, d = case.scenario.model, case.scenario.deployment
    there = m.hidden * (1 if m.format == "fp8" else 2)
    tokens = sum(piece.new for piece in case.pieces)
    wanted = {
        "dispatch": tokens * m.top_k,
        "combine": tokens * m.top_k,
        "expert_all_gather": tokens * m.top_k,
        "expert_reduce_scatter": tokens * m.top_k,
        "attention_all_reduce": tokens,
        "ffn_all_reduce": tokens,
        "ffn_all_gather": tokens,
        "stage_transfer": tokens * d.tensor_parallel,
    }
    seen: dict[str, int] = {}
    for op in case.graph.operators:
        if op.exchange is not None:
            # Everything is bf16 but tokens on their way to experts that multiply fp8.
            width = there if op.name in ("dispatch", "expert_all_gather") else 2 * m.hidden
            assert op.exchange.size.sum() == approx(wanted[op.name] * width), op.name
            seen[op.name] = seen.get(op.name, 0) + 1
    with_experts = len(routed(m))
    expected = {"dispatch": with_experts, "combine": with_experts}
    if d.tensor_parallel > 1:
        expected |= {"attention_all_reduce": m.layers, "ffn_all_gather": with_experts}
        expected["ffn_all_reduce"] = m.layers - with_experts
    if d.expert_tensor_parallel > 1:
        expected |= {"expert_all_gather": with_experts, "expert_reduce_scatter": with_experts}
    expected = {name: count for name, count in expected.items() if count}
    if d.pipeline_parallel > 1:
        expected["stage_transfer"] = d.pipeline_parallel - 1
    assert seen == expected


@pytest.mark.parametrize("tokens", [8, 7, 1])
def test_tp_ranks_that_scatter_hand_over_a_slice_each_and_gather_the_whole(tokens: int) -> None:
    def exchanges(way: str) -> dict[str, list[Exchange]]:
        scenario = tiny(
            rail_tree(2, 4),
            deployment=parallel(tp=2, dp=2, pp=2, algorithms={"point_to_point": way}),
            workload={"sequences": 8},
        )
        batch = batch_of("prefill", [Piece(shard, tokens, 0, 1) for shard in (0, 1)], 2)
        layout = lay_out(scenario)
        counts = expert_counts(load_of(batch, layout).slices, scenario.model, scenario.gating, 0, 0)
        found: dict[str, list[Exchange]] = {}
        for op in lower(batch, counts, layout).operators:
            if op.exchange is not None:
                found.setdefault(op.name, []).append(op.exchange)
        return found

    plain, scattered = exchanges("direct"), exchanges("scatter_gather")
    whole, (slices,), (parts,) = (
        plain["stage_transfer"],
        scattered["stage_transfer"],
        scattered["stage_all_gather"],
    )
    assert "stage_all_gather" not in plain
    # Both shards are handed over once instead of once per TP rank; the second stage makes them whole.
    assert [one.size.sum() for one in whole] == [2 * slices.size.sum()] == [2 * 2 * tokens * 64 * 2]
    assert parts.groups.tolist() == [[4, 5], [6, 7]]
    assert np.array_equal(parts.size.ravel(), slices.size)
    assert slices.algorithm == "scatter_gather"


@pytest.mark.parametrize(
    "topology, tp, scatters",
    [
        (rail_tree(2, 4), 4, True),
        (rail_tree(2, 4), 1, False),  # nothing to share
        (single_server(8), 4, False),  # NVLink all the way
        (rail_tree(4, 2), 4, False),  # the gathering would cross the network
    ],
    ids=["between servers", "alone", "in a server", "over servers"],
)
def test_left_to_choose_tp_ranks_scatter_where_it_spares_the_network(
    topology: dict[str, Any], tp: int, scatters: bool
) -> None:
    deployment = parallel(tp=tp, dp=4 // tp, pp=2, algorithms={"point_to_point": "auto"})
    scenario = tiny(topology, deployment=deployment, workload={"sequences": 4})
    batch = batch_of("decode", [Piece(shard, 4, 0, 1) for shard in range(4 // tp)], 4 // tp)
    layout = lay_out(scenario)
    counts = expert_counts(load_of(batch, layout).slices, scenario.model, scenario.gating, 0, 0)
    names = [op.name for op in lower(batch, counts, layout).operators]
    assert ("stage_all_gather" in names) == scatters


@EVERYWHERE
def test_no_price_is_below_the_roofline(deployment: str, model: str, batch: str) -> None:
    case = lowered(deployment, model, batch)
    sheet = {"sms": 132, "launch": 1e-6}
    card = Gpu.model_validate(gpu(**sheet))
    for op in case.graph.operators:
        if op.exchange is None:
            assert op.call is not None
            seconds = price(op, card)
            rate = card.flop_rate["fp8" if op.call.format.startswith("fp8") else "bf16"]
            assert (seconds >= op.flop / rate + card.launch_latency).all()
            assert (seconds >= op.bytes / card.memory_bandwidth + card.launch_latency).all()
            assert (seconds >= card.launch_latency).all()


@pytest.mark.parametrize("deployment, model", [c for c in product(DEPLOYMENTS, MODELS) if fits(*c)])
def test_every_operator_follows_from_the_first_one(deployment: str, model: str) -> None:
    graph = lowered(deployment, model, "prefill").graph
    reached = {0}
    for index, op in enumerate(graph.operators[1:], 1):
        assert op.after, f"{op.name} waits for nothing"
        assert reached.issuperset(op.after)
        reached.add(index)
    assert [op.stage for op in graph.operators] == sorted(op.stage for op in graph.operators)


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("deployment, model", [c for c in product(DEPLOYMENTS, MODELS) if fits(*c)])
def test_weights_of_all_ranks_are_the_parameters_and_what_is_held_more_than_once(
    deployment: str, model: str
) -> None:
    scenario = placed(deployment, model)
    m, d = scenario.model, scenario.deployment
    ranks = d.tensor_parallel * d.data_parallel  # of a stage
    held = sum(sum(weights_held(m, d, stage).values()) for stage in range(d.pipeline_parallel)) * ranks
    key_heads, mla, experts = (
        2 * m.hidden * m.head_dim * (max(m.kv_heads, d.tensor_parallel) - m.kv_heads),
        m.mla,
        0,
    )
    attention = m.hidden * m.head_dim * 2 * (m.heads + m.kv_heads)
    vectors = 2 * m.hidden + m.qk_norm * 2 * m.head_dim + m.attention_bias * 3 * m.heads * m.head_dim
    if mla:
        narrow, wide = mla.q_lora_rank + mla.kv_lora_rank + mla.qk_rope_head_dim, mla.v_head_dim
        query = (mla.q_lora_rank or m.hidden) * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        up = mla.kv_lora_rank * (mla.qk_nope_head_dim + wide)
        attention = m.heads * (query + up + wide * m.hidden)
        vectors += mla.q_lora_rank + mla.kv_lora_rank + m.hidden * narrow  # whole on every rank
        key_heads = 0
    if m.experts:
        experts = lay_out(scenario).copies.shape[1] - m.experts
    matrices = {"plain": 2, "gated": 3}[m.ffn_kind] * m.hidden
    with_experts = len(routed(m))
    again = (
        m.layers * d.data_parallel * key_heads  # more ranks than key heads
        + m.layers * (d.data_parallel - 1) * attention
        + m.layers * (ranks - 1) * vectors
        + with_experts * (ranks - 1) * m.hidden * m.experts  # gate
        + with_experts * (ranks - 1) * matrices * m.shared_experts * (m.shared_ffn or m.ffn)
        + with_experts * experts * matrices * m.ffn
        + (m.layers - with_experts) * (d.data_parallel - 1) * matrices * m.dense_ffn
        + (ranks - 1) * m.hidden  # the final norm
        + (d.data_parallel - 1) * m.vocab * m.hidden * (1 if m.tied_embeddings else 2)
    )
    if m.tied_embeddings and d.pipeline_parallel > 1:
        again += d.data_parallel * m.vocab * m.hidden  # first and last stage
    assert held == approx(total_parameters(m) + again, rel=1e-12)


def test_a_small_model_counts_its_parameters_by_hand() -> None:
    # Attention 4 x 64 x 64, an expert 2 x 64 x 128, gate 64 x 4, two norms of 64; two tables of 100 x 64.
    model = tiny().model
    layer = 4 * 64 * 64 + 4 * 2 * 64 * 128 + 64 * 4 + 2 * 64
    assert total_parameters(model) == 2 * layer + 2 * 100 * 64 + 64
    assert active_parameters(model) == total_parameters(model) - 2 * 2 * 2 * 64 * 128


def test_kv_blocks_are_counted_whole_and_per_rank() -> None:
    # 10 + 1 tokens take one block of 16; two sequences a shard, two layers, 2 of 4 heads, keys and values.
    need = needs(tiny(deployment=parallel(tp=2), workload={"sequences": 2}))[0]
    assert need.kv == 2 * 16 * 2 * 2 * 16 * 2 * 2


# ---- what the checks refuse ---------------------------------------------------------------------


def with_operator(graph: StepGraph, name: str, **changes: Any) -> StepGraph:
    at = next(i for i, op in enumerate(graph.operators) if op.name == name)
    operators = list(graph.operators)
    operators[at] = replace(operators[at], **changes)
    return replace(graph, operators=tuple(operators))


def dispatch_of(graph: StepGraph) -> Operator:
    return next(op for op in graph.operators if op.name == "dispatch")


SPOILED = {
    "is not the closed form": lambda g: with_operator(g, "qkv", flop=np.zeros(4)),
    "an edge points forwards": lambda g: with_operator(g, "qkv", after=(5,)),
    "not seen by all ranks": lambda g: with_operator(
        g, "dispatch", exchange=replace(dispatch_of(g).exchange, groups=np.array([[0, 1, 2, 2]]))
    ),
    "tokens dispatched are not those combined": lambda g: with_operator(
        g, "dispatch", exchange=replace(dispatch_of(g).exchange, size=np.ones((1, 4, 4)))
    ),
    "negative bytes": lambda g: with_operator(
        g, "dispatch", exchange=replace(dispatch_of(g).exchange, size=-np.ones((1, 4, 4)))
    ),
    "tokens sent to experts": lambda g: with_operator(
        g, "dispatch", queue=replace(dispatch_of(g).queue, tokens=dispatch_of(g).queue.tokens * 2)
    ),
    "an expert stands nowhere": lambda g: with_operator(
        g, "dispatch", queue=replace(dispatch_of(g).queue, copies=np.zeros(4, dtype=int))
    ),
    "every GPU is assigned once": lambda g: replace(g, ranks=np.array([[0, 1, 2, 2]])),
}


@pytest.mark.parametrize("law", SPOILED)
def test_a_spoiled_graph_is_refused_by_the_law_it_breaks(law: str) -> None:
    graph = lowered("DP4", "mha", "prefill").graph
    check(graph, 4, 4)
    with pytest.raises(AssertionError, match=law):
        check(SPOILED[law](graph), 4, 4)


# ---- what experts read -----------------------------------------------------------------------------


def test_an_expert_with_one_token_is_read_whole_and_one_without_not_at_all() -> None:
    # Even gating deals 3 x 2 choices of a single GPU to 4 experts.
    case = lowered("one GPU", "mha", "decode", "even")
    gemm = next(op for op in case.graph.operators if op.name == "expert_gemm_1")
    assert gemm.call is not None and sorted(*gemm.call.columns["counts"].tolist()) == [1, 1, 2, 2]
    assert gemm.bytes.tolist() == [2 * (4 * 64 * 128 + 6 * (64 + 128))]
    layout = lay_out(case.scenario)
    model: Model = case.scenario.model
    lonely = np.zeros((model.layers, 1, 4), dtype=int)
    lonely[:, :, :2] = 3
    op = next(op for op in lower(case.batch, lonely, layout).operators if op.name == "expert_gemm_1")
    assert op.bytes.tolist() == [2 * (2 * 64 * 128 + 6 * (64 + 128))]


@pytest.mark.parametrize("skew", GATINGS)
def test_served_one_by_one_the_experts_do_the_same_work(skew: str) -> None:
    def work(service: str) -> tuple[float, float]:
        scenario = tiny(deployment=parallel(dp=2, experts={"service": service}), gating={"skew": skew})
        batch = batch_of("prefill", [Piece(0, 5, 0, 1), Piece(1, 5, 0, 1)], 2)
        layout = lay_out(scenario)
        counts = expert_counts(load_of(batch, layout).slices, scenario.model, scenario.gating, 0, 0)
        operators = lower(batch, counts, layout).operators
        return sum(op.flop.sum() for op in operators), sum(op.bytes.sum() for op in operators)

    assert work("grouped") == approx(work("by_expert"), rel=1e-12)
