"""How long tokens stood in the queues of experts: a pass that is done → waits of every queue and of all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clustersim.engine.fabric import Meeting
from clustersim.engine.tokenbatch import Program

#: Waits are counted together when their logarithms agree to this.
_BIN = 1e-3
#: Waits below this are none, s.
_NONE = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Jobs:
    """How a rank serves its S slots after a dispatch: each in K parts, one after the other.

    first, last  int64[S, K] positions of the first and last operator of each part; where a slot has fewer
                 parts, its last one again
    number       int64[S, K] column of `size`
    size         float64[N, J] tokens that a part serves on each rank; inf for all that came
    """

    first: np.ndarray
    last: np.ndarray
    number: np.ndarray
    size: np.ndarray


def jobs_of(program: Program, dispatch: int, slots: int) -> Jobs:
    """The jobs of the experts that follow a dispatch at a position of the program."""
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(slots)]
    sizes: list[np.ndarray] = []
    for p in range(dispatch, len(program.compute)):
        op = program.compute[p]
        if op.name == "combine":
            break
        if op.name == "expert_gemm_1":
            assert op.call is not None
            for slot in range(slots) if op.slot < 0 else [op.slot]:
                found[slot].append((p, p + 2, len(sizes)))
            sizes.append(op.call.columns["counts"][:, 0])
    most = max(len(jobs) for jobs in found)
    size = np.stack([*sizes, np.zeros_like(sizes[0])], axis=1)
    if most == 1:
        # One part serves all that came, also what others who share the expert gathered.
        size = np.full_like(size, np.inf)
    table = np.array([jobs + [(*jobs[-1][:2], len(sizes))] * (most - len(jobs)) for jobs in found])
    return Jobs(table[..., 0], table[..., 1], table[..., 2], size)


def arrivals(meeting: Meeting, groups: np.ndarray) -> np.ndarray:
    """When what member i sends to member j stands in j's queues, float64[G, n, n] s."""
    g, n = groups.shape
    met = np.array(meeting.met).reshape(g, n)
    arrived = np.repeat(met[:, :, None], n, axis=2)
    brought = meeting.routed.brought
    if meeting.ends and brought is not None:
        ends = np.concatenate(meeting.ends)
        by = brought.reshape(g, n, n).transpose(0, 2, 1)
        arrived = np.where(by >= 0, ends[by], arrived)
    return arrived


@dataclass(frozen=True, slots=True, eq=False)
class Waits:
    """How long the tokens of each copy waited: pieces of its queue that came together and were served
    together.

    seconds, tokens  float64[G, X, C]; NaN and 0 for a piece that is none
    begun            float64[G, X, C] when each was begun to be served, s
    complete         float64[G, X, C] when all was there that is served together with it, s
    """

    seconds: np.ndarray
    tokens: np.ndarray
    begun: np.ndarray
    complete: np.ndarray

    def total(self) -> np.ndarray:
        """float64[G, C] token-seconds."""
        found: np.ndarray = np.where(self.tokens > 0, self.seconds * self.tokens, 0.0).sum(axis=1)
        return found

    def behind(self, over: np.ndarray) -> np.ndarray:
        """What of the total was spent behind other work of the rank, float64[G, C] token-seconds.

        over  float64[G, C] before this the rank was in the exchange that brings the tokens, s
        """
        late = self.begun - np.maximum(self.complete, over[:, None])
        found: np.ndarray = np.where(self.tokens > 0, late * self.tokens, 0.0).sum(axis=1)
        return found

    def longest(self) -> np.ndarray:
        """float64[G, C] s; NaN where nothing came."""
        found: np.ndarray = np.fmax.reduce(self.seconds, axis=1)
        return found

    def quantile(self, level: float) -> np.ndarray:
        """float64[G, C] the least wait that a share of at least `level` of the tokens does not exceed, s."""
        order = np.argsort(self.seconds, axis=1)
        reached = np.cumsum(np.take_along_axis(self.tokens, order, axis=1), axis=1)
        at = (reached >= level * reached[:, -1:]).argmax(axis=1)
        piece = np.take_along_axis(order, at[:, None], axis=1)
        return np.asarray(np.take_along_axis(self.seconds, piece, axis=1)[:, 0])


def waits_of(there: np.ndarray, tokens: np.ndarray, begun: np.ndarray, size: np.ndarray) -> Waits:
    """Waits of tokens that are served in the order in which they came.

    there   float64[G, n, C] when what each member sends to each copy was there, s; NaN where nothing
    tokens  int64[G, n, C] how much that is
    begun   float64[G, C, K] when each part of a copy's queue was begun to be served, s
    size    float64[G, C, K] tokens of each part
    """
    if begun.shape[2] == 1:
        start = np.broadcast_to(begun[:, None, :, 0], there.shape)
        last = np.broadcast_to(np.fmax.reduce(there, axis=1, keepdims=True), there.shape)
        return Waits(start - there, tokens.astype(float), start, last)
    order = np.argsort(there, axis=1)
    came = np.take_along_axis(there, order, axis=1)[..., None]
    each = np.take_along_axis(tokens, order, axis=1)[..., None].astype(float)
    upto = np.cumsum(each, axis=1)
    served = np.cumsum(size, axis=2)[:, None]
    # Tokens of a piece are those of a sender that a part serves: where both intervals overlap.
    overlap = np.minimum(upto, served) - np.maximum(upto - each, served - size[:, None])
    overlap = np.maximum(overlap, 0.0)
    arrived = np.where(overlap > 0, came, np.nan)
    last = np.fmax.reduce(arrived, axis=1, keepdims=True)
    columns = [begun[:, None] - arrived, overlap, begun[:, None], last]
    groups, _, copies, _ = overlap.shape
    flat = (groups, -1, copies)
    pieces = (np.broadcast_to(column, overlap.shape) for column in columns)
    return Waits(*(piece.transpose(0, 1, 3, 2).reshape(flat) for piece in pieces))


class TokenWaits:
    """Waits of all tokens of a run, counted in bins so narrow that quantiles lose nothing."""

    def __init__(self) -> None:
        self._tokens = np.zeros(0)
        self._seconds = np.zeros(0)

    def add(self, seconds: np.ndarray, tokens: np.ndarray) -> None:
        """Counts pieces: how long so many tokens waited, of any shape."""
        some = tokens > 0
        seconds, tokens = np.maximum(seconds[some], 0.0), tokens[some]
        logs = np.log(np.maximum(seconds, _NONE) / _NONE) / _BIN
        bins = np.ceil(logs).astype(np.int64)
        more = int(bins.max(initial=-1)) + 1 - len(self._tokens)
        if more > 0:
            self._tokens = np.pad(self._tokens, (0, more))
            self._seconds = np.pad(self._seconds, (0, more))
        size = len(self._tokens)
        self._tokens += np.bincount(bins, weights=tokens, minlength=size)
        self._seconds += np.bincount(bins, weights=tokens * seconds, minlength=size)

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """float64[B] s, mean wait of each bin, and int64[B] tokens in it; ascending, none empty."""
        some = self._tokens > 0
        tokens = self._tokens[some]
        return self._seconds[some] / tokens, np.rint(tokens).astype(np.int64)
