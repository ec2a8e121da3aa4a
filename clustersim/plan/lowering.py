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

from clustersim.plan.collectives import AUTO
from clustersim.plan.distinct import expected
from clustersim.plan.gating import distinct_tokens, expert_counts
from clustersim.plan.layout import Layout
from clustersim.plan.parameters import kv_heads_held, step_flop
from clustersim.plan.rounds import domains_of
from clustersim.plan.stepgraph import Call, Copies, Exchange, Operator, Queue, StepGraph, check
from clustersim.spec.batch import Batch
from clustersim.spec.model import FORMAT_BYTES
from clustersim.spec.scenario import Scenario

#: Bytes of a router's score and of a logit: fp32, as vLLM, SGLang and Megatron-Core keep them.
SCORE = 4.0
#: Bytes that say where a token goes and how much that counts: an int32 and an fp32.
CHOICE = 8.0


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """What the ranks of a stage have to do in one pass; N ranks per stage.

    phase      prefill or decode
    sequences  int64[N] of the rank's shard
    tokens     int64[N] tokens of the rank's shard
    slices     int64[N] its own slice of them
    pairs      float64[N], context float64[N], outputs int64[N] as in Batch, of the rank's shard
    """

    phase: str
    sequences: np.ndarray
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
        phase=batch.phase,
        sequences=each(batch.sequences),
        tokens=tokens,
        slices=(tokens + tp - 1 - position) // tp,
        pairs=each(batch.pairs),
        context=each(batch.context),
        outputs=each(batch.outputs),
    )


