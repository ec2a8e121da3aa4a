"""Which copy of an expert serves whose tokens.

Every entry of COPY_CHOICES spreads each source's tokens for an expert over the expert's copies and keeps
their number. Round robin and nearest first are what a sender can do by itself. Least loaded knows what
all senders have: the best that one could do, as a linear program per batch does it.

Source   of the last: DeepSeek's LPLB, https://github.com/deepseek-ai/LPLB
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from clustersim.errors import pick

CopyChoice = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]

#: Rounds in which every expert is spread anew, given where the others went, at most. With a spare place on
#: each of 64 to 256 ranks it takes some 20 to 40; after four the busiest rank may be 5 % too high.
_ROUNDS = 1000


def round_robin(counts: np.ndarray, copies: np.ndarray, near: np.ndarray, slots: int) -> np.ndarray:
    """All copies of an expert serve every source in turn. Shapes as in `tokens_per_copy`."""
    return _in_turn(counts, copies, np.ones(near.shape, dtype=bool))


def local_first(counts: np.ndarray, copies: np.ndarray, near: np.ndarray, slots: int) -> np.ndarray:
    """Only the nearest copies of an expert serve a source, in turn. Shapes as above."""
    order, begins = _by_expert(copies)
    nearest = np.minimum.reduceat(near[:, order], begins, axis=1)
    return _in_turn(counts, copies, near == nearest[:, copies])


def least_loaded(counts: np.ndarray, copies: np.ndarray, near: np.ndarray, slots: int) -> np.ndarray:
    """Tokens go where they leave all ranks as evenly loaded as the copies allow. Shapes as above.

    Expert by expert, its tokens are poured onto the ranks that hold it until these stand level; in
    further rounds again, with the others' tokens where they are. Squares of the ranks' loads only fall
    by this, towards the one least maximum. Tokens of the first sources go to the first copies: sources
    and copies stand in the same order of ranks, so that many stay near.
    """
    total = counts.sum(axis=0).astype(np.int64)
    share = _levelled(total, copies, np.arange(len(copies)) // slots)
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


def _levelled(total: np.ndarray, copies: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """int64[C] tokens for every copy. total int[E]; rank int[C] who holds it."""
    order, begins = _by_expert(copies)
    places = [part.tolist() for part in np.split(order, begins[1:])]
    load = [0] * (int(rank.max()) + 1)
    holder, tokens = rank.tolist(), total.tolist()
    share = [0] * len(copies)
    several = []
    for expert, held in enumerate(places):
        if len(held) == 1:
            share[held[0]] = tokens[expert]
            load[holder[held[0]]] += tokens[expert]
        elif tokens[expert]:
            several.append(expert)
    several.sort(key=lambda expert: -tokens[expert] / len(places[expert]))
    for turn in range(_ROUNDS):
        moved = False
        for expert in several:
            held = places[expert]
            ranks = [holder[place] for place in held]
            old, before = [share[place] for place in held], _unevenness(ranks, load)
            _add(load, ranks, [-amount for amount in old])
            new = _poured(tokens[expert], ranks, load)
            _add(load, ranks, new)
            # What is as level as before stays, or experts would hand a token round for ever.
            if turn and _unevenness(ranks, load) >= before:
                _add(load, ranks, [was - amount for was, amount in zip(old, new, strict=True)])
                continue
            moved = True
            for place, amount in zip(held, new, strict=True):
                share[place] = amount
        if not moved:
            break
    return np.array(share, dtype=np.int64)


def _unevenness(ranks: Sequence[int], load: Sequence[int]) -> int:
    """Sum of squared loads of some ranks: with the same tokens on them, less is more level."""
    return sum(load[rank] ** 2 for rank in set(ranks))


def _add(load: list[int], ranks: Sequence[int], amounts: Sequence[int]) -> None:
    for rank, amount in zip(ranks, amounts, strict=True):
        load[rank] += amount


def _poured(amount: int, ranks: Sequence[int], load: Sequence[int]) -> list[int]:
    """How much of an amount each of some ranks gets, so that the least loaded end up level.

    Of several copies on one rank the first gets all: they are one to the level.
    """
    first = {rank: n for n, rank in reversed(list(enumerate(ranks)))}
    order = sorted(first, key=lambda rank: (load[rank], first[rank]))
    level, wet = amount + load[order[0]], 1
    while wet < len(order) and level > wet * load[order[wet]]:
        level += load[order[wet]]
        wet += 1
    each, over = divmod(level, wet)
    found = [0] * len(ranks)
    for n, rank in enumerate(order[:wet]):
        found[first[rank]] = each + (n < over) - load[rank]
    return found


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
