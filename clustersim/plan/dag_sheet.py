"""What the forms of a drawing know while they draw: the stage, its GPUs in lanes, short ways to tensors."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from clustersim.plan.builder import WIDTH
from clustersim.plan.dag import COMMUNICATION, COMPUTATION, Dim, Node, Registers, Tensor, Wish
from clustersim.plan.layout import Layout
from clustersim.plan.stepgraph import Exchange, Operator, StepGraph

#: Name, size on each GPU (one number, or one for each GPU of the stage), size of all together.
Size = tuple[str, Any, float]


class Sheet:
    """The drawing under way: where in the StepGraph it is, and who holds what.

    stage, block  of what is drawn now
    ranks         int[N] of the stage
    lanes         (suffix of ids, int[n] places in `ranks`): shards drawn as one, or each by itself
    """

    def __init__(self, graph: StepGraph, layout: Layout, wish: Wish) -> None:
        self.graph, self.layout, self.wish = graph, layout, wish
        self.model, self.d = layout.model, layout.deployment
        self.tp = self.d.tensor_parallel
        self.registers = Registers()
        self.ranks: np.ndarray = graph.ranks[0]
        self.block = ""
        self.enter(0)

    def enter(self, stage: int) -> None:
        """Goes on with another stage; what the one before held is no longer needed."""
        if stage:
            self.registers.forget(self.ranks)
        self.stage = stage
        self.ranks = self.graph.ranks[stage]
        places = np.arange(len(self.ranks))
        self.lanes: list[tuple[str, np.ndarray]] = [("", places)]
        if self.wish.full and len(places) > self.tp:
            self.lanes = [(f".d{n}", shard) for n, shard in enumerate(places.reshape(-1, self.tp))]

    def tensor(
        self,
        name: str,
        at: np.ndarray,
        *sizes: Size,
        key: Hashable = None,
        numbers: Any = None,
        selects: bool = False,
    ) -> Tensor:
        """A tensor on the GPUs at these places of the stage.

        numbers  float64[n] where they are not the product of the sizes
        """
        columns = [np.asarray(local, dtype=float) for _, local, _ in sizes]
        local = [column[at] if column.ndim else np.full(len(at), column) for column in columns]
        dims = tuple(
            Dim(dim, float(each.min()), float(each.max()), float(whole))
            for (dim, _, whole), each in zip(sizes, local, strict=True)
        )
        found = np.prod(local, axis=0) if numbers is None else np.asarray(numbers, dtype=float)
        return Tensor(name, self.ranks[at], found, dims, key, selects)

    def hidden(
        self, name: str, at: np.ndarray, tokens: Any, whole: float | None = None, **how: Any
    ) -> Tensor:
        """Tokens as wide as the residual stream; whole: of all GPUs together, if not those of the pass."""
        every = self.graph.tokens if whole is None else whole
        return self.tensor(
            name, at, ("tokens", tokens, every), ("hidden", self.model.hidden, self.model.hidden), **how
        )

    def same(self, name: str, at: np.ndarray, scale: float = 1.0) -> Tensor:
        """A tensor as it lies there, for what works in place.

        scale  how much of it the operator says that it touches
        """
        ranks = self.ranks[at]
        numbers = self.registers.numbers(name, ranks) * scale
        held = Tensor(name, ranks, numbers, (), None)
        dims = next((given.dims for _, given in self.registers.holders(held)), ())
        return Tensor(name, ranks, numbers, dims)

    def node(
        self, index: int, op: Operator, title: str, suffix: str, at: np.ndarray,
        takes: Sequence[Tensor], gives: Sequence[Tensor], kind: str = "", share: Any = 1.0, **more: Any,
    ) -> Node:  # fmt: skip
        """A node that runs an operator on the GPUs at these places.

        share  of the operator's work on each of them
        """
        flop = float((op.flop[at] * share).sum())
        kind = kind or (COMPUTATION if op.exchange is None else COMMUNICATION)
        return Node(
            id=f"{self.place(op.layer, index)}.{op.name}{suffix}", title=title, kind=kind,
            operator=index, name=op.name,
            stage=self.stage, layer=op.layer, block=self.block, ranks=more.pop("ranks", self.ranks[at]),
            takes=tuple(takes), gives=tuple(gives), flop=flop, **more,
        )  # fmt: skip

    def view(
        self,
        name: str,
        title: str,
        layer: int,
        suffix: str,
        at: np.ndarray,
        takes: Sequence[Tensor],
        gives: Sequence[Tensor],
        kind: str,
    ) -> Node:
        """A node without a kernel: what is taken is only looked at in another way."""
        return Node(
            id=f"{self.place(layer)}.{name}{suffix}", title=title, kind=kind, operator=-1, name=name,
            stage=self.stage, layer=layer, block=self.block, ranks=self.ranks[at],
            takes=tuple(takes), gives=tuple(gives), note="no kernel",
        )  # fmt: skip

    def place(self, layer: int, index: int = -1) -> str:
        """How ids begin; an index keeps operators apart of which a layer has several of one name."""
        again = index >= 0 and layer >= 0 and self._several(index)
        return f"s{self.stage}" + (f".l{layer}" if layer >= 0 else "") + (f".o{index}" if again else "")

    def _several(self, index: int) -> bool:
        """Experts that are served one by one, or in chunks."""
        return self.graph.operators[index].slot >= 0

    def swapped(
        self,
        index: int,
        op: Operator,
        title: str,
        name: str,
        into: str,
        width: float,
        whole: float | None = None,
    ) -> list[Node]:
        """An exchange of tokens: one node, or one for each of its groups.

        name, into  what it takes and gives
        width       bytes of a number on the way
        whole       tokens of all GPUs together; left out: those of the pass
        """
        exchange = op.exchange
        assert exchange is not None
        taken, given = (
            numbers / self.model.hidden for numbers in before_and_after(exchange, self.ranks, width)
        )
        groups = exchange.groups
        several = self.wish.full and len(groups) > 1
        parts = [[n] for n in range(len(groups))] if several else [list(range(len(groups)))]
        found = []
        for part in parts:
            at = np.sort(np.searchsorted(self.ranks, groups[part].ravel()))
            found.append(
                self.node(
                    index, op, title, f".g{part[0]}" if several else "", at,
                    [self.hidden(name, at, taken, whole)], [self.hidden(into, at, given, whole)],
                    sent=float(exchange.size[part].sum()), note=said_groups(groups[part]),
                )
            )  # fmt: skip
        return found


def said_groups(groups: np.ndarray) -> str:
    """How many groups of how many."""
    if groups.shape[1] == 2 and len(groups) > 1:
        return f"{len(groups):,} pairs"
    return (
        f"{len(groups):,} groups of {groups.shape[1]:,}" if len(groups) > 1 else f"{groups.shape[1]:,} GPUs"
    )


def before_and_after(
    exchange: Exchange, ranks: np.ndarray, width: float = WIDTH
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers on each GPU of a stage before and after an exchange among them, float64[N] each.

    width  bytes of a number
    """
    size, groups = exchange.size / width, exchange.groups
    before, after = SHARES[exchange.kind](size, groups.shape)
    found = np.zeros((2, len(ranks)))
    places = np.searchsorted(ranks, groups)
    found[0][places], found[1][places] = before, after
    return found[0], found[1]


def _reduced(size: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    every = np.broadcast_to(size[:, None], shape)
    return every, every


def _gathered(size: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    return size, np.broadcast_to(size.sum(axis=1, keepdims=True), shape)


def _scattered(size: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    return np.broadcast_to(size.sum(axis=1, keepdims=True), shape), size


def _swapped(size: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    return size.sum(axis=2), size.sum(axis=1)


#: Kind of exchange → what each member holds before and after, from its sizes.
SHARES = {
    "all_reduce": _reduced,
    "broadcast": _reduced,
    "all_gather": _gathered,
    "reduce_scatter": _scattered,
    "all_to_all": _swapped,
}
