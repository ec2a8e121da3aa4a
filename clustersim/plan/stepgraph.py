"""The second paper: what must be done in one pass, as one list of operators, and its checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One GPU kernel that every rank of a stage runs.

    kernel   a key of KERNELS
    format   of the numbers that are multiplied, a key of spec.model.FORMAT_BYTES
    columns  float64[R] by the names that KERNELS gives the kernel; `counts` is float64[R, g]
    """

    kernel: str
    format: str
    columns: Mapping[str, np.ndarray]


_EXPERTS = ("counts", "even_rows", "hidden", "inter", "gated", "top_k")
_ATTENTION = ("sequences", "tokens", "pairs", "context", "heads", "kv_heads", "head_dim", "kv_bytes")
_MLA = (
    *("sequences", "tokens", "pairs", "context", "heads"),
    *("kv_rank", "rope_dim", "nope_dim", "v_dim", "kv_bytes"),
)
_MOVES = ("tokens", "bytes")

#: Kernel → the columns that say how large it is:
#: m, n, k        rows (tokens), columns and depth of a dense product
#: counts         tokens of each of the rank's g expert copies
#: even_rows      tokens of a copy if all of the layer had as many: what a library tunes for
#: hidden, inter  widths of the residual stream and, on this rank, of an expert
#: gated          1 where gate and up are one product twice as wide, else 0
#: top_k          experts of a token
#: sequences      of the rank's shard, and `tokens` that are new of all of them
#: pairs          query-key pairs under the causal mask, summed, per head
#: context        tokens whose keys and values are read, summed
#: heads, kv_heads, head_dim            on this rank
#: kv_rank, rope_dim, nope_dim, v_dim   widths of latent attention
#: kv_bytes       of one number of the KV cache
#: bytes          read from and written to HBM, over all tokens
KERNELS: dict[str, tuple[str, ...]] = {
    "gemm": ("m", "n", "k"),
    "expert_up": _EXPERTS,
    "expert_activation": _EXPERTS,
    "expert_down": _EXPERTS,
    "attention_prefill": _ATTENTION,
    "attention_decode": _ATTENTION,
    "mla_prefill": _MLA,
    "mla_decode": _MLA,
    "norm": _MOVES,
    "rotary": _MOVES,
    "activation": _MOVES,
    "residual": _MOVES,
    "embedding": _MOVES,
    "permute": _MOVES,
    "unpermute": _MOVES,
    "top_k": _MOVES,
    "sampling": _MOVES,
}


@dataclass(frozen=True, slots=True)
class Copies:
    """What an all-to-all among experts moves: copies of tokens.

    numbers      in a copy: the hidden dimension
    format       of a number on the way to the experts, a key of spec.model.FORMAT_BYTES
    top_k        copies of a token
    experts      places for experts in the layer
    back_format  of a number on the way back
    """

    numbers: int
    format: str
    top_k: int
    experts: int
    back_format: str = "bf16"

    def sent_as(self, back: bool) -> str:
        """The format of one direction."""
        return self.back_format if back else self.format


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """What ranks send to each other in one operator.

    kind       a key of plan.collectives.COLLECTIVES
    groups     int32[G, n] ranks; each rank in one group; point_to_point: sender and receiver
    size       bytes: float64[G] for all_reduce, broadcast and point_to_point, [G, n] for all_gather
               and reduce_scatter, [G, n, n] for all_to_all
    distinct   float64[G, n, D] bytes between each member and each NVLink domain of its group (numbered
               as plan.rounds.domains_of does), each token once; None where that is not known
    back       tokens come back: distinct counts what a member gets from each domain, not what it sends
    algorithm  the table entry it follows; "" for the one that the deployment names for its kind
    copies     what an all-to-all moves, if it is tokens to experts or back
    """

    kind: str
    groups: np.ndarray
    size: np.ndarray
    distinct: np.ndarray | None = None
    back: bool = False
    algorithm: str = ""
    copies: Copies | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Queue:
    """Tokens that a dispatch brings to expert copies.

    tokens   int64[G, n, C] tokens that member i of group g sends to copy c
    copies   int32[C] logical expert in each place; place c belongs to member c // slots
    slots    places per member
    """

    tokens: np.ndarray
    copies: np.ndarray
    slots: int


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """One node of a StepGraph, run by all ranks of a stage.

    stream   in-order queue of the GPU it stands in: compute or transfer
    after    indices of operators of the graph that must be done before, on the same rank (for the
             first operator of a stage: on the rank that sends to it)
    flop     float64[R] useful FLOP, in the order of the stage's ranks
    bytes    float64[R] HBM bytes read and written
    call     the kernel, or None where it is an exchange
    slot     expert slot it serves where experts are served one by one, else -1
    """

    name: str
    layer: int
    stage: int
    after: tuple[int, ...]
    flop: np.ndarray
    bytes: np.ndarray
    call: Call | None = None
    exchange: Exchange | None = None
    queue: Queue | None = None
    slot: int = -1
    stream: str = "compute"


