"""Batches → micro-batches → passes: who is in which pass, with how many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clustersim.serving.request import Request
from clustersim.spec.batch import Batch, Piece, batch_of
from clustersim.spec.workload import Workload


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of a micro-batch through the replica.

    index     step of the batch it belongs to
    phase     prefill or decode
    requests  number of the request each piece belongs to
    pieces    what is read of it
    """

    index: int
    phase: str
    requests: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def batch(self, shards: int, window: int = 0) -> Batch:
        """The pass per shard; window as in spec.batch.batch_of."""
        return batch_of(self.phase, self.pieces, shards, window)


Placed = Sequence[tuple[Request, int]]


def microbatches(placed: Placed, workload: Workload, shards: int) -> list[list[Pass]]:
    """The passes of every micro-batch, each list in the order in which they must follow each other.

    placed   the batch's requests with their shards
    """
    parts = workload.microbatches
    by_shard: list[list[tuple[Request, int]]] = [[] for _ in range(shards)]
    for request, shard in placed:
        by_shard[shard].append((request, shard))
    if any(len(held) % parts for held in by_shard):
        return [[part] for part in _chunks(by_shard, workload)]
    dealt: list[list[tuple[Request, int]]] = [[] for _ in range(parts)]
    for held in by_shard:
        each = len(held) // parts
        for i, pair in enumerate(held):
            dealt[i // each].append(pair)
    return [_passes(part, workload) for part in dealt]


def _passes(part: Placed, workload: Workload) -> list[Pass]:
    numbers = tuple(request.number for request, _ in part)
    passes = []
    if workload.phase != "decode":
        whole = tuple(Piece(shard, r.prompt_tokens, 0, 1) for r, shard in part)
        passes.append(Pass(0, "prefill", numbers, whole))
    for k in range(workload.decode_steps):
        pieces = tuple(Piece(shard, 1, r.prompt_tokens + k, 1) for r, shard in part)
        passes.append(Pass(len(passes), "decode", numbers, pieces))
    return passes


def _chunks(by_shard: Sequence[Placed], workload: Workload) -> list[Pass]:
    """Chunked prefill: every shard's prompts end to end, cut into equal micro-batches."""
    parts = workload.microbatches
    cut: list[list[tuple[int, Piece]]] = [[] for _ in range(parts)]
    for held in by_shard:
        chunk = sum(r.prompt_tokens for r, _ in held) // parts
        at = 0
        for request, shard in held:
            past = 0
            while past < request.prompt_tokens:
                room = chunk - at % chunk
                new = min(room, request.prompt_tokens - past)
                makes = int(past + new == request.prompt_tokens)
                cut[at // chunk].append((request.number, Piece(shard, new, past, makes)))
                past += new
                at += new
    return [
        Pass(0, "prefill", tuple(number for number, _ in part), tuple(piece for _, piece in part))
        for part in cut
    ]
