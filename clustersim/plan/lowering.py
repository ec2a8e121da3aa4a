"""One batch on one replica → StepGraph: every layer of every stage, operator by operator.

Tokens of a shard are held by all its TP ranks through the attention. For the experts every TP rank
takes its own slice of them: it gates, dispatches and combines only that slice, and an all-gather
restores the whole. Ranks that share an expert (ETP) gather the tokens that came for any of them,
work on their columns and rows, and scatter the sums back. (Megatron-Core's MoE does the same.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from clustersim.plan.gating import expert_counts
from clustersim.plan.layout import Layout
from clustersim.plan.parameters import kv_heads_held, step_flop
from clustersim.plan.stepgraph import Exchange, Operator, Product, Queue, StepGraph, check
from clustersim.spec.batch import Batch
from clustersim.spec.model import FORMAT_BYTES
from clustersim.spec.scenario import Scenario


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """What the ranks of a stage have to do in one pass; N ranks per stage.

    tokens   int64[N] tokens of the rank's shard
    slices   int64[N] its own slice of them
    pairs    float64[N], context float64[N], outputs int64[N] as in Batch, of the rank's shard
    """

    tokens: np.ndarray
    slices: np.ndarray
    pairs: np.ndarray
    context: np.ndarray
    outputs: np.ndarray


def load_of(batch: Batch, layout: Layout) -> Load:
    """Batch per shard → load per rank of a stage."""
    tp = layout.deployment.tensor_parallel

    def each(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, tp)

    tokens = each(batch.tokens)
    position = np.tile(np.arange(tp), len(batch.tokens))
    return Load(
        tokens=tokens,
        slices=(tokens + tp - 1 - position) // tp,
        pairs=each(batch.pairs),
        context=each(batch.context),
        outputs=each(batch.outputs),
    )


def gated(batch: Batch, scenario: Scenario, layout: Layout, token_batch: int) -> np.ndarray:
    """Tokens of each source rank for each expert, int64[L, N, E]: what `lower` needs beside the batch."""
    slices = load_of(batch, layout).slices
    return expert_counts(slices, scenario.model, scenario.gating, scenario.seed, token_batch)


def lower(batch: Batch, counts: np.ndarray, layout: Layout) -> StepGraph:
    """Lowers one batch.

    counts   int64[L, N, E] tokens of each source rank for each expert
    Returns  a StepGraph that has passed its checks
    """
    model, d = layout.model, layout.deployment
    load = load_of(batch, layout)
    out = _Lowering(layout, load)
    for stage in range(d.pipeline_parallel):
        out.enter(stage)
        if stage == 0:
            out.embedding()
        for layer in range(stage * layout.layers_per_stage, (stage + 1) * layout.layers_per_stage):
            out.attention(layer)
            out.experts(layer, layout.tokens_per_copy(counts[layer], layer))
        if stage < d.pipeline_parallel - 1:
            out.hand_over()
        else:
            out.head()
    tokens = int(batch.tokens.sum())
    graph = StepGraph(
        operators=tuple(out.operators),
        ranks=layout.groups.stage,
        flop=step_flop(model, batch, d.tensor_parallel),
        tokens=tokens,
        choices=tokens * model.top_k * model.layers,
    )
    check(graph, len(layout.topology.gpus), model.experts)
    return graph


class _Lowering:
    """The list under construction; each method appends the operators of one part of a layer."""

    def __init__(self, layout: Layout, load: Load) -> None:
        self.layout = layout
        self.load = load
        self.model = layout.model
        self.d = layout.deployment
        self.width = FORMAT_BYTES[self.model.format]
        self.stage = 0
        self.layer = -1
        self.operators: list[Operator] = []
        self._before: tuple[int, ...] = ()

    def enter(self, stage: int) -> None:
        self.stage = stage
        self.layer = -1
        # A stage's first operator waits for the hand-over, which is the last one in the list.
        self._before = (len(self.operators) - 1,) if stage else ()

    def add(self, name: str, *, flop: Any = 0.0, bytes: Any = 0.0, **work: Any) -> None:
        ranks = len(self.load.tokens)
        self.operators.append(
            Operator(
                name=name,
                layer=self.layer,
                stage=self.stage,
                after=self._before,
                flop=np.broadcast_to(np.asarray(flop, dtype=float), (ranks,)),
                bytes=np.broadcast_to(np.asarray(bytes, dtype=float), (ranks,)),
                **work,
            )
        )
        self._before = (len(self.operators) - 1,)

    def product(self, name: str, rows: np.ndarray, columns: Any, depth: int, **work: Any) -> None:
        """One (or, with rows [N, g], one grouped) product with bf16-like reads and writes.

        An expert without tokens is not read; one with a single token is read whole.
        """
        rows = rows.reshape(len(rows), -1)
        wide = np.broadcast_to(np.asarray(columns, dtype=np.int64), (len(rows),))
        weights = (rows > 0).sum(axis=1) * wide * depth
        tokens = rows.sum(axis=1)
        self.add(
            name,
            flop=2.0 * tokens * wide * depth,
            bytes=float(self.width) * (weights + tokens * (depth + wide)),
            product=Product(rows, wide, depth),
            **work,
        )

    def elementwise(self, name: str, numbers: np.ndarray, **work: Any) -> None:
        """An operator that only moves `numbers` numbers through HBM."""
        self.add(name, bytes=float(self.width) * numbers, **work)

    def exchange(self, name: str, kind: str, groups: np.ndarray, size: np.ndarray, **work: Any) -> None:
        self.add(name, exchange=Exchange(kind, groups, size.astype(float)), **work)

    def embedding(self) -> None:
        self.elementwise("embedding", 2 * self.load.tokens * self.model.hidden)

    def attention(self, layer: int) -> None:
        self.layer = layer
        m, load, tp = self.model, self.load, self.d.tensor_parallel
        heads, kv = m.heads // tp, kv_heads_held(m, tp) // tp
        self.elementwise("attention_norm", 2 * load.tokens * m.hidden)
        self.product("qkv", load.tokens, (heads + 2 * kv) * m.head_dim, m.hidden)
        new = load.tokens * m.head_dim * (2 * heads + 2 * kv)
        self.add(
            "attention",
            flop=4.0 * heads * m.head_dim * load.pairs,
            bytes=FORMAT_BYTES[m.kv_format] * 2.0 * kv * m.head_dim * load.context + self.width * new,
        )
        self.product("attention_output", load.tokens, m.hidden, heads * m.head_dim)
        if tp > 1:
            groups = self.layout.groups.tp[self.stage]
            whole = load.tokens[::tp] * m.hidden * self.width
            self.exchange("attention_all_reduce", "all_reduce", groups, whole)
        self.elementwise("attention_residual", 3 * load.tokens * m.hidden)

    def experts(self, layer: int, tokens: np.ndarray) -> None:
        """tokens int64[ETP, EP, C]: from every source to every copy of this layer."""
        m, load, d = self.model, self.load, self.d
        self.elementwise("ffn_norm", 2 * load.tokens * m.hidden)
        self.product("gate", load.slices, m.experts, m.hidden)
        self.elementwise("permute", (1 + m.top_k) * load.slices * m.hidden)
        queue = Queue(tokens, self.layout.copies[layer], self.layout.slots)
        sent = tokens.reshape(*tokens.shape[:2], d.expert_parallel, self.layout.slots).sum(axis=3)
        self._all_to_all("dispatch", sent, queue=queue)
        came = tokens.sum(axis=1).reshape(len(tokens), d.expert_parallel, self.layout.slots)
        self._among_sharers("expert_all_gather", "all_gather", came)
        self._serve(came.sum(axis=0))
        self._among_sharers("expert_reduce_scatter", "reduce_scatter", came)
        self._all_to_all("combine", sent.transpose(0, 2, 1))
        self.elementwise("unpermute", (1 + m.top_k) * load.slices * m.hidden)
        tp = d.tensor_parallel
        if tp > 1:
            parts = load.slices.reshape(-1, tp) * m.hidden * self.width
            self.exchange("ffn_all_gather", "all_gather", self.layout.groups.tp[self.stage], parts)
        self.elementwise("ffn_residual", 3 * load.tokens * m.hidden)

    def _all_to_all(self, name: str, tokens: np.ndarray, **work: Any) -> None:
        # With one member there is nothing to send, but its queue still receives.
        size = tokens * self.model.hidden * self.width
        self.exchange(name, "all_to_all", self.layout.groups.ep[self.stage], size, **work)

    def _among_sharers(self, name: str, kind: str, came: np.ndarray) -> None:
        """came int64[ETP, EP, slots]: tokens that came to each rank."""
        if self.d.expert_tensor_parallel > 1:
            size = came.sum(axis=2).T * self.model.hidden * self.width
            self.exchange(name, kind, self.layout.groups.etp[self.stage], size)

    def _serve(self, came: np.ndarray) -> None:
        """came int64[EP, slots]: all tokens of each copy, on every rank that shares it."""
        rows = np.repeat(came, self.d.expert_tensor_parallel, axis=0)
        if self.d.experts.service == "grouped":
            self._expert(rows, slot=-1)
            return
        for slot in range(rows.shape[1]):
            self._expert(rows[:, slot : slot + 1], slot=slot)

    def _expert(self, rows: np.ndarray, slot: int) -> None:
        m = self.model
        inner = m.ffn // self.d.expert_tensor_parallel
        up = inner * (2 if m.ffn_kind == "gated" else 1)
        self.product("expert_gemm_1", rows, up, m.hidden, slot=slot)
        self.elementwise("expert_activation", rows.sum(axis=1) * (up + inner), slot=slot)
        self.product("expert_gemm_2", rows, m.hidden, inner, slot=slot)

    def hand_over(self) -> None:
        """Every rank sends what it holds to its peer of the next stage, beside its next computation."""
        here, there = self.layout.groups.stage[self.stage : self.stage + 2]
        size = self.load.tokens * self.model.hidden * self.width
        self.layer = -1
        pairs = np.stack([here, there], axis=1)
        self.exchange("stage_transfer", "point_to_point", pairs, size, stream="transfer")

    def head(self) -> None:
        m, tp = self.model, self.d.tensor_parallel
        self.layer = -1
        self.elementwise("final_norm", 2 * self.load.tokens * m.hidden)
        position = np.tile(np.arange(tp), len(self.load.tokens) // tp)
        self.product("lm_head", self.load.outputs, (m.vocab + tp - 1 - position) // tp, m.hidden)
