"""A stage of a finished token batch as arrays: when its operators ran, and what released them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clustersim.engine.tokenbatch import Program, TokenBatch


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One stage of a finished token batch: N ranks, P operators on the compute stream.

    base             span of the first operator of the first rank; rank n's p-th has base + n * P + p
    start, met, end  float64[N, P] s
    after            int64[N, P] span that released each
    awaited          int64[N, P] the rank that came last where a rank had to wait for others, else -1
    """

    batch: TokenBatch
    stage: int
    base: int
    start: np.ndarray
    met: np.ndarray
    end: np.ndarray
    after: np.ndarray
    awaited: np.ndarray

    @property
    def program(self) -> Program:
        return self.batch.programs[self.stage]

    @property
    def ranks(self) -> np.ndarray:
        """int32[N]"""
        ranks: np.ndarray = self.batch.graph.ranks[self.stage]
        return ranks

    def last_spans(self) -> np.ndarray:
        """int64[N] the last span of every rank."""
        last: np.ndarray = self.base + np.arange(1, len(self.end) + 1) * self.end.shape[1] - 1
        return last


def block_of(batch: TokenBatch, stage: int, base: int, released: np.ndarray) -> Block:
    """When each operator of a stage ran.

    base      span of its first operator
    released  int64[N] what released each rank's first operator
    """
    ranks, program = batch.graph.ranks[stage], batch.programs[stage]
    end = np.array(batch.ends[stage]).reshape(len(ranks), -1)
    start = np.empty_like(end)
    start[:, 0] = batch.firsts[stage]
    start[:, 1:] = end[:, :-1]
    after = base + np.arange(end.size).reshape(end.shape) - 1
    after[:, 0] = released
    block = Block(batch, stage, base, start, start.copy(), end, after, np.full(end.shape, -1))
    if batch.begun:
        _out_of_order(block)
    for p, op in enumerate(program.compute):
        if op.exchange is not None:
            _meet(block, p)
    return block


def _out_of_order(block: Block) -> None:
    """Sets when operators began that do not follow each other in the order of the program."""
    batch, count = block.batch, block.end.shape[1]
    waited = []
    for (stage, rank, p), (free, began, before) in batch.begun.items():
        if stage != block.stage:
            continue
        block.start[rank, p], block.met[rank, p] = free, began
        if before >= 0:
            block.after[rank, p] = block.base + rank * count + before
        if began > free:
            waited.append((rank, p))
    own = block.after.copy()
    for rank, p in waited:
        dispatch = _dispatch_before(block.program, p)
        sender = _sender(batch, block.program.indices[dispatch], rank, block.met[rank, p])
        block.after[rank, p] = own[sender, dispatch]


def _dispatch_before(program: Program, p: int) -> int:
    """Position of the dispatch that brings the tokens of a section that p is in or behind."""
    return next(at for at in range(p - 1, -1, -1) if program.compute[at].queue is not None)


def _sender(batch: TokenBatch, index: int, rank: int, now: float) -> int:
    """Who sent what a rank was waiting for until now in exchange `index`; both are places in the stage."""
    meeting, member = batch.meetings[index], batch.member(index, rank)
    # Behind the last expert it waits for what it sends itself.
    for end in ("target", "source"):
        for one_round, ends in zip(meeting.routed.rounds, meeting.ends, strict=True):
            came = np.flatnonzero((getattr(one_round, end) == member) & (ends == now))
            if len(came):
                source = int(meeting.routed.ranks[one_round.source[came[0]]])
                return source - int(batch.graph.ranks[batch.graph.operators[index].stage, 0])
    return rank


def _meet(block: Block, p: int) -> None:
    """Sets from when on the ranks of exchange p exchange, and what had released those that waited."""
    batch, index = block.batch, block.program.indices[p]
    meeting = batch.meetings[index]
    members = batch.members(index)
    ready = block.met[:, p].copy()
    began = np.array(meeting.met)
    last = np.array(meeting.released)[members]
    # Where each sends when it is ready, a rank's exchange proper begins with its last sender; a rank
    # that served its first expert before that had no need to wait for it.
    met = np.maximum(began[members], began[last])
    met = np.where(met > block.end[:, p], ready, met)
    others = np.flatnonzero(met > ready)
    block.awaited[others, p] = meeting.routed.ranks[last[others]]
    place = block.awaited[others, p] - block.ranks[0]
    block.met[:, p] = met
    # A late comer's own predecessor stays: nobody it met was later.
    block.after[others, p] = block.after[place, p]
