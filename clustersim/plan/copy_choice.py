"""Which copy of an expert serves whose tokens.

Every entry of COPY_CHOICES spreads each source's tokens for an expert over the expert's copies and keeps
their number. Round robin and nearest first are what a sender can do by itself. Least loaded knows what
all senders have: no choice leaves the busiest rank fewer tokens, as a linear program per batch finds it.

Source   of the last: DeepSeek's LPLB, https://github.com/deepseek-ai/LPLB
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from clustersim.errors import pick

CopyChoice = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


def round_robin(counts: np.ndarray, copies: np.ndarray, near: np.ndarray, slots: int) -> np.ndarray:
    """All copies of an expert serve every source in turn. Shapes as in `tokens_per_copy`."""
    return _in_turn(counts, copies, np.ones(near.shape, dtype=bool))


def local_first(counts: np.ndarray, copies: np.ndarray, near: np.ndarray, slots: int) -> np.ndarray:
    """Only the nearest copies of an expert serve a source, in turn. Shapes as above."""
    order, begins = _by_expert(copies)
    nearest = np.minimum.reduceat(near[:, order], begins, axis=1)
    return _in_turn(counts, copies, near == nearest[:, copies])


def least_loaded(counts: np.ndarray, copies: np.ndarray, near: np.ndarray, slots: int) -> np.ndarray:
    """The busiest rank gets as few tokens as the copies allow, to the token. Shapes as above.

    Every expert begins whole on one copy; only what a rank has too much moves on, to other copies of its
    experts. So a copy that is not needed gets no tokens, and its weights are not read. Ranks below the
    busiest may differ: a layer waits for the busiest. Tokens of the first sources go to the first copies:
    sources and copies stand in the same order of ranks, so that many stay near.
    """
    total = counts.sum(axis=0).astype(np.int64)
    share = _least_busiest(total, copies, np.arange(len(copies)) // slots)
    return _cut(counts, copies, share)


def tokens_per_copy(counts: np.ndarray, copies: np.ndarray, near: np.ndarray, choice: str) -> np.ndarray:
    """Spreads every source's tokens over the copies of their experts.

    counts   int[N, E] tokens of source i for expert e
    copies   int[C] logical expert in each place of this layer; EP rank c // (C / N) holds place c
    near     int[N, C] 0 where source and copy share a rank, 1 an NVLink domain, 2 neither
    choice   a key of COPY_CHOICES
    Returns  int64[N, C]; row sums per expert are kept
    """
    spread = pick(COPY_CHOICES, choice, "deployment.experts.copy_choice")
    if len(copies) == counts.shape[1]:
        return counts[:, copies].astype(np.int64)
    return spread(counts.astype(np.int64), copies, near, max(len(copies) // len(counts), 1))


def _in_turn(counts: np.ndarray, copies: np.ndarray, may: np.ndarray) -> np.ndarray:
    """may bool[N, C]: copies that serve source i's tokens, all alike."""
    order, begins = _by_expert(copies)
    open_ = may[:, order]
    ways = np.add.reduceat(open_.astype(np.int64), begins, axis=1)
    whole, left = np.divmod(counts, ways)
    # Left-over tokens go on where the source before left off, and experts begin at different
    # copies: however few tokens there are, they do not pile up on the first ones.
    begin = np.arange(counts.shape[1]) + np.cumsum(left, axis=0) - left
    expert = copies[order]
    before = np.cumsum(ways, axis=1) - ways
    turn = (np.cumsum(open_, axis=1) - 1 - before[:, expert] - begin[:, expert]) % ways[:, expert]
    spread = np.empty(may.shape, dtype=np.int64)
    spread[:, order] = np.where(open_, whole[:, expert] + (turn < left[:, expert]), 0)
    return spread


