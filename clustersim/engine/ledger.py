"""Finished token batches → rows of the trace. Facts only: who, what, when, after what."""

from __future__ import annotations

import numpy as np

from clustersim.engine.blocks import Block, block_of
from clustersim.engine.details import Details
from clustersim.engine.fabric import Meeting
from clustersim.engine.link_use import LinkUse
from clustersim.engine.queues import TokenWaits, arrivals, jobs_of, waits_of
from clustersim.engine.tokenbatch import PriceKey, TokenBatch
from clustersim.plan.layout import Layout
from clustersim.plan.stepgraph import Operator
from clustersim.trace.record import Recorder

#: Rows of waits kept before equal (rank, operator, waited-for) are added up.
_WAITS = 1_000_000

#: (operator, phase, kind, stream): what sums are kept by
Key = tuple[str, str, str, str]


class Ledger:
    """Writes token batches in the order in which they end, and keeps sums over all of them."""

    def __init__(self, layout: Layout, recorder: Recorder, details: Details) -> None:
        ranks = len(layout.topology.gpus)
        self.operators = 0
        self.flop = np.zeros(ranks)
        self.moved = np.zeros(ranks)
        self.priced = np.zeros(ranks)
        self.links = LinkUse(len(layout.topology.links.bandwidth))
        self.details = details
        self._recorder = recorder
        self._spans = 0
        self._last = {s: (np.full(ranks, -1), np.full(ranks, -np.inf)) for s in ("compute", "transfer")}
        self._sums: dict[Key, np.ndarray] = {}
        #: (operator, phase, layer) → float64[R] s that others waited for each rank
        self._waited_for: dict[tuple[str, str, int], np.ndarray] = {}
        self._waits: dict[Key, list[tuple[np.ndarray, np.ndarray]]] = {}
        #: (operator, phase, kind, algorithm) → how often, bytes
        self._exchanges: dict[Key, tuple[int, float]] = {}
        self._prices: dict[tuple[str, PriceKey], tuple[int, float, float, float]] = {}
        self._token_waits: dict[str, TokenWaits] = {}

    def write(self, batch: TokenBatch) -> int:
        """Rows of a finished token batch.

        Returns  the span that ended last in the last stage: it releases what comes after the batch
        """
        released = -1
        sent_from = np.empty(0, dtype=np.int64)
        for stage, program in enumerate(batch.programs):
            first = self._released_first(batch, stage, sent_from)
            block = block_of(batch, stage, self._spans, first)
            self._spans += block.end.size
            self._keep(block)
            self._remember("compute", block.ranks, block.last_spans(), block.end[:, -1])
            if program.transfer is not None:
                sent_from = self._transfers(batch, stage, program.transfer)
            self.priced[block.ranks] += program.priced
            released = int(block.last_spans()[np.argmax(block.end[:, -1])])
        for index in sorted(batch.meetings):
            self.count_links(batch.meetings[index])
        for op in batch.graph.operators:
            self.flop[batch.graph.ranks[op.stage]] += op.flop
            self.moved[batch.graph.ranks[op.stage]] += op.bytes
        self._choices(batch)
        self._priced(batch)
        for index in sorted(batch.meetings):
            op = batch.graph.operators[index]
            self.details.write_flows(batch.meetings[index], op.name, op.layer, batch.number)
        return released

    def count_links(self, meeting: Meeting) -> None:
        """Adds what an exchange that is over put on links."""
        if meeting.routed.rounds:
            start, end = meeting.span()
            self.links.add(meeting.carried[0], start, end)

    def _priced(self, batch: TokenBatch) -> None:
        """Counts where the durations of a batch's operators come from."""
        for key, (count, seconds, outside, launch) in batch.prices.items():
            held = self._prices.get((batch.phase, key), (0, 0.0, 0.0, 0.0))
            self._prices[batch.phase, key] = (
                held[0] + count,
                held[1] + seconds,
                max(held[2], outside),
                held[3] + launch,
            )

    def _choices(self, batch: TokenBatch) -> None:
        """Counts by which algorithm every exchange was done."""
        for index in sorted(batch.meetings):
            op, routed = batch.graph.operators[index], batch.meetings[index].routed
            assert op.exchange is not None
            key = (op.name, batch.phase, op.exchange.kind, routed.algorithm)
            count, size = self._exchanges.get(key, (0, 0.0))
            sent = sum(float(one.payload.sum()) for one in routed.rounds)
            self._exchanges[key] = (count + 1, size + sent)

    def _released_first(self, batch: TokenBatch, stage: int, sent_from: np.ndarray) -> np.ndarray:
        """What released each rank's first operator: its stream's last span, or what came from before.

        sent_from  int64[N] spans of the transfers that fed the stage
        """
        ranks = batch.graph.ranks[stage]
        last, last_end = (column[ranks] for column in self._last["compute"])
        if stage == 0:
            return np.where(last_end > batch.ready, last, batch.released)
        came = np.array([times[1] for times in batch.sent[stage - 1]])
        return np.where(last_end > came, last, sent_from)

    def _keep(self, block: Block) -> None:
        self.operators += block.end.size
        for p, op in enumerate(block.program.compute):
            kind = "compute" if op.exchange is None else "exchange"
            key = (op.name, block.batch.phase, kind, "compute")
            waited = block.met[:, p] - block.start[:, p]
            self._add(key, block.ranks, block.end[:, p] - block.met[:, p], waited)
            if op.exchange is not None:
                self._blame(key, block.ranks, waited, block.awaited[:, p])
                self._awaited(block, p, op, waited)
            if op.queue is not None:
                self._queues(block, p, op)
        self.details.write_block(block)

    def _add(self, key: Key, ranks: np.ndarray, busy: np.ndarray, wait: np.ndarray) -> None:
        sums = self._sums.setdefault(key, np.zeros((3, len(self.flop))))
        sums[0, ranks] += 1
        sums[1, ranks] += busy
        sums[2, ranks] += wait

    def _awaited(self, block: Block, p: int, op: Operator, waited: np.ndarray) -> None:
        """Adds up how long was waited for whom."""
        late = np.flatnonzero((waited > 0) & (block.awaited[:, p] >= 0))
        if not len(late):
            return
        held = self._waited_for.setdefault((op.name, block.batch.phase, op.layer), np.zeros(len(self.flop)))
        held += np.bincount(block.awaited[late, p], weights=waited[late], minlength=len(held))

    def _blame(self, key: Key, ranks: np.ndarray, waited: np.ndarray, culprit: np.ndarray) -> None:
        """Keeps how long each rank waited for whom."""
        late = np.flatnonzero((waited > 0) & (culprit >= 0))
        if not len(late):
            return
        held = self._waits.setdefault(key, [])
        held.append((ranks[late].astype(np.int64) * len(self.flop) + culprit[late], waited[late]))
        if sum(len(pair) for pair, _ in held) > _WAITS:
            self._waits[key] = [_added_up(held)]

    def _remember(self, stream: str, ranks: np.ndarray, spans: np.ndarray, ends: np.ndarray) -> None:
        last, last_end = self._last[stream]
        last[ranks] = spans
        last_end[ranks] = ends

    def _transfers(self, batch: TokenBatch, stage: int, index: int) -> np.ndarray:
        """Rows of the hand-over to the next stage. Returns int64[N] their spans."""
        op, ranks = batch.graph.operators[index], batch.graph.ranks[stage]
        start, end = np.array(batch.sent[stage]).T
        spans = self._spans + np.arange(len(ranks))
        self._spans += len(ranks)
        self.operators += len(ranks)
        computed = self._last["compute"][0][ranks]
        before, before_end = (column[ranks] for column in self._last["transfer"])
        after = np.where(before_end >= start, before, computed)
        self._remember("transfer", ranks, spans, end)
        self._add((op.name, batch.phase, "exchange", "transfer"), ranks, end - start, np.zeros(len(ranks)))
        self.details.write_transfers(batch, stage, index, spans, start, end, after)
        return spans

    def _queues(self, block: Block, p: int, op: Operator) -> None:
        """Rows of the expert queues that a dispatch fills."""
        queue, exchange = op.queue, op.exchange
        assert queue is not None and exchange is not None
        meeting = block.batch.meetings[block.program.indices[p]]
        groups, _, copies = queue.tokens.shape
        holder = np.arange(copies) // queue.slots
        rank = exchange.groups[:, holder]
        slot = np.tile(np.arange(copies) % queue.slots, (groups, 1))
        jobs = jobs_of(block.program, p, queue.slots)
        place = rank - block.ranks[0]
        begun = block.met[place[..., None], jobs.first[slot]]
        ends = block.end[place[..., None], jobs.last[slot]]
        size = jobs.size[place[..., None], jobs.number[slot]]
        tokens = queue.tokens
        there = np.where(tokens > 0, arrivals(meeting, exchange.groups)[:, :, holder], np.nan)
        nobody = ~(tokens > 0).any(axis=1)
        waits = waits_of(there, tokens, begun, size)
        # The last exchange before the experts: the dispatch, or what sharers of an expert gather after it.
        over = block.end[place, int(jobs.first.min()) - 1]
        held = self._token_waits.setdefault(block.batch.phase, TokenWaits())
        held.add(waits.seconds, waits.tokens)
        self._recorder.rows(
            "experts",
            token_batch=block.batch.number,
            layer=op.layer,
            rank=rank.ravel(),
            ep_rank=np.tile(holder, groups),
            slot=slot.ravel(),
            expert=np.tile(queue.copies, groups),
            tokens=tokens.sum(axis=1).ravel(),
            first_arrival=np.where(nobody, np.nan, np.fmin.reduce(there, axis=1)).ravel(),
            last_arrival=np.where(nobody, np.nan, np.fmax.reduce(there, axis=1)).ravel(),
            served=begun.min(axis=2).ravel(),
            done=np.where(size > 0, ends, begun[..., :1]).max(axis=2).ravel(),
            length=np.where(there <= begun.min(axis=2)[:, None, :], tokens, 0).sum(axis=1).ravel(),
            wait=waits.total().ravel(),
            behind=waits.behind(over).ravel(),
            wait_p50=waits.quantile(0.5).ravel(),
            wait_p99=waits.quantile(0.99).ravel(),
            wait_max=waits.longest().ravel(),
        )

    def write_sums(self) -> None:
        """Rows of the sums over all token batches, of the algorithms of their exchanges and of prices."""
        for about in sorted(self._exchanges):
            name, phase, kind, algorithm = about
            often, size = self._exchanges[about]
            self._recorder.rows(
                "exchanges",
                operator=name,
                phase=phase,
                kind=kind,
                algorithm=algorithm,
                count=often,
                bytes=size,
            )
        self._recorder.rows("link_use", **self.links.rows())
        for phase, priced in sorted(self._prices):
            count, seconds, outside, launch = self._prices[phase, priced]
            self._recorder.rows(
                "prices",
                **priced._asdict(),
                phase=phase,
                count=count,
                seconds=seconds,
                outside=outside,
                launch=launch,
            )
        for name, phase, layer in sorted(self._waited_for):
            waited = self._waited_for[name, phase, layer]
            ranks = np.flatnonzero(waited)
            self._recorder.rows(
                "waits", operator=name, phase=phase, layer=layer, rank=ranks, seconds=waited[ranks]
            )
        for phase in sorted(self._token_waits):
            wait, tokens = self._token_waits[phase].rows()
            self._recorder.rows("token_waits", phase=phase, wait=wait, tokens=tokens)
        for key in sorted(self._sums):
            name, phase, kind, stream = key
            count, busy, wait = self._sums[key]
            ranks = np.flatnonzero(count)
            self._recorder.rows(
                "sums",
                rank=ranks,
                stream=stream,
                operator=name,
                phase=phase,
                kind=kind,
                count=count[ranks],
                busy=busy[ranks],
                wait=wait[ranks],
                waited_for=self._most_waited_for(key)[ranks],
            )

    def _most_waited_for(self, key: Key) -> np.ndarray:
        most = np.full(len(self.flop), -1)
        pair, seconds = _added_up(self._waits.get(key, []))
        # Ascending, so that the longest wait of each rank is the one that stays.
        for at in np.argsort(seconds, kind="stable"):
            rank, culprit = divmod(int(pair[at]), len(most))
            most[rank] = culprit
        return most


def _added_up(waits: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if not waits:
        return np.empty(0, dtype=np.int64), np.empty(0)
    pairs = np.concatenate([p for p, _ in waits])
    seconds = np.concatenate([s for _, s in waits])
    distinct, where = np.unique(pairs, return_inverse=True)
    return distinct, np.bincount(where, weights=seconds)
