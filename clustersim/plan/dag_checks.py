"""Whether a drawing is sound, and shows what runs: the validation list of the documents, and a little more.

An `Inspection` looks at nodes and edges as they come, so that it can be laid over any drawing; `verdicts`
says what it found. Everything is held against the StepGraph and the layout, never against the drawing itself.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

import networkx as nx
import numpy as np

from clustersim.plan.dag import END, Edge, Node, Part, Tensor
from clustersim.plan.layout import Layout
from clustersim.plan.stepgraph import StepGraph

#: Numbers are whole but for shared heads and formats; this is rounding.
_ROUNDING = 1e-6
#: Faults of a kind that are named one by one.
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line of the validation list.

    check  what was looked at
    good   whether it holds
    found  in words, with numbers
    """

    check: str
    good: bool
    found: str


class _Balance:
    """Whether what is carried to, or from, a tensor is all of it, GPU by GPU."""

    def __init__(self) -> None:
        self._open: dict[Hashable, tuple[Tensor, np.ndarray, str]] = {}

    def expect(self, key: Hashable, tensor: Tensor, who: str) -> None:
        """A tensor of which every number has to be carried."""
        self._open.setdefault(key, (tensor, np.zeros(len(tensor.ranks)), who))

    def knows(self, key: Hashable) -> bool:
        """Whether such a tensor is expected."""
        return key in self._open

    def carry(self, key: Hashable, ranks: np.ndarray, numbers: np.ndarray) -> None:
        """So much of it goes along an edge on these GPUs."""
        tensor, carried, _ = self._open[key]
        carried[np.searchsorted(tensor.ranks, ranks)] += numbers

    def close(self) -> Iterator[str]:
        """Who got too much or too little; begins anew."""
        for tensor, carried, who in self._open.values():
            off = np.abs(carried - tensor.numbers)
            if (off > _ROUNDING * (1 + tensor.numbers)).any():
                at = int(np.argmax(off))
                yield (
                    f"{who}: {carried[at]:,g} numbers of {tensor.name} on GPU {tensor.ranks[at]}, "
                    f"not {tensor.numbers[at]:,g}"
                )
        self._open = {}


