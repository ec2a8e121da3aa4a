"""The loop: counts what experts get, has them placed anew, moves their weights, and keeps the bill."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import isnan, nan

import numpy as np
import simpy

from clustersim.engine.fabric import Fabric, Meeting, Process
from clustersim.engine.ledger import Ledger
from clustersim.engine.tokenbatch import TokenBatch
from clustersim.physics.chunked import refuse_beyond, services
from clustersim.physics.exchanges import RoutedExchange, Routes
from clustersim.plan.amending import amended
from clustersim.plan.experts import copies_of
from clustersim.plan.groups import layers_of
from clustersim.plan.layout import Layout, where_of
from clustersim.plan.memory import expert_bytes
from clustersim.plan.moves import Move, chunks, moves, settled
from clustersim.plan.packing import imbalance
from clustersim.plan.stepgraph import Exchange
from clustersim.spec.scenario import Scenario
from clustersim.trace.record import Recorder

#: Libraries bring weights as one group of sends and receives, as an all-to-all does.
#: Source: vllm/distributed/eplb/rebalance_execute.py, batch_isend_irecv
_ALGORITHM = "pairwise"


@dataclass(slots=True)
class Bill:
    """What one planning led to; the columns of the table `rebalances`, but for its number."""

    observed: float
    planned: float
    before: float
    foreseen: float
    wished: float = nan
    outcome: str = "too_late"
    ready: float = nan
    began: float = nan
    ended: float = nan
    layers: int = 0
    copies: int = 0
    bytes: float = 0.0
    stopped: float = 0.0
    after: float = nan
    unmoved: float = nan


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """New places, and what has to move for them.

    copies  int32[L, C]
    wished  int[L, C] what the policy asked for, layers that gain too little to move among it
    layers  those with new places, in the order in which they move, some at a time
    moves   of all of them
    """

    copies: np.ndarray
    wished: np.ndarray
    layers: list[list[int]]
    moves: list[Move]


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """A step that is done: when it began, s, and float64[L, E] tokens that came for every expert."""

    start: float
    load: np.ndarray


@dataclass(slots=True)
class _Watch:
    """Loads that come after a move, while `left` more steps count.

    old, placed  int32[L, C] places before and after
    """

    bill: Bill
    old: np.ndarray
    placed: np.ndarray
    load: np.ndarray
    left: int


class Rebalancer:
    """Owns the present layout. Told of every pass and step; says whether a pass may begin.

    layout   where experts stand for the next pass; a pass that has begun keeps the one it began with
    carried  float64[K] bytes over every link, to which those of weights are added
    more     whether passes are still to come
    """

    def __init__(
        self,
        scenario: Scenario,
        layout: Layout,
        fabric: Fabric,
        routes: Routes,
        ledger: Ledger,
        carried: np.ndarray,
        more: Callable[[], bool],
    ) -> None:
        self.layout = layout
        self.bills: list[Bill] = []
        self.placements: list[tuple[int, int, float, int, int]] = []
        self._scenario = scenario
        self._how = scenario.deployment.experts.rebalance
        self._first = layout
        self._fabric = fabric
        self._env = fabric.env
        self._routes = routes
        self._ledger = ledger
        self._carried = carried
        self._more = more
        model = scenario.model
        self._active = bool(self._how.every and model.experts)
        self._with_experts = [layer for layer in range(model.layers) if model.has_experts(layer)]
        self._stages = [
            layers_of(model.layers, scenario.deployment.pipeline_parallel, stage)
            for stage in range(scenario.deployment.pipeline_parallel)
        ]
        self._window: deque[Observed] = deque(maxlen=self._how.window)
        self._counts: dict[int, tuple[int, np.ndarray]] = {}
        self._steps: dict[int, np.ndarray] = {}
        self._watch: _Watch | None = None
        self._since = 0
        self._busy = False
        self._gate: simpy.Event | None = None
        self._waiting_since = nan
        self._left: simpy.Event = self._env.event()

    # ---- what the replica tells it ---------------------------------------------------------------

    def admit(self) -> Process:
        """Waits until a pass may begin."""
        while self._gate is not None:
            if isnan(self._waiting_since):
                self._waiting_since = self._env.now
            yield self._gate

    def began(self, number: int, step: int, counts: np.ndarray) -> None:
        """A pass begins. counts: int64[L, N, E] as in `plan.lowering.gated`."""
        if self._active:
            self._counts[number] = (step, counts)

    def ended(self, batch: TokenBatch) -> None:
        """A pass is through."""
        if not self._active:
            return
        step, counts = self._counts.pop(batch.number)
        load = counts.sum(axis=1, dtype=np.float64)
        self._steps[step] = self._steps[step] + load if step in self._steps else load
        self._compare(batch, counts)
        left, self._left = self._left, self._env.event()
        left.succeed()

    def step_ended(self, step: int, start: float) -> None:
        """All passes of a step are through; start: when it began, s."""
        if not self._active:
            return
        load = self._steps.pop(step)
        self._window.append(Observed(start, load))
        self._follow(load)
        self._since += 1
        if self._since >= self._how.every and not self._busy and self._more():
            self._since = 0
            self._plan()

    def write(self, recorder: Recorder) -> None:
        """Rows of all plannings."""
        self._unwatch()
        for number, bill in enumerate(self.bills):
            recorder.rows("rebalances", rebalance=number, **asdict(bill))
        if self.placements:
            names = ("token_batch", "layer", "mean", "busiest", "first")
            columns = zip(*self.placements, strict=True)
            recorder.rows("placements", **dict(zip(names, map(list, columns), strict=True)))

    # ---- observing -------------------------------------------------------------------------------

    def _compare(self, batch: TokenBatch, counts: np.ndarray) -> None:
        """Busiest rank of every layer as it was, and as it would have been at the first places."""
        ranks = self._first.deployment.expert_parallel
        for op in batch.graph.operators:
            if op.queue is None:
                continue
            per_rank = op.queue.tokens.sum(axis=(0, 1)).reshape(ranks, -1).sum(axis=1)
            first = per_rank
            if not np.array_equal(op.queue.copies, self._first.copies[op.layer]):
                there = self._first.tokens_per_copy(counts[op.layer], op.layer)
                first = there.sum(axis=(0, 1)).reshape(ranks, -1).sum(axis=1)
            row = (batch.number, op.layer, float(per_rank.mean()), int(per_rank.max()), int(first.max()))
            self.placements.append(row)

    def _imbalance(self, load: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """float64[M] of the layers with experts."""
        chosen = self._with_experts
        ranks = self._first.deployment.expert_parallel
        return imbalance(load[chosen], copies[chosen], ranks)

    def _follow(self, load: np.ndarray) -> None:
        watch = self._watch
        if watch is not None:
            watch.load += load
            watch.left -= 1
            if watch.left == 0:
                self._unwatch()

    def _unwatch(self) -> None:
        """Writes on the last move's bill what became of it."""
        watch, self._watch = self._watch, None
        if watch is not None and watch.load.any():
            watch.bill.after = float(self._imbalance(watch.load, watch.placed).mean())
            watch.bill.unmoved = float(self._imbalance(watch.load, watch.old).mean())

    # ---- planning --------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Plans by the loads of the window, and sets to work where that is worth it."""
        load = np.sum([one.load for one in self._window], axis=0)
        now = self._imbalance(load, self.layout.copies)
        bill = Bill(self._window[0].start, self._env.now, float(now.mean()), float(now.mean()))
        self.bills.append(bill)
        if bill.before < self._how.threshold:
            bill.ready, bill.outcome = self._env.now, "below_threshold"
            return
        plan = self._better(load, now)
        bill.wished = float(self._imbalance(load, plan.wished).mean())
        bill.foreseen = float(self._imbalance(load, plan.copies).mean())
        self._busy = True
        if self._stops and not self._how.planning_time and plan.layers:
            # At once: the next pass would begin at this very instant.
            self._gate = self._env.event()
        self._env.process(self._carry_out(plan, bill))

    @property
    def _stops(self) -> bool:
        return self._how.transfer == "stop"

    def _better(self, load: np.ndarray, now: np.ndarray) -> Plan:
        """New places for those layers that gain enough. now: float64[M] as in `_imbalance`."""
        layout, ranks = self.layout, self.layout.deployment.expert_parallel
        wished = PLANS[self._how.plan](load, layout, self._scenario)
        then = self._imbalance(load, wished)
        # A plan that gains nothing at all never moves, however little gain is asked for.
        gains = (then <= (1 - self._how.least_gain) * now) & (then < now)
        copies, needed = layout.copies.copy(), []
        for layer in np.array(self._with_experts)[gains].tolist():
            stage = next(s for s, held in enumerate(self._stages) if layer in held)
            domain = layout.ep_domain[stage, 0]
            copies[layer] = settled(layout.copies[layer], wished[layer], ranks, domain)
            needed += moves(layer, layout.copies[layer], copies[layer], ranks, domain)
        changed = np.flatnonzero((copies != layout.copies).any(axis=1)).tolist()
        return Plan(copies, wished, chunks(changed, self._stages, self._how.layers_at_once), needed)

    # ---- moving ----------------------------------------------------------------------------------

    def _carry_out(self, plan: Plan, bill: Bill) -> Process:
        """From the observed loads to the new places."""
        yield self._env.timeout(self._how.planning_time)
        bill.ready = self._env.now
        if not plan.layers:
            bill.outcome = "nothing_better"
        else:
            if self._stops:
                yield from self._halt()
            # The last pass may have ended meanwhile: nobody moves weights for nothing.
            if self._more():
                yield from self._move_all(plan, bill)
            if self._gate is not None:
                self._go_on()
        self._busy = False

    def _halt(self) -> Process:
        """No further pass begins; waits until none is under way."""
        if self._gate is None:
            self._gate = self._env.event()
        while self._counts:
            yield self._left

    def _go_on(self) -> None:
        gate, self._gate = self._gate, None
        assert gate is not None
        self._waiting_since = nan
        gate.succeed()

    def _move_all(self, plan: Plan, bill: Bill) -> Process:
        bill.began, bill.outcome = self._env.now, "moved"
        old = self.layout.copies
        for layers in plan.layers:
            some = [one for one in plan.moves if one.layer in layers]
            yield from self._move(some, layers, bill)
            self._switch(plan.copies, layers)
            bill.layers += len(layers)
            bill.copies += len(some)
            if not self._stops:
                yield from self._until_through()
        bill.ended = self._env.now
        if not isnan(self._waiting_since):
            # A pass that asked before the last one had ended waited for that one, not for the weights.
            bill.stopped = self._env.now - max(self._waiting_since, bill.began)
        self._unwatch()
        placed = self.layout.copies
        nothing = np.zeros_like(self._window[0].load)
        self._watch = _Watch(bill, old, placed, nothing, self._how.window)

    def _move(self, some: Sequence[Move], layers: Sequence[int], bill: Bill) -> Process:
        """Brings the weights of some layers; they share the links with whatever else is under way."""
        if not some:
            return
        routed = self._routes.of(self._exchange(some))
        network = self._scenario.network
        if network.fidelity == "chunked":
            refuse_beyond(sum(services(one.flows, network.chunk) for one in routed.rounds), network.chunk)
        layer = layers[0] if len(layers) == 1 else -1
        meeting = Meeting(self._fabric, routed, ("rebalance", layer, -1))
        for done in [meeting.arrive(member) for member in range(len(routed.ranks))]:
            yield done
        self._carried += meeting.carried[0]
        self._ledger.count_links(meeting)
        bill.bytes += _payload(routed)
        self._ledger.details.write_flows(meeting, "rebalance", layer, -1)

    def _exchange(self, some: Sequence[Move]) -> Exchange:
        """The moves as an all-to-all among the EP ranks of the stages that have any."""
        layout, d = self.layout, self.layout.deployment
        at = {layer: stage for stage, held in enumerate(self._stages) for layer in held}
        stages = sorted({at[one.layer] for one in some})
        size = np.zeros((len(stages), d.expert_parallel, d.expert_parallel))
        for one in some:
            size[stages.index(at[one.layer]), one.source, one.target] += expert_bytes(layout.model, d)
        sharers = d.expert_tensor_parallel
        groups = np.concatenate([layout.groups.ep[stage] for stage in stages])
        return Exchange("all_to_all", groups, np.repeat(size, sharers, axis=0), algorithm=_ALGORITHM)

    def _switch(self, copies: np.ndarray, layers: Sequence[int]) -> None:
        """The next pass finds these layers at their new places."""
        present = self.layout.copies.copy()
        present[layers] = copies[layers]
        self.layout = replace(self.layout, copies=present)

    def _until_through(self) -> Process:
        """Waits for the passes that still use the old places: then their buffers are free for more."""
        last = max(self._counts, default=-1)
        while any(number <= last for number in self._counts):
            yield self._left


def _anew(load: np.ndarray, layout: Layout, scenario: Scenario) -> np.ndarray:
    """int[L, C] by the policy. load: float64[L, E]"""
    return copies_of(load, layout.deployment, where_of(scenario, layout.ep_domain))


def _amended(load: np.ndarray, layout: Layout, scenario: Scenario) -> np.ndarray:
    return amended(load, layout.copies, layout.deployment.expert_parallel)


PLANS: dict[str, Callable[[np.ndarray, Layout, Scenario], np.ndarray]] = {"anew": _anew, "amended": _amended}


def _payload(routed: RoutedExchange) -> float:
    return sum(float(one.payload.sum()) for one in routed.rounds)