def gated(
    batch: Batch, scenario: Scenario, layout: Layout, token_batch: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """What `lower` needs beside the batch.

    Returns  int64[L, N, E] tokens of each source rank for each expert; int64[L, N, D] of its tokens for
             each NVLink domain, each counted once, or None where nobody asks or nobody knows
    """
    about = load_of(batch, layout).slices, scenario.model, scenario.gating, scenario.seed, token_batch
    counts = expert_counts(*about)
    # With several copies of an expert nobody says which token goes to which.
    if not layout.deduplicates or layout.copies.shape[1] > scenario.model.experts:
        return counts, None
    return counts, distinct_tokens(*about, _homes(layout))


def _homes(layout: Layout) -> np.ndarray:
    """int64[L, N, E] NVLink domain of the one copy of every expert, as the source's EP group numbers it."""
    holder = np.argsort(layout.copies, axis=1) // layout.slots
    stage = np.arange(len(holder)) // layout.layers_per_stage
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
    out = _Lowering(layout, load)
    for stage in range(d.pipeline_parallel):
        out.enter(stage)
        if stage == 0:
            out.embedding()
        elif out.scatters(stage - 1):
            out.gather()
        for layer in range(stage * layout.layers_per_stage, (stage + 1) * layout.layers_per_stage):
            out.attention(layer)
            out.experts(
                layer,
                layout.tokens_per_copy(counts[layer], layer),
                None if distinct is None else distinct[layer],
            )
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
        self.operators.append(
            Operator(
                name=name,
                layer=self.layer,
                stage=self.stage,
                after=self._before,
                flop=self._each(flop),
                bytes=self._each(bytes),
                **work,
            )
        )
        self._before = (len(self.operators) - 1,)

    def _each(self, values: Any) -> np.ndarray:
        """float64[N] from a number for all ranks or one for each."""
        return np.broadcast_to(np.asarray(values, dtype=float), self.load.tokens.shape)

    def call(self, kernel: str, fmt: str, **columns: Any) -> Call:
        return Call(kernel, fmt, {name: self._each(values) for name, values in columns.items()})

    def gemm(self, name: str, rows: np.ndarray, columns: Any, depth: int) -> None:
        """A dense product: tokens [N, depth] times weights [depth, columns]. Without tokens none is read."""
        call = self.call("gemm", self.model.format, m=rows, n=columns, k=depth)
        weights = (rows > 0) * columns * depth
        self.add(
            name,
            flop=2.0 * rows * columns * depth,
            bytes=float(self.width) * (weights + rows * (depth + columns)),
            call=call,
        )

    def moves(self, name: str, kernel: str, tokens: np.ndarray, bytes: Any, **work: Any) -> None:
        """A kernel that only moves bytes through HBM."""
        call = self.call(kernel, self.model.format, tokens=tokens, bytes=bytes)
        self.add(name, bytes=bytes, call=call, **work)

    def norm(self, name: str, width: int) -> None:
        """A root-mean-square norm over `width` numbers of every token: read and written once."""
        self.moves(name, "norm", self.load.tokens, 2.0 * self.width * self.load.tokens * width)

    def residual(self, name: str) -> None:
        """Two summands are read, their sum is written."""
        bytes = 3.0 * self.width * self.load.tokens * self.model.hidden
        self.moves(name, "residual", self.load.tokens, bytes)

    def exchange(
        self, name: str, kind: str, groups: np.ndarray, size: np.ndarray, algorithm: str = "", **work: Any
    ) -> None:
        exchange = Exchange(kind, groups, size.astype(float), algorithm=algorithm)
        self.add(name, exchange=exchange, **work)

    def embedding(self) -> None:
        bytes = 2.0 * self.width * self.load.tokens * self.model.hidden
        self.moves("embedding", "embedding", self.load.tokens, bytes)

    def attention(self, layer: int) -> None:
        self.layer = layer
        m, load, tp = self.model, self.load, self.d.tensor_parallel
        heads, kv = m.heads // tp, kv_heads_held(m, tp) // tp
        self.norm("attention_norm", m.hidden)
        self.gemm("qkv", load.tokens, (heads + 2 * kv) * m.head_dim, m.hidden)
        turned = 2.0 * self.width * load.tokens * (heads + kv) * m.head_dim
        self.moves("rotary", "rotary", load.tokens, turned)
        new = load.tokens * m.head_dim * (2 * heads + 2 * kv)
        kv_bytes = FORMAT_BYTES[m.kv_format]
        self.add(
            "attention",
            flop=4.0 * heads * m.head_dim * load.pairs,
            bytes=kv_bytes * 2.0 * kv * m.head_dim * load.context + self.width * new,
            call=self.call(
                f"attention_{load.phase}",
                m.format,
                sequences=load.sequences,
                tokens=load.tokens,
                pairs=load.pairs,
                context=load.context,
                heads=heads,
                kv_heads=kv,
                head_dim=m.head_dim,
                kv_bytes=kv_bytes,
            ),
        )
        self.gemm("attention_output", load.tokens, m.hidden, heads * m.head_dim)
        if tp > 1:
            groups = self.layout.groups.tp[self.stage]
            whole = load.tokens[::tp] * m.hidden * self.width
            self.exchange("attention_all_reduce", "all_reduce", groups, whole)
        self.residual("attention_residual")

    def experts(self, layer: int, tokens: np.ndarray, distinct: np.ndarray | None) -> None:
        """Tokens go to their experts and come back.

        tokens    int64[ETP, EP, C] from every source to every copy of this layer
        distinct  int64[N, D] of every source for every NVLink domain, each once; None if not known
        """
        m, load, d = self.model, self.load, self.d
        self.norm("ffn_norm", m.hidden)
        self.gemm("gate", load.slices, m.experts, m.hidden)
        self.moves("top_k", "top_k", load.slices, load.slices * (SCORE * m.experts + CHOICE * m.top_k))
        sorted_ = float(self.width) * (1 + m.top_k) * load.slices * m.hidden
        self.moves("permute", "permute", load.slices, sorted_)
        queue = Queue(tokens, self.layout.copies[layer], self.layout.slots)
        sent = tokens.reshape(*tokens.shape[:2], d.expert_parallel, self.layout.slots).sum(axis=3)
        once = self._distinct(layer, tokens, distinct) if self.layout.deduplicates else None
        self._all_to_all("dispatch", sent, once, queue=queue)
        came = tokens.sum(axis=1).reshape(len(tokens), d.expert_parallel, self.layout.slots)
        self._among_sharers("expert_all_gather", "all_gather", came)
        self._serve(came.sum(axis=0))
        self._among_sharers("expert_reduce_scatter", "reduce_scatter", came)
        self._all_to_all("combine", sent.transpose(0, 2, 1), once, back=True)
        self.moves("unpermute", "unpermute", load.slices, sorted_)
        tp = d.tensor_parallel
        if tp > 1:
            parts = load.slices.reshape(-1, tp) * m.hidden * self.width
            self.exchange("ffn_all_gather", "all_gather", self.layout.groups.tp[self.stage], parts)
        self.residual("ffn_residual")

    def _distinct(self, layer: int, tokens: np.ndarray, known: np.ndarray | None) -> np.ndarray:
        """float64[ETP, EP, D] tokens of every source for every domain, each once. Arguments as above."""
        if known is not None:
            by_source = known.reshape(self.d.expert_parallel, self.d.expert_tensor_parallel, -1)
            return np.asarray(by_source.transpose(1, 0, 2), dtype=float)
        domain = np.repeat(self.layout.ep_domain[self.stage], self.layout.slots, axis=1)
        found = np.zeros((*tokens.shape[:2], int(domain.max()) + 1))
        for group, places in enumerate(domain):
            some = expected(tokens[group], self.layout.copies[layer], places, self.model.top_k)
            found[group, :, : some.shape[1]] = some
        return found

    def _all_to_all(
        self, name: str, tokens: np.ndarray, distinct: np.ndarray | None, back: bool = False, **work: Any
    ) -> None:
        # With one member there is nothing to send, but its queue still receives.
        m = self.model
        wider = max(m.format, self.d.experts.combine_format, key=FORMAT_BYTES.__getitem__)
        copies = Copies(m.hidden, m.format, m.top_k, self.layout.copies.shape[1], wider)
        width = float(m.hidden * FORMAT_BYTES[copies.sent_as(back)])
        once = None if distinct is None else distinct * width
        size = tokens.astype(float) * width
        exchange = Exchange(
            "all_to_all",
            self.layout.groups.ep[self.stage],
            size,
            once,
            back,
            copies=copies,
        )
        self.add(name, exchange=exchange, **work)

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
        """rows int64[N, g]: tokens of the g copies that a rank serves together."""
        m = self.model
        inner = m.ffn // self.d.expert_tensor_parallel
        up = inner * (2 if m.ffn_kind == "gated" else 1)
        tokens = rows.sum(axis=1)
        self._grouped("expert_gemm_1", "expert_up", rows, up, m.hidden, slot)
        activated = float(self.width) * tokens * (up + inner)
        self.moves("expert_activation", "activation", tokens, activated, slot=slot)
        self._grouped("expert_gemm_2", "expert_down", rows, m.hidden, inner, slot)

    def _grouped(self, name: str, kernel: str, rows: np.ndarray, columns: int, depth: int, slot: int) -> None:
        """One product per copy, all in one kernel. A copy without tokens is not read, one with a single
        token is read whole."""
        m = self.model
        sizes = self.call(
            kernel,
            m.format,
            hidden=m.hidden,
            inter=m.ffn // self.d.expert_tensor_parallel,
            gated=float(m.ffn_kind == "gated"),
            top_k=m.top_k,
        )
        tokens = rows.sum(axis=1)
        self.add(
            name,
            flop=2.0 * tokens * columns * depth,
            bytes=float(self.width) * ((rows > 0).sum(axis=1) * columns * depth + tokens * (depth + columns)),
            call=Call(sizes.kernel, sizes.format, {**sizes.columns, "counts": rows.astype(float)}),
            slot=slot,
        )

    def hand_over(self) -> None:
        """Every rank sends what it holds to its peer of the next stage, beside its next computation.

        All TP ranks hold the same. Where they scatter it, each sends its slice only, and the next
        stage begins with an all-gather.
        """
        here, there = self.layout.groups.stage[self.stage : self.stage + 2]
        scatters = self.scatters(self.stage)
        held = self.load.slices if scatters else self.load.tokens
        size = held * self.model.hidden * self.width
        self.layer = -1
        pairs = np.stack([here, there], axis=1)
        how = "scatter_gather" if scatters else "direct"
        self.exchange("stage_transfer", "point_to_point", pairs, size, how, stream="transfer")

    def scatters(self, stage: int) -> bool:
        """Whether the TP ranks of a stage hand over a slice each.

        "auto" does so where that spares the network and costs NVLink only.

        Source   Megatron-LM: scatter/gather of tensors between pipeline stages
        """
        if self.d.tensor_parallel == 1:
            return False
        wish = self.d.algorithms.point_to_point
        if wish != AUTO:
            return wish == "scatter_gather"
        domain = self.layout.topology.domain
        here, there = self.layout.groups.stage[stage : stage + 2]
        together = not domains_of(self.layout.groups.tp[stage + 1], domain).any()
        return together and bool((domain[here] != domain[there]).any())

    def gather(self) -> None:
        """The slices that came from the stage before become whole on every TP rank."""
        parts = self.load.slices.reshape(-1, self.d.tensor_parallel) * self.model.hidden * self.width
        self.exchange("stage_all_gather", "all_gather", self.layout.groups.tp[self.stage], parts)

    def head(self) -> None:
        m, tp = self.model, self.d.tensor_parallel
        self.layer = -1
        self.norm("final_norm", m.hidden)
        position = np.tile(np.arange(tp), len(self.load.tokens) // tp)
        vocab = (m.vocab + tp - 1 - position) // tp
        self.gemm("lm_head", self.load.outputs, vocab, m.hidden)
        # Every rank draws from its own part of the vocabulary; who wins is a few bytes more.
        self.moves("sampling", "sampling", self.load.outputs, 2.0 * SCORE * self.load.outputs * vocab)