class Inspection:
    """Follows a drawing and remembers what its checks need.

    nodes, edges  how many came
    """

    def __init__(self, graph: StepGraph, layout: Layout) -> None:
        self._graph, self._layout = graph, layout
        self.nodes = self.edges = 0
        self._number: dict[str, int] = {}
        self._links: list[tuple[int, int]] = []
        self._ends: dict[str, str] = {}
        self._twice: list[str] = []
        self._faults: dict[str, list[str]] = defaultdict(list)
        self._by_rank: dict[int, Counter[int]] = defaultdict(Counter)
        self._flop: Counter[int] = Counter()
        self._sent: Counter[int] = Counter()
        self._heads: dict[int, Counter[tuple[int, int]]] = defaultdict(Counter)
        self._copies: dict[tuple[int, str], Counter[int]] = defaultdict(Counter)
        self._experts: dict[int, set[int]] = defaultdict(set)
        self._outside: list[str] = []
        self._into, self._out = _Balance(), _Balance()
        self._node: Node | None = None

    def look(self, parts: Iterable[Part]) -> Inspection:
        """Follows a whole drawing."""
        for part in parts:
            if isinstance(part, Node):
                self.node(part)
            else:
                self.edge(part)
        self._close_layer()
        return self

    def node(self, node: Node) -> None:
        """A node comes before all edges that lead to it."""
        if self._node is not None and (self._node.layer, self._node.stage) != (node.layer, node.stage):
            self._close_layer()
        self._node = node
        self.nodes += 1
        if node.id in self._number:
            self._twice.append(node.id)
        self._number[node.id] = self.nodes - 1
        if node.kind == END:
            self._ends[node.id] = node.name
        for taken in node.takes:
            self._into.expect((node.id, taken.name), taken, node.id)
        self._assigned(node)
        if node.operator >= 0:
            self._worked(node)

    def _assigned(self, node: Node) -> None:
        allowed = self._graph.ranks[node.stage]
        if node.name == "stage_transfer":
            allowed = self._graph.ranks[node.stage : node.stage + 2].ravel()
        if not len(node.ranks) or node.ranks.min() < allowed[0] or node.ranks.max() > allowed[-1]:
            self._outside.append(node.id)

    def _worked(self, node: Node) -> None:
        self._flop[node.operator] += node.flop  # type: ignore[assignment]
        self._sent[node.operator] += node.sent  # type: ignore[assignment]
        here = self._graph.ranks[node.stage]
        op = self._graph.operators[node.operator]
        self._by_rank[node.operator].update(
            rank for rank in node.ranks.tolist() if here[0] <= rank <= here[-1]
        )
        if op.name == "attention":
            shards = {rank // self._layout.deployment.tensor_parallel for rank in node.ranks.tolist()}
            self._heads[node.operator].update((shard, head) for shard in shards for head in node.members)
        if op.name in _EXPERT_PARTS:
            self._copies[op.layer, op.name].update(node.members)
            self._experts[op.layer].update(node.experts)

    def edge(self, edge: Edge) -> None:
        """An edge comes after both of its ends."""
        self.edges += 1
        source, target = (self._number.get(end, -1) for end in (edge.source, edge.target))
        if source < 0 or target < 0:
            self._faults["dangling"].append(f"{edge.source} -> {edge.target}")
            return
        self._links.append((source, target))
        given, taken = edge.given, edge.taken
        ranks, at_given, at_taken = _common(given.ranks, taken.ranks)
        if not len(ranks):
            self._faults["dimensions"].append(f"{edge.source} -> {edge.target}: no GPU has both ends")
            return
        # Of a whole that is parted what is taken counts, of parts that come together what is given.
        numbers = (
            taken.numbers[at_taken]
            if given.key is None and taken.key is not None
            else given.numbers[at_given]
        )
        if (
            self._node is None
            or self._node.id != edge.target
            or not self._into.knows((edge.target, taken.name))
        ):
            self._faults["dimensions"].append(
                f"{edge.source} -> {edge.target}: {taken.name} is not asked for"
            )
            return
        out = (edge.source, given.name, id(given), self._node.name)
        self._out.expect(out, given, f"{edge.source} -> {self._node.name}")
        self._out.carry(out, ranks, numbers)
        self._into.carry((edge.target, taken.name), ranks, numbers)
        if (
            given.key == taken.key
            and len(given.ranks) == len(taken.ranks) == len(ranks)
            and not _alike(given, taken)
        ):
            self._faults["dimensions"].append(
                f"{edge.source} -> {edge.target}: {given.name} is not as large in all"
            )

    def _close_layer(self) -> None:
        self._faults["dimensions"] += [*self._into.close(), *self._out.close()]

    # ---- what it found ----------------------------------------------------------------------------

    def verdicts(self) -> list[Verdict]:
        """The whole list, of a drawing that has come to its end."""
        return [check(self) for check in CHECKS]

    def no_cycles(self) -> Verdict:
        """No way leads back to where it began."""
        graph = nx.DiGraph(self._links)
        cyclic = not nx.is_directed_acyclic_graph(graph)
        said = "a cycle through " + str(nx.find_cycle(graph)[0][0]) if cyclic else "none"
        twice = f"; ids that occur twice: {_named(self._twice)}" if self._twice else ""
        return Verdict("no cycles", not cyclic and not self._twice, f"{said} in {self.edges:,} edges{twice}")

    def connected(self) -> Verdict:
        """All but the input is led to, all but the output leads on, and there is one piece."""
        came, went = np.zeros(self.nodes, dtype=bool), np.zeros(self.nodes, dtype=bool)
        for source, target in self._links:
            went[source] = came[target] = True
        names = list(self._number)
        first = [name for name, end in self._ends.items() if end == "input"]
        last = [name for name, end in self._ends.items() if end == "output"]
        loose = [n for n, c in zip(names, came, strict=False) if not c and n not in first]
        loose += [n for n, w in zip(names, went, strict=False) if not w and n not in last]
        pieces = nx.number_weakly_connected_components(nx.DiGraph(self._links)) if self._links else 0
        good = not loose and not self._faults["dangling"] and pieces == 1 and len(first) == len(last) == 1
        many = "" if pieces == 1 else "s"
        said = (
            f"{self.nodes:,} nodes in {pieces} piece{many}; all but input and output lead on and are led to"
        )
        return Verdict(
            "connectivity",
            good,
            said if good else f"loose: {_named(loose + self._faults['dangling'])}; {pieces} pieces",
        )

    def expert_coverage(self) -> Verdict:
        """Every logical expert of every layer with experts, every copy once in each of its kernels."""
        model, copies = self._layout.model, self._layout.copies
        layers = [layer for layer in range(model.layers) if model.has_experts(layer)]
        wrong = []
        for layer in layers:
            if self._experts[layer] != set(range(model.experts)):
                wrong.append(f"layer {layer}: {len(self._experts[layer])} of {model.experts} experts")
            for part in _EXPERT_PARTS:
                times = self._times(layer, part)
                if set(self._copies[layer, part]) != set(range(copies.shape[1])) or set(
                    self._copies[layer, part].values()
                ) - {times}:
                    wrong.append(f"layer {layer}: {part} does not stand for every copy once")
        if not layers:
            return Verdict("expert coverage", not self._experts, "the model has no experts")
        places = f" in {copies.shape[1]:,} places" if copies.shape[1] != model.experts else ""
        said = f"{model.experts:,} experts{places} in each of {len(layers)} layers"
        return Verdict("expert coverage", not wrong, _named(wrong) if wrong else said)

    def _times(self, layer: int, part: str) -> int:
        """How often a copy occurs: once, or once in each chunk of its tokens."""
        slots = [op.slot for op in self._graph.operators if op.layer == layer and op.name == part]
        return len(slots) // len(set(slots))

    def head_decomposition(self) -> Verdict:
        """Every head of every shard in every layer once."""
        model, d = self._layout.model, self._layout.deployment
        expected = model.heads * d.data_parallel
        wrong = [
            f"layer {self._graph.operators[index].layer}: {len(heads):,} of {expected:,}"
            for index, heads in self._heads.items()
            if len(heads) != expected or set(heads.values()) != {1}
        ]
        missing = model.layers - len(self._heads)
        wrong += [f"{missing} layers have none"] if missing else []
        shards = f" of each of {d.data_parallel:,} shards" if d.data_parallel > 1 else ""
        each = model.heads // d.tensor_parallel
        said = f"{model.heads} heads{shards} in each of {model.layers} layers, {each} on a GPU"
        return Verdict("head decomposition", not wrong, _named(wrong) if wrong else said)

    def gpu_assignment(self) -> Verdict:
        """Every node on GPUs of its stage, every operator on all of them, every GPU somewhere."""
        wrong = [f"{name} is not on GPUs of its stage" for name in self._outside]
        used: set[int] = set()
        for index, op in enumerate(self._graph.operators):
            on = self._by_rank[index]
            used.update(on)
            if set(on) != set(self._graph.ranks[op.stage].tolist()):
                wrong.append(f"{op.name} of layer {op.layer} is drawn on {len(on)} of its GPUs")
        gpus = len(self._layout.topology.gpus)
        wrong += [f"{gpus - len(used)} GPUs occur nowhere"] if len(used) != gpus else []
        stages = len(self._graph.ranks)
        in_stages = f"{stages} stage" + ("" if stages == 1 else "s")
        said = f"every node has its GPUs; {gpus:,} GPUs in {in_stages}, each in one"
        return Verdict("GPU assignment", not wrong, _named(wrong) if wrong else said)

    def communications(self) -> Verdict:
        """Every exchange that runs is drawn, with all its bytes, and the groups call for no other."""
        wrong, kinds = [], Counter[str]()
        for index, op in enumerate(self._graph.operators):
            if op.exchange is None:
                continue
            kinds[op.exchange.kind] += 1
            size = float(op.exchange.size.sum())
            if not np.isclose(self._sent[index], size, rtol=1e-9):
                wrong.append(
                    f"{op.name} of layer {op.layer}: {self._sent[index]:,.0f} of {size:,.0f} bytes drawn"
                )
        for name, number in self._called_for().items():
            there = sum(
                op.name == name and self._by_rank[n].total() > 0 for n, op in enumerate(self._graph.operators)
            )
            if there != number:
                wrong.append(f"{there} x {name}, {number} are called for")
        said = (
            ", ".join(f"{number:,} {kind.replace('_', '-')}" for kind, number in sorted(kinds.items()))
            or "none is needed"
        )
        return Verdict(
            "communications", not wrong, _named(wrong) if wrong else f"{said}; all drawn, all bytes"
        )

    def _called_for(self) -> dict[str, int]:
        """Name of an exchange → how many of it the groups of the deployment call for."""
        model, d = self._layout.model, self._layout.deployment
        shared, etp = d.tensor_parallel > 1, d.expert_tensor_parallel > 1
        return {
            "attention_all_reduce": model.layers * shared,
            "ffn_all_reduce": (model.layers - model.moe_layers) * shared,
            "ffn_all_gather": model.moe_layers * shared,
            "dispatch": model.moe_layers,
            "combine": model.moe_layers,
            "expert_all_gather": model.moe_layers * etp,
            "expert_reduce_scatter": model.moe_layers * etp,
            "stage_transfer": d.pipeline_parallel - 1,
        }

    def dimensions(self) -> Verdict:
        """Along every edge arrives what was given, on every GPU; nothing else is taken, nothing is left."""
        wrong = self._faults["dimensions"]
        said = f"{self.edges:,} edges carry, on every GPU, the numbers that one end gives and the other takes"
        return Verdict(
            "dimensions", not wrong, f"{len(wrong):,} edges or tensors: {_named(wrong)}" if wrong else said
        )

    def work(self) -> Verdict:
        """Every operator is drawn, and the nodes of each do all of its work: nothing more, nothing less."""
        wrong = [
            f"{op.name} of layer {op.layer}"
            for index, op in enumerate(self._graph.operators)
            if index not in self._by_rank
            or not np.isclose(self._flop[index], op.flop.sum(), rtol=1e-9, atol=0.5)
        ]
        wrong += (
            ["operators that do not run"]
            if set(self._by_rank) - set(range(len(self._graph.operators)))
            else []
        )
        flop = f"{self._graph.flop / 1e12:,.4g} TFLOP in all"
        said = f"{len(self._graph.operators):,} operators of the pass, {flop}; nothing else"
        return Verdict("drawn is what runs", not wrong, _named(wrong) if wrong else said)


_EXPERT_PARTS = ("expert_gemm_1", "expert_activation", "expert_gemm_2")


def _common(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What two ascending arrays both hold, and where in each."""
    at = np.searchsorted(a, b)
    both = a[np.minimum(at, len(a) - 1)] == b
    return b[both], at[both], np.flatnonzero(both)


def _alike(given: Tensor, taken: Tensor) -> bool:
    """Whether both ends speak of a tensor that is as large in all."""
    sizes = (math.prod(dim.whole for dim in tensor.dims) for tensor in (given, taken))
    return math.isclose(*sizes, rel_tol=_ROUNDING)


def _named(faults: list[str]) -> str:
    more = len(faults) - _NAMED
    return "; ".join(faults[:_NAMED]) + (f"; and {more:,} more" if more > 0 else "")


#: The documents' validation list, in their order; the last two are ours.
CHECKS: tuple[Callable[[Inspection], Verdict], ...] = (
    Inspection.no_cycles,
    Inspection.connected,
    Inspection.expert_coverage,
    Inspection.head_decomposition,
    Inspection.gpu_assignment,
    Inspection.communications,
    Inspection.dimensions,
    Inspection.work,
)
