"""One batch on one replica → StepGraph: every layer of every stage, operator by operator.

Tokens of a shard are held by all its TP ranks through the attention. For the experts every TP rank
takes its own slice of them: it gates, dispatches and combines only that slice, and an all-gather
restores the whole. Ranks that share an expert (ETP) gather the tokens that came for any of them,
work on their columns and rows, and scatter the sums back. (Megatron-Core's MoE does the same.)
Shared experts stand whole on every rank and serve its own slice (vLLM's sequence-parallel MoE does
the same). A dense layer's network is divided by TP, and its sums are all-reduced.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from clustersim.errors import ClustersimError
from clustersim.plan.attention import attend
from clustersim.plan.builder import WIDTH, Builder, load_of
from clustersim.plan.collectives import AUTO
from clustersim.plan.distinct import expected
from clustersim.plan.gating import Ask, distinct_tokens, expert_counts, within_capacity
from clustersim.plan.groups import layers_of
from clustersim.plan.layout import Layout
from clustersim.plan.parameters import expert_parameters, step_flop
from clustersim.plan.popularity import settled
from clustersim.plan.rounds import domains_of
from clustersim.plan.stepgraph import Call, Copies, Exchange, Queue, StepGraph, check
from clustersim.spec.batch import Batch
from clustersim.spec.deployment import Experts
from clustersim.spec.model import FORMAT_BYTES, PLAIN
from clustersim.spec.scenario import Scenario

#: Bytes of a router's score and of a logit: fp32, as vLLM, SGLang and Megatron-Core keep them.
SCORE = 4.0
#: Parts in which the tokens of an expert may be served: each is three kernels of every rank.
MOST_CHUNKS = 64
#: Bytes that say where a token goes and how much that counts: an int32 and an fp32.
CHOICE = 8.0


def gated(
    batch: Batch, scenario: Scenario, layout: Layout, token_batch: int, step: int = 0
) -> tuple[np.ndarray, np.ndarray | None]:
    """What `lower` needs beside the batch.

    step     steps of the run that came before: popularity may have moved
    Returns  int64[L, N, E] tokens of each source rank for each expert; int64[L, N, D] of its tokens for
             each NVLink domain, each counted once, or None where nobody asks or nobody knows
    """
    if not scenario.model.experts:
        return np.zeros((scenario.model.layers, layout.groups.stage.shape[1], 0), dtype=np.int64), None
    gating, d = settled(scenario), scenario.deployment
    ask = Ask(
        load_of(batch, layout).slices,
        scenario.model,
        gating,
        scenario.seed,
        token_batch,
        step,
        d.data_parallel,
    )
    came = expert_counts(ask.tokens, ask.model, gating, ask.seed, token_batch, step, d.data_parallel)
    counts = within_capacity(came, gating.capacity_factor, d.expert_tensor_parallel)
    # With several copies of an expert nobody says which token goes to which; nor who was dropped.
    if not layout.deduplicates or layout.copies.shape[1] > scenario.model.experts or counts is not came:
        return counts, None
    return counts, distinct_tokens(ask, _homes(layout), came)


def _homes(layout: Layout) -> np.ndarray:
    """int64[L, N, E] NVLink domain of the one copy of every expert, as the source's EP group numbers it."""
    holder = np.argsort(layout.copies, axis=1) // layout.slots
    stages = layout.deployment.pipeline_parallel
    held = [len(layers_of(len(holder), stages, stage)) for stage in range(stages)]
    stage = np.repeat(np.arange(stages), held)
    by_group = layout.ep_domain[
        stage[:, None, None], np.arange(layout.ep_domain.shape[1])[:, None], holder[:, None, :]
    ]
    return np.tile(by_group, (1, layout.deployment.expert_parallel, 1))


def lower(batch: Batch, counts: np.ndarray, layout: Layout, distinct: np.ndarray | None = None) -> StepGraph:
    """Lowers one batch.

    counts   int64[L, N, E] tokens of each source rank for each expert
    distinct int64[L, N, D] of its tokens for each NVLink domain of its EP group, each counted once;
             None: they are worked out from the counts where they matter
    Returns  a StepGraph that has passed its checks
    """
    model, d = layout.model, layout.deployment
    load = load_of(batch, layout)
    out = Builder(layout, load)
    for stage in range(d.pipeline_parallel):
        out.enter(stage)
        if stage == 0:
            _embedding(out)
        elif _scatters(out, stage - 1):
            _gather(out)
        for layer in layers_of(model.layers, d.pipeline_parallel, stage):
            attend(out, layer)
            if model.has_experts(layer):
                came = layout.tokens_per_copy(counts[layer], layer)
                _experts(out, layer, came, None if distinct is None else distinct[layer])
            else:
                _dense(out)
        if stage < d.pipeline_parallel - 1:
            _hand_over(out)
        else:
            _head(out)
    tokens = int(batch.tokens.sum())
    choices = tokens * model.top_k * model.moe_layers
    taken = sum(int(counts[layer].sum()) for layer in range(model.layers) if model.has_experts(layer))
    dropped = choices - taken
    graph = StepGraph(
        operators=tuple(out.operators),
        ranks=layout.groups.stage,
        flop=step_flop(model, batch, d.tensor_parallel) - 2.0 * dropped * expert_parameters(model),
        tokens=tokens,
        choices=choices,
        dropped=dropped,
    )
    check(graph, len(layout.topology.gpus), model.experts)
    return graph