def _by_expert(copies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in the order of their experts, int[C], and where each expert begins there, int[E]."""
    order = np.argsort(copies, kind="stable")
    return order, np.searchsorted(copies[order], np.arange(int(copies.max()) + 1))


def _least_busiest(total: np.ndarray, copies: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """int64[C] tokens for every copy. total int[E]; rank int[C] who holds it.

    A maximum flow along shortest paths of copies, from ranks above a bound to ranks below it. Where one
    stays above, the ranks that it reaches hold nothing that others could serve: their mean is the least
    possible bound, and the flow goes on with that.
    """
    spread = _Spread(total.tolist(), copies, rank.tolist())
    bound = -(-sum(spread.load) // len(spread.load))
    while max(spread.load) > bound:
        busiest = spread.load.index(max(spread.load))
        came = spread.reached(busiest, bound)
        last = next(reversed(came))
        if spread.load[last] < bound:
            spread.shift(came, last, bound)
        else:
            bound = -(-sum(spread.load[held] for held in came) // len(came))
    return np.array(spread.share, dtype=np.int64)


class _Spread:
    """Tokens on copies, under way.

    share   int[C] tokens of each copy
    load    int[EP] tokens of each rank
    others  [EP] copies on each rank that may hand tokens on, each with the copies that may take them
    """

    def __init__(self, tokens: Sequence[int], copies: np.ndarray, holder: Sequence[int]) -> None:
        order, begins = _by_expert(copies)
        places = [part.tolist() for part in np.split(order, begins[1:])]
        ranks = max(holder) + 1
        self.holder, self.share, self.load = holder, [0] * len(copies), [0] * ranks
        self.others: list[list[tuple[int, list[int]]]] = [[] for _ in range(ranks)]
        # Experts without a choice first, then the heaviest, each onto the least loaded of its ranks.
        for expert in sorted(range(len(places)), key=lambda e: (len(places[e]) > 1, -tokens[e])):
            # Of several copies on one rank the first gets all.
            held = list({holder[place]: place for place in reversed(places[expert])}.values())[::-1]
            place = min(held, key=lambda at: self.load[holder[at]])
            self.share[place] = tokens[expert]
            self.load[holder[place]] += tokens[expert]
            if len(held) > 1 and tokens[expert]:
                for one in held:
                    self.others[holder[one]].append((one, [at for at in held if at != one]))

    def reached(self, rank: int, bound: int) -> dict[int, tuple[int, int]]:
        """Rank → the copies from and to which tokens came on the way there, nearest ranks first.

        It ends with the first rank below the bound, if there is one.
        """
        came = {rank: (-1, -1)}
        edge = [rank]
        for here in edge:
            for place, others in self.others[here]:
                if not self.share[place]:
                    continue
                for other in others:
                    there = self.holder[other]
                    if there in came:
                        continue
                    came[there] = (place, other)
                    if self.load[there] < bound:
                        return came
                    edge.append(there)
        return came

    def shift(self, came: Mapping[int, tuple[int, int]], last: int, bound: int) -> None:
        """Hands on tokens along the way to the last rank, as many as it has room for and all can give."""
        way, rank = [], last
        while came[rank][0] >= 0:
            way.append(came[rank])
            rank = self.holder[came[rank][0]]
        amount = min(self.load[rank] - bound, bound - self.load[last], *(self.share[give] for give, _ in way))
        for give, take in way:
            self.share[give] -= amount
            self.share[take] += amount
        self.load[rank] -= amount
        self.load[last] += amount


def _cut(counts: np.ndarray, copies: np.ndarray, share: np.ndarray) -> np.ndarray:
    """int64[N, C]: each expert's tokens, laid in a row source by source, cut into shares copy by copy."""
    order, begins = _by_expert(copies)
    expert = copies[order]
    end = np.cumsum(share[order])
    end -= np.append(0, end)[begins][expert]
    last = np.cumsum(counts, axis=0)
    low = np.maximum((last - counts)[:, expert], end - share[order])
    high = np.minimum(last[:, expert], end)
    spread = np.empty((len(counts), len(copies)), dtype=np.int64)
    spread[:, order] = np.maximum(high - low, 0)
    return spread


COPY_CHOICES: dict[str, CopyChoice] = {
    "round_robin": round_robin,
    "local_first": local_first,
    "least_loaded": least_loaded,
}
