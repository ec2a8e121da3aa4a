"""A StepGraph under construction: the load of every rank, and operators appended one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from clustersim.plan.layout import Layout
from clustersim.plan.stepgraph import Call, Exchange, Operator
from clustersim.spec.batch import Batch
from clustersim.spec.formats import multiplied_as
from clustersim.spec.model import FORMAT_BYTES, PLAIN

#: Bytes of a number of the residual stream and of whatever operators hand to each other.
WIDTH = FORMAT_BYTES[PLAIN]


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """What the ranks of a stage have to do in one pass; N ranks per stage.

    batch      the pass per shard
    sequences  int64[N] of the rank's shard, as are all that follow
    tokens     int64[N] tokens of the rank's shard
    slices     int64[N] its own slice of them
    pairs      float64[N], context float64[N], outputs int64[N], near_pairs, near_context as in Batch
    """

    batch: Batch
    sequences: np.ndarray
    tokens: np.ndarray
    slices: np.ndarray
    pairs: np.ndarray
    context: np.ndarray
    outputs: np.ndarray
    near_pairs: np.ndarray
    near_context: np.ndarray


def load_of(batch: Batch, layout: Layout) -> Load:
    """Batch per shard → load per rank of a stage."""
    tp = layout.deployment.tensor_parallel

    def each(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, tp)

    tokens = each(batch.tokens)
    position = np.tile(np.arange(tp), len(batch.tokens))
    return Load(
        batch=batch,
        sequences=each(batch.sequences),
        tokens=tokens,
        slices=(tokens + tp - 1 - position) // tp,
        pairs=each(batch.pairs),
        context=each(batch.context),
        outputs=each(batch.outputs),
        near_pairs=each(batch.near_pairs),
        near_context=each(batch.near_context),
    )


class Builder:
    """The list under construction. An operator waits for the one before it.

    stage, layer  of the operators that are added; layer -1 outside of layers
    format        in which matrices of attention and dense networks are multiplied on these GPUs
    expert_format the same of the routed experts
    """

    def __init__(self, layout: Layout, load: Load) -> None:
        self.layout = layout
        self.load = load
        self.model = layout.model
        self.d = layout.deployment
        gpu = layout.topology.gpu
        self.format = multiplied_as(gpu, layout.model.format)
        self.expert_format = multiplied_as(gpu, layout.model.expert_numbers)
        self.stage = 0
        self.layer = -1
        self.operators: list[Operator] = []
        self._before: tuple[int, ...] = ()

    def enter(self, stage: int) -> None:
        """Goes on with another stage."""
        self.stage = stage
        self.layer = -1
        # A stage's first operator waits for the hand-over, which is the last one in the list.
        self._before = (len(self.operators) - 1,) if stage else ()

    def add(self, name: str, *, flop: Any = 0.0, bytes: Any = 0.0, **work: Any) -> None:
        """Appends an operator; flop and bytes are one number for all ranks, or one for each."""
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
        """A kernel whose columns are one number for all ranks, or one for each."""
        return Call(kernel, fmt, {name: self._each(values) for name, values in columns.items()})

    def gemm(self, name: str, rows: np.ndarray, columns: Any, depth: int, fmt: str, read: Any = None) -> None:
        """A dense product: tokens [N, depth] times weights [depth, columns]. Without tokens none is read.

        read     numbers of a token that are read; depth, but for products by head, which read theirs
        """
        weights = (rows > 0) * columns * depth
        taken = rows * (depth if read is None else read)
        self.add(
            name,
            flop=2.0 * rows * columns * depth,
            bytes=FORMAT_BYTES[fmt] * (weights + taken) + WIDTH * rows * columns,
            call=self.call("gemm", fmt, m=rows, n=columns, k=depth),
        )

    def moves(self, name: str, kernel: str, tokens: np.ndarray, bytes: Any, **work: Any) -> None:
        """A kernel that only moves bytes through HBM."""
        self.add(name, bytes=bytes, call=self.call(kernel, PLAIN, tokens=tokens, bytes=bytes), **work)

    def norm(self, name: str, width: int) -> None:
        """A root-mean-square norm over `width` numbers of every token: read and written once."""
        self.moves(name, "norm", self.load.tokens, 2 * WIDTH * self.load.tokens * width)

    def residual(self, name: str, tokens: np.ndarray) -> None:
        """Two summands are read, their sum is written."""
        self.moves(name, "residual", tokens, 3 * WIDTH * tokens * self.model.hidden)

    def network(self, name: str, tokens: np.ndarray, width: int) -> None:
        """A dense feed-forward network of inner width `width` on this rank: up, activation, down."""
        up = width * (2 if self.model.ffn_kind == "gated" else 1)
        self.gemm(f"{name}_up", tokens, up, self.model.hidden, self.format)
        self.moves(f"{name}_activation", "activation", tokens, WIDTH * tokens * (up + width))
        self.gemm(f"{name}_down", tokens, self.model.hidden, width, self.format)

    def exchange(
        self, name: str, kind: str, groups: np.ndarray, size: np.ndarray, algorithm: str = "", **work: Any
    ) -> None:
        """Appends what ranks send each other; arguments as of Exchange."""
        exchange = Exchange(kind, groups, size.astype(float), algorithm=algorithm)
        self.add(name, exchange=exchange, **work)

    def all_reduce(self, name: str) -> None:
        """The TP ranks of a shard add up what each has of its tokens."""
        tp = self.d.tensor_parallel
        if tp > 1:
            groups = self.layout.groups.tp[self.stage]
            self.exchange(name, "all_reduce", groups, self.load.tokens[::tp] * self.model.hidden * WIDTH)