@dataclass(frozen=True, slots=True, eq=False)
class StepGraph:
    """One batch's pass through all stages.

    operators  in an order in which they could run one after the other
    ranks      int32[S, N] ranks of each stage
    flop       what the model's closed form says the pass must do, over all ranks
    tokens     tokens of the batch; choices = tokens * top_k * layers
    dropped    choices for experts that were full; nobody serves them
    """

    operators: tuple[Operator, ...]
    ranks: np.ndarray
    flop: float
    tokens: int
    choices: int
    dropped: int = 0


def check(graph: StepGraph, gpus: int, experts: int) -> None:
    """Asserts the laws of a StepGraph; a failure is an error of ours, not of the user.

    Raises   AssertionError naming the law
    """
    assert sorted(graph.ranks.ravel().tolist()) == list(range(gpus)), "every GPU is assigned once"
    sums = 0.0
    queued = 0
    for index, op in enumerate(graph.operators):
        # Edges only point backwards in the list, so the graph has no cycle.
        assert all(0 <= before < index for before in op.after), f"{op.name}: an edge points forwards"
        sums += float(op.flop.sum())
        assert (op.call is None) != (op.exchange is None), f"{op.name}: neither kernel nor exchange"
        if op.call is not None:
            _check_call(op)
        if op.exchange is not None:
            _check_exchange(op, graph)
        if op.queue is not None:
            assert np.unique(op.queue.copies).size == experts, f"{op.name}: an expert stands nowhere"
            queued += int(op.queue.tokens.sum())
    assert np.isclose(sums, graph.flop, rtol=1e-9), f"FLOP sum {sums} is not the closed form {graph.flop}"
    assert graph.dropped >= 0, "more was sent to experts than tokens * top_k * layers"
    assert queued + graph.dropped == graph.choices, (
        f"{queued} tokens sent to experts and {graph.dropped} dropped, not tokens * top_k * layers"
    )


def _check_call(op: Operator) -> None:
    call = op.call
    assert call is not None
    assert set(call.columns) == set(KERNELS[call.kernel]), f"{op.name}: not the columns of {call.kernel}"
    for name, column in call.columns.items():
        assert column.shape[:1] == op.flop.shape, f"{op.name}: {name} does not hold for every rank"
        assert column.ndim == 1 + (name == "counts"), f"{op.name}: wrong shape of {name}"


def _check_exchange(op: Operator, graph: StepGraph) -> None:
    exchange = op.exchange
    assert exchange is not None
    members = exchange.groups if exchange.kind != "point_to_point" else exchange.groups[:, :1]
    here = graph.ranks[op.stage]
    assert np.array_equal(np.sort(members, axis=None), np.sort(here)), f"{op.name}: not seen by all ranks"
    g, n = exchange.groups.shape
    shapes = {
        "all_reduce": (g,),
        "broadcast": (g,),
        "point_to_point": (g,),
        "all_gather": (g, n),
        "reduce_scatter": (g, n),
        "all_to_all": (g, n, n),
    }
    assert exchange.size.shape == shapes[exchange.kind], f"{op.name}: wrong shape of sizes"
    assert (exchange.size >= 0).all(), f"{op.name}: negative bytes"
    if exchange.distinct is not None:
        assert exchange.distinct.shape[:2] == (g, n), f"{op.name}: wrong shape of distinct bytes"
        most = exchange.size.sum(axis=1 if exchange.back else 2, keepdims=True).reshape(g, n, 1)
        assert (exchange.distinct <= most * (1 + 1e-9)).all(), f"{op.name}: more distinct bytes than bytes"
    if op.name == "combine":
        dispatch = next(o for o in reversed(graph.operators) if _is_dispatch_of(o, op))
        assert dispatch.exchange is not None
        back = exchange.size.transpose(0, 2, 1)
        # Expert outputs may come back in a wider format: so many times as many bytes, everywhere.
        wider = back.sum() / max(dispatch.exchange.size.sum(), 1.0)
        assert np.allclose(dispatch.exchange.size * wider, back), "tokens dispatched are not those combined"


def _is_dispatch_of(candidate: Operator, combine: Operator) -> bool:
    return candidate.name == "dispatch" and candidate.layer == combine.layer
