"""The replica: admits batches, forms micro-batches, runs their passes, hands out tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
import simpy

from clustersim.engine.fabric import Fabric, Process
from clustersim.engine.faults import fastest
from clustersim.engine.gpu import Inbox
from clustersim.engine.ledger import Ledger
from clustersim.engine.rebalancing import Rebalancer
from clustersim.engine.tokenbatch import Prepared, TokenBatch, prepare
from clustersim.physics.bounds import Work, lower_bounds
from clustersim.physics.chunked import refuse_beyond, services
from clustersim.physics.exchanges import Routes
from clustersim.physics.pricing import measured
from clustersim.plan.layout import Layout
from clustersim.plan.lowering import gated, lower
from clustersim.plan.memory import kv_bytes_per_token
from clustersim.plan.stepgraph import StepGraph
from clustersim.serving.batching import Pass, microbatches
from clustersim.serving.kvcache import KvPool
from clustersim.serving.request import Request
from clustersim.serving.router import route
from clustersim.spec.scenario import Scenario
from clustersim.trace.record import Recorder

#: Lowered graphs kept for passes that look alike.
_PREPARED = 16


@dataclass(slots=True)
class Progress:
    """Of one request: when it started and when its tokens came, s; NaN until then."""

    request: Request
    shard: int
    started: float = float("nan")
    first_token: float = float("nan")
    finish: float = float("nan")
    read: int = 0
    made: int = 0


@dataclass(slots=True)
class Step:
    """One step of a batch while its micro-batches are under way."""

    batch: int
    index: int
    phase: str
    number: int
    left: int
    start: float
    tokens_read: int = 0
    tokens_made: int = 0
    work: list[Work] = field(default_factory=list)


class Replica:
    """All ranks of the deployment, stepping together.

    inboxes  per stage the compute streams of its ranks
    tell     called after every pass with (done, all) for whoever shows progress
    """

    def __init__(
        self,
        scenario: Scenario,
        layout: Layout,
        fabric: Fabric,
        inboxes: Sequence[Sequence[Inbox]],
        ledger: Ledger,
        recorder: Recorder,
        pool: KvPool,
        tell: Callable[[int, int], None],
    ) -> None:
        self.scenario = scenario
        self.fabric = fabric
        self.env = fabric.env
        self.carried = np.zeros(len(layout.topology.links.bandwidth))
        self._inboxes = inboxes
        self._ledger = ledger
        self._recorder = recorder
        self._pool = pool
        per_token = kv_bytes_per_token(scenario.model, scenario.deployment, scenario.workload)
        self._block_bytes = per_token * pool.block_tokens
        self._tell = tell
        self._routes = Routes(layout, measured(layout.topology, scenario.network.startup))
        self._prepared: dict[bytes, Prepared] = {}
        self._held = np.zeros(scenario.deployment.data_parallel, dtype=np.int64)
        self._progress: dict[int, Progress] = {}
        self._steps: dict[tuple[int, int], Step] = {}
        self._fastest = fastest(scenario.faults, len(layout.topology.gpus), scenario.seed)
        self._room: simpy.Event = self.env.event()
        self._turn: simpy.Event = self.env.event().succeed()
        self._chunks: dict[str, float] = {}
        self._token_batches = 0
        self._passes = 0
        self._all_passes = 0
        self._to_come = scenario.workload.batches
        self._last = -1
        self._topology = layout.topology
        self._rebalancer = Rebalancer(
            scenario, layout, fabric, self._routes, ledger, self.carried, self._more
        )

    @property
    def layout(self) -> Layout:
        """Where everything is for the next pass."""
        return self._rebalancer.layout

    def _more(self) -> bool:
        return self._to_come > 0 or self._passes < self._all_passes

    def serve(self, batches: Iterable[Sequence[Request]]) -> Process:
        """Admits the batches in order of arrival; ends when the last one is done."""
        running = []
        for batch in batches:
            if batch[0].arrival > self.env.now:
                yield self.env.timeout(batch[0].arrival - self.env.now)
            shards = route(batch, self._held, self.scenario.workload, self.scenario.seed)
            wanted = self._blocks(batch, shards)
            released = -1
            while not self._pool.fits(wanted):
                yield self._room
                released = self._last
            self._pool.take(wanted)
            self._kv_rows(wanted)
            for request, shard in zip(batch, shards, strict=True):
                self._held[shard] += request.prompt_tokens + request.decode_steps
            running.append(self.env.process(self._run(batch, shards, wanted, released)))
        for process in running:
            yield process

    def _blocks(self, batch: Sequence[Request], shards: Sequence[int]) -> np.ndarray:
        wanted = np.zeros(len(self._held), dtype=np.int64)
        for request, shard in zip(batch, shards, strict=True):
            wanted[shard] += self._pool.blocks_for(request.prompt_tokens + request.decode_steps)
        return wanted

    def _kv_rows(self, changed: np.ndarray) -> None:
        """What shards hold from now on. changed: int64[D] blocks that they took or gave back."""
        shards = np.flatnonzero(changed)
        held = self._pool.used[shards] * self._block_bytes
        self._recorder.rows("kv_use", time=self.env.now, shard=shards, bytes=held)

    def _run(
        self, batch: Sequence[Request], shards: Sequence[int], wanted: np.ndarray, released: int
    ) -> Process:
        """One batch from its first pass to its last. released: span that made room for it, or -1."""
        placed = list(zip(batch, shards, strict=True))
        for request, shard in placed:
            self._progress[request.number] = Progress(request, shard)
        chains = microbatches(placed, self.scenario.workload, len(self._held))
        self._all_passes += sum(len(chain) for chain in chains)
        self._to_come -= 1
        parts = [
            self.env.process(self._chain(batch[0].batch, number, chain, len(chains), released))
            for number, chain in enumerate(chains)
        ]
        for part in parts:
            yield part
        for request, shard in placed:
            self._held[shard] -= request.prompt_tokens + request.decode_steps
        self._pool.give_back(wanted)
        self._kv_rows(wanted)
        room, self._room = self._room, self.env.event()
        room.succeed()

    def _chain(
        self, batch: int, microbatch: int, passes: Sequence[Pass], parts: int, released: int
    ) -> Process:
        """The passes of a micro-batch: the next begins at stage 0 when the last has left the last stage."""
        for one in passes:
            ready = self.env.now
            # One pass waits before stage 0, not all of them: what is not lowered yet takes no memory.
            # The fastest rank already has its next pass when it is through with this one.
            turn, begins = self._turn, self.env.event()
            self._turn = begins
            yield turn
            yield from self._rebalancer.admit()
            step = self._open_step(batch, one, parts)
            self._note_beginning(begins, step.number)
            token_batch = self._issue(one, step.number, ready, released, begins)
            yield token_batch.done
            released = self._close(token_batch, one, step, microbatch)

    def _note_beginning(self, begins: simpy.Event, step: int) -> None:
        chosen = self._ledger.details.chosen
        begins.callbacks.append(lambda _: chosen.began(step, self.env.now))

    def _issue(self, one: Pass, step: int, ready: float, released: int, begins: simpy.Event) -> TokenBatch:
        number = self._token_batches
        self._token_batches += 1
        prepared = self._prepare(one, number, step)
        token_batch = TokenBatch(
            number, one.phase, prepared, self.fabric, self._routes, ready, released, begins
        )
        self._check_chunks(one.phase, prepared.graph)
        for stage in self._inboxes:
            for inbox in stage:
                inbox.put(token_batch)
        return token_batch

    def _check_chunks(self, phase: str, graph: StepGraph) -> None:
        """Refuses a run that would take hours chunk by chunk when the first pass of a phase shows it."""
        network, w = self.scenario.network, self.scenario.workload
        if network.fidelity != "chunked" or phase in self._chunks:
            return
        exchanges = [self._routes.of(op.exchange) for op in graph.operators if op.exchange is not None]
        rounds = [one_round for exchange in exchanges for one_round in exchange.rounds]
        passes = w.batches * w.microbatches * (w.decode_steps if phase == "decode" else 1)
        self._chunks[phase] = passes * sum(services(one.flows, network.chunk) for one in rounds)
        refuse_beyond(sum(self._chunks.values()), network.chunk)

    def _prepare(self, one: Pass, number: int, step: int) -> Prepared:
        """Lowers and prices a pass, or takes an earlier pass's graph where both look alike."""
        scenario, layout = self.scenario, self.layout
        batch = one.batch(len(self._held), scenario.model.window)
        counts, distinct = gated(batch, scenario, layout, number, step)
        self._rebalancer.began(number, step, counts)
        enters = (*batch.arrays(), counts, layout.copies, *([] if distinct is None else [distinct]))
        key = batch.phase.encode() + b"".join(a.tobytes() for a in enters)
        prepared = self._prepared.get(key)
        if prepared is None:
            if len(self._prepared) >= _PREPARED:
                self._prepared.clear()
            graph = lower(batch, counts, layout, distinct)
            prepared = self._prepared[key] = prepare(graph, layout)
        return prepared

    def _open_step(self, batch: int, one: Pass, parts: int) -> Step:
        key = (batch, one.index)
        step = self._steps.get(key)
        if step is None:
            step = Step(batch, one.index, one.phase, len(self._steps), parts, inf)
            self._steps[key] = step
        return step

    def _close(self, token_batch: TokenBatch, one: Pass, step: Step, microbatch: int) -> int:
        """Rows and tokens of a pass that is done. Returns the span that ended last."""
        now, began = self.env.now, token_batch.began()
        step.start = min(step.start, began)
        self._recorder.rows(
            "token_batches",
            token_batch=token_batch.number,
            step=step.number,
            microbatch=microbatch,
            ready=token_batch.ready,
            start=began,
            end=now,
            tokens=token_batch.graph.tokens,
            dropped=token_batch.graph.dropped,
        )
        work = token_batch.work()
        self.carried += work.carried[0]
        step.work.append(work)
        for number, piece in zip(one.requests, one.pieces, strict=True):
            progress = self._progress[number]
            if progress.started != progress.started:
                progress.started = began
            self._advance(progress, piece.new if one.phase == "prefill" else 0, piece.makes)
            step.tokens_read += piece.new if one.phase == "prefill" else 0
            step.tokens_made += piece.makes
        step.left -= 1
        if step.left == 0:
            self._write_step(step)
        self._passes += 1
        self._tell(self._passes, self._all_passes)
        self._last = self._ledger.write(token_batch)
        self._rebalancer.ended(token_batch)
        if step.left == 0:
            self._ledger.details.chosen.ended(step.number, now)
            self._rebalancer.step_ended(step.number, step.start)
        return self._last

    def _advance(self, progress: Progress, read: int, made: int) -> None:
        progress.read += read
        progress.made += made
        progress.finish = self.env.now
        if made and progress.first_token != progress.first_token:
            progress.first_token = self.env.now

    def _write_step(self, step: Step) -> None:
        topology = self._topology
        bounds = lower_bounds(step.work, topology.gpu, topology.links.bandwidth)
        self._recorder.rows(
            "steps",
            step=step.number,
            batch=step.batch,
            index=step.index,
            phase=step.phase,
            start=step.start,
            end=self.env.now,
            input_tokens=step.tokens_read,
            output_tokens=step.tokens_made,
            flop=sum(w.all_flop for w in step.work),
            bound_compute=bounds.compute * self._fastest,
            bound_memory=bounds.memory * self._fastest,
            bound_network=bounds.network,
        )
        step.work.clear()

    def write(self) -> None:
        """Rows of all requests, and of what was placed anew."""
        self._rebalancer.write(self._recorder)
        held = [self._progress[number] for number in sorted(self._progress)]
        self._recorder.rows(
            "requests",
            request=[p.request.number for p in held],
            batch=[p.request.batch for p in held],
            shard=[p.shard for p in held],
            arrival=[p.request.arrival for p in held],
            started=[p.started for p in held],
            first_token=[p.first_token for p in held],
            finish=[p.finish for p in held],
            input_tokens=[p.read for p in held],
            output_tokens=[p.made for p in held],
        )