def _embedding(out: Builder) -> None:
    bytes = 2 * WIDTH * out.load.tokens * out.model.hidden
    out.moves("embedding", "embedding", out.load.tokens, bytes)


def _dense(out: Builder) -> None:
    """A network without experts, its columns and rows divided by TP."""
    out.norm("ffn_norm", out.model.hidden)
    out.network("ffn", out.load.tokens, out.model.dense_ffn // out.d.tensor_parallel)
    out.all_reduce("ffn_all_reduce")
    out.residual("ffn_residual", out.load.tokens)


def _experts(out: Builder, layer: int, tokens: np.ndarray, distinct: np.ndarray | None) -> None:
    """Tokens go to their experts and come back.

    tokens    int64[ETP, EP, C] from every source to every copy of this layer
    distinct  int64[N, D] of every source for every NVLink domain, each once; None if not known
    """
    m, load, d = out.model, out.load, out.d
    out.norm("ffn_norm", m.hidden)
    out.gemm("gate", load.slices, m.experts, m.hidden, PLAIN)
    out.moves("top_k", "top_k", load.slices, load.slices * (SCORE * m.experts + CHOICE * m.top_k))
    sorted_ = WIDTH * (1 + m.top_k) * load.slices * m.hidden
    out.moves("permute", "permute", load.slices, sorted_)
    queue = Queue(tokens, out.layout.copies[layer], out.layout.slots)
    sent = tokens.reshape(*tokens.shape[:2], d.expert_parallel, out.layout.slots).sum(axis=3)
    once = _distinct(out, layer, tokens, distinct) if out.layout.deduplicates else None
    _all_to_all(out, "dispatch", sent, once, queue=queue)
    came = tokens.sum(axis=1).reshape(len(tokens), d.expert_parallel, out.layout.slots)
    _among_sharers(out, "expert_all_gather", "all_gather", came, FORMAT_BYTES[m.sent_as])
    _serve(out, came.sum(axis=0))
    _among_sharers(out, "expert_reduce_scatter", "reduce_scatter", came, WIDTH)
    _all_to_all(out, "combine", sent.transpose(0, 2, 1), once, back=True)
    out.moves("unpermute", "unpermute", load.slices, sorted_)
    if m.shared_width:
        out.network("shared", load.slices, m.shared_width)
        out.residual("shared_sum", load.slices)
    tp = d.tensor_parallel
    if tp > 1:
        parts = load.slices.reshape(-1, tp) * m.hidden * WIDTH
        out.exchange("ffn_all_gather", "all_gather", out.layout.groups.tp[out.stage], parts)
    out.residual("ffn_residual", load.tokens)


def _distinct(out: Builder, layer: int, tokens: np.ndarray, known: np.ndarray | None) -> np.ndarray:
    """float64[ETP, EP, D] tokens of every source for every domain, each once. Arguments as above."""
    if known is not None:
        by_source = known.reshape(out.d.expert_parallel, out.d.expert_tensor_parallel, -1)
        return np.asarray(by_source.transpose(1, 0, 2), dtype=float)
    domain = np.repeat(out.layout.ep_domain[out.stage], out.layout.slots, axis=1)
    found = np.zeros((*tokens.shape[:2], int(domain.max()) + 1))
    for group, places in enumerate(domain):
        some = expected(tokens[group], out.layout.copies[layer], places, out.model.top_k)
        found[group, :, : some.shape[1]] = some
    return found


def _all_to_all(
    out: Builder, name: str, tokens: np.ndarray, distinct: np.ndarray | None, back: bool = False, **work: Any
) -> None:
    # With one member there is nothing to send, but its queue still receives.
    m = out.model
    wider = max(m.sent_as, out.d.experts.combine_format, key=FORMAT_BYTES.__getitem__)
    copies = Copies(m.hidden, m.sent_as, m.top_k, out.layout.copies.shape[1], wider)
    width = float(m.hidden * FORMAT_BYTES[copies.sent_as(back)])
    once = None if distinct is None else distinct * width
    size = tokens.astype(float) * width
    exchange = Exchange(
        "all_to_all",
        out.layout.groups.ep[out.stage],
        size,
        once,
        back,
        copies=copies,
    )
    out.add(name, exchange=exchange, **work)


def _among_sharers(out: Builder, name: str, kind: str, came: np.ndarray, width: float) -> None:
    """came int64[ETP, EP, slots]: tokens that came to each rank; width: bytes of a number."""
    if out.d.expert_tensor_parallel > 1:
        size = came.sum(axis=2).T * out.model.hidden * width
        out.exchange(name, kind, out.layout.groups.etp[out.stage], size)


def _serve(out: Builder, came: np.ndarray) -> None:
    """came int64[EP, slots]: all tokens of each copy, on every rank that shares it."""
    rows = np.repeat(came, out.d.expert_tensor_parallel, axis=0)
    even = float(rows.mean())
    if out.d.experts.start == "chunks":
        even = min(even, float(out.d.experts.chunk_tokens))
    if out.d.experts.service == "grouped":
        _expert(out, rows, even, slot=-1)
        return
    for slot in range(rows.shape[1]):
        for part in _chunks(out.d.experts, rows[:, slot : slot + 1]):
            _expert(out, part, even, slot=slot)


def _chunks(wish: Experts, rows: np.ndarray) -> list[np.ndarray]:
    """What is served together of the tokens int64[N, 1] of a copy on every rank: all, or chunks of them.

    Raises   ClustersimError where there would be too many
    """
    if wish.start != "chunks":
        return [rows]
    size, most = wish.chunk_tokens, int(rows.max())
    count = max(-(-most // size), 1)
    if count > MOST_CHUNKS:
        raise ClustersimError(
            f"deployment.experts.chunk_tokens: an expert with {most:,} tokens would be served in {count:,} "
            f"chunks of {size:,}, at most {MOST_CHUNKS} are simulated; {-(-most // MOST_CHUNKS):,} is enough"
        )
    return [np.clip(rows - at * size, 0, size) for at in range(count)]


def _expert(out: Builder, rows: np.ndarray, even: float, slot: int) -> None:
    """rows int64[N, g]: tokens of the g copies that a rank serves together; even: of any copy on average.

    A copy without tokens is not read, one with a single token is read whole.
    """
    m, form = out.model, out.expert_format
    inner = m.ffn // out.d.expert_tensor_parallel
    up = inner * (2 if m.ffn_kind == "gated" else 1)
    tokens, used = rows.sum(axis=1), (rows > 0).sum(axis=1)
    gated = float(m.ffn_kind == "gated")
    sizes = {"hidden": m.hidden, "inter": inner, "gated": gated, "top_k": m.top_k, "even_rows": even}

    def add(name: str, kernel: str, flop: Any, moved: Any) -> None:
        columns = {**out.call(kernel, form, **sizes).columns, "counts": rows.astype(float)}
        out.add(name, flop=flop, bytes=moved, call=Call(kernel, form, columns), slot=slot)

    def product(name: str, kernel: str, columns: int, depth: int) -> None:
        moved = FORMAT_BYTES[form] * (used * columns + tokens) * depth + WIDTH * tokens * columns
        add(name, kernel, 2.0 * tokens * columns * depth, moved)

    product("expert_gemm_1", "expert_up", up, m.hidden)
    add("expert_activation", "expert_activation", 0.0, WIDTH * tokens * (up + inner))
    product("expert_gemm_2", "expert_down", m.hidden, inner)


def _hand_over(out: Builder) -> None:
    """Every rank sends what it holds to its peer of the next stage, beside its next computation.

    All TP ranks hold the same. Where they scatter it, each sends its slice only, and the next
    stage begins with an all-gather.
    """
    here, there = out.layout.groups.stage[out.stage : out.stage + 2]
    scatters = _scatters(out, out.stage)
    held = out.load.slices if scatters else out.load.tokens
    size = held * out.model.hidden * WIDTH
    out.layer = -1
    pairs = np.stack([here, there], axis=1)
    how = "scatter_gather" if scatters else "direct"
    out.exchange("stage_transfer", "point_to_point", pairs, size, how, stream="transfer")


def _scatters(out: Builder, stage: int) -> bool:
    """Whether the TP ranks of a stage hand over a slice each.

    "auto" does so where that spares the network and costs NVLink only.

    Source   Megatron-LM: scatter/gather of tensors between pipeline stages
    """
    if out.d.tensor_parallel == 1:
        return False
    wish = out.d.algorithms.point_to_point
    if wish != AUTO:
        return wish == "scatter_gather"
    domain = out.layout.topology.domain
    here, there = out.layout.groups.stage[stage : stage + 2]
    together = not domains_of(out.layout.groups.tp[stage + 1], domain).any()
    return together and bool((domain[here] != domain[there]).any())


def _gather(out: Builder) -> None:
    """The slices that came from the stage before become whole on every TP rank."""
    parts = out.load.slices.reshape(-1, out.d.tensor_parallel) * out.model.hidden * WIDTH
    out.exchange("stage_all_gather", "all_gather", out.layout.groups.tp[out.stage], parts)


def _head(out: Builder) -> None:
    m, tp = out.model, out.d.tensor_parallel
    out.layer = -1
    out.norm("final_norm", m.hidden)
    position = np.tile(np.arange(tp), len(out.load.tokens) // tp)
    vocab = (m.vocab + tp - 1 - position) // tp
    out.gemm("lm_head", out.load.outputs, vocab, m.hidden, PLAIN)
    # Every rank draws from its own part of the vocabulary; who wins is a few bytes more.
    out.moves("sampling", "sampling", out.load.outputs, 2.0 * SCORE * out.load.outputs * vocab)
