"""A batch: what the shards of a replica read and make in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Piece:
    """One sequence's part in a batch.

    shard  shard that holds its KV blocks
    new    tokens read now
    past   tokens already in its KV cache
    makes  output tokens that follow from it: 1 for a decode step or the last piece of a prompt
    """

    shard: int
    new: int
    past: int
    makes: int


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The tokens of one pass, summed per shard; D shards.

    phase      prefill or decode
    sequences  int64[D] sequences with new tokens
    tokens     int64[D] new tokens
    pairs      float64[D] query-key pairs under the causal mask, per head
    context    float64[D] tokens whose keys and values are read
    outputs    int64[D] output tokens made
    near_pairs, near_context  float64[D] pairs and context of layers that look at a window only
    """

    phase: str
    sequences: np.ndarray
    tokens: np.ndarray
    pairs: np.ndarray
    context: np.ndarray
    outputs: np.ndarray
    near_pairs: np.ndarray
    near_context: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        """All that is summed per shard."""
        sums = (self.sequences, self.tokens, self.pairs, self.context, self.outputs)
        return (*sums, self.near_pairs, self.near_context)


def batch_of(phase: str, pieces: Sequence[Piece], shards: int, window: int = 0) -> Batch:
    """Sums pieces per shard.

    A new token sees the past, the new tokens before it and itself: new * past + new (new + 1) / 2
    pairs per piece. With a window it sees the last `window` of them.

    window   tokens, of spec.model.Model; 0 for none
    """
    shard = np.array([p.shard for p in pieces], dtype=np.int64)
    new = np.array([p.new for p in pieces], dtype=np.int64)
    past = np.array([p.past for p in pieces], dtype=np.int64)
    makes = np.array([p.makes for p in pieces], dtype=np.int64)

    def per_shard(values: np.ndarray) -> np.ndarray:
        return np.bincount(shard, weights=values, minlength=shards)

    pairs = new * past + new * (new + 1) / 2
    # The first so many new tokens see fewer than a window, and the others lose what lies before it.
    beyond = np.maximum(new + past - window, 0) if window else np.zeros_like(new)
    full = np.minimum(beyond, new)
    lost = full * beyond - full * (full - 1) / 2

    return Batch(
        phase,
        sequences=np.bincount(shard, minlength=shards),
        tokens=per_shard(new).astype(np.int64),
        pairs=per_shard(pairs),
        context=per_shard(new + past),
        outputs=per_shard(makes).astype(np.int64),
        near_pairs=per_shard(pairs - lost),
        near_context=per_shard(new + (np.minimum(past, window - 1) if window else past)),
    )
