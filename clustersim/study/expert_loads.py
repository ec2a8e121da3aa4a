"""How many tokens each expert of the hottest rank gets in the load patterns that MoE benchmarks draw.

Measured rows name a pattern ("powerlaw_a1.2, EP 32, 4096 tokens"), not its counts. The benchmark draws a
weight for every expert from a power law, scales the weights to tokens x top_k, rounds, and times the rank
whose experts got most; the mean over fixed draws stands for what it drew.

Source   ai-dynamo/aiconfigurator@095f58a5 collector (the draw, retold from memory and held against
         `tokens_arriving_at_hot_rank` of wideep_moe_skew_trtllm_h100.csv and against the times of small
         batches, from which the number of experts in use can be read off)
"""

from __future__ import annotations

import re
from functools import cache
from heapq import heappop, heappush
from math import ceil, lgamma, log, log1p

import numpy as np

from clustersim.errors import ClustersimError
from clustersim.seeds import stream

#: Draws averaged; all token counts share them, so that curves over tokens are smooth.
DRAWS = 24
#: Weights lie between these as shares of the tokens if tokens x top_k exceeds the experts, else between
#: the second pair: bounds of the power law that is drawn from.
_MANY = (1.0, 0.8)
_FEW = (0.01, 2.0)
#: Rows of a block of DeepGEMM's contiguous layout, which "uniform" prefill rows are cut into.
BLOCK = 128

#: A draw is taken to lie no further from the mean of draws than by this factor.
_FAR = 2.0

#: How the name of a pattern ends whose busiest experts are copied.
LEVELLED = "_eplb"
_POWER_LAW = re.compile(rf"power_?law_a?(?P<alpha>[0-9]+(\.[0-9]+)?)(?P<levelled>{LEVELLED})?$")
_EVEN = ("balanced", "uniform")
#: The load patterns there are, for messages.
LOADS = "balanced, uniform, powerlaw_a<exponent>, power_law_<exponent>, power_law_<exponent>_eplb"


def known_load(distribution: str) -> bool:
    """Whether `hot_rank_counts` can draw a pattern."""
    return distribution in _EVEN or _POWER_LAW.match(distribution) is not None


def hot_rank_counts(
    tokens_global: int,
    top_k: int,
    experts: int,
    ep: int,
    distribution: str,
    slots: int = 0,
    front: bool = False,
) -> np.ndarray:
    """Expected tokens of each expert on the rank that is timed.

    tokens_global  tokens of the whole expert-parallel group
    distribution   "balanced", "uniform", "powerlaw_a1.2", "power_law_1.01", "power_law_1.2_eplb" (experts
                   replicated into `slots` and packed so that ranks are even)
    slots          expert copies over all ranks; 0: as many as experts
    front          tokens that rounding leaves over go to the first idle experts, not to evenly spaced ones
    Returns        float64[g], largest first; a count below one is the chance that the expert is used
    Raises         ClustersimError for a pattern that nobody here can draw
    """
    if distribution in _EVEN:
        return balanced_counts(tokens_global, top_k, experts, ep)
    drawn = _POWER_LAW.match(distribution)
    if drawn is None:
        raise ClustersimError(f'distribution = "{distribution}" is no known load; there are {LOADS}')
    alpha = float(drawn["alpha"])
    counts = _drawn(tokens_global, top_k, experts, alpha, front)
    if drawn["levelled"]:
        hottest = np.stack([_levelled(one, ep, max(slots, experts)) for one in counts])
    else:
        groups = counts.reshape(len(counts), ep, experts // ep)
        hottest = groups[np.arange(len(groups)), groups.sum(axis=2).argmax(axis=1)]
    mean: np.ndarray = -np.sort(-hottest, axis=1).mean(axis=0)
    return mean


def balanced_counts(tokens: int, top_k: int, experts: int, ep: int) -> np.ndarray:
    """float64[g] of the first rank when token t takes experts t, t + s, t + 2 s, … with s = experts / top_k;
    few tokens are spaced evenly over s, so that each finds experts of its own.
    """
    stride = ceil(experts / top_k)
    counts = np.zeros(experts)
    if tokens >= stride:
        cycles, rest = divmod(tokens, experts)
        start = np.arange(float(rest))
        counts += cycles * top_k
    else:
        start = np.arange(tokens) * (stride / tokens)
    chosen = (start[:, None] + np.arange(top_k) * stride).astype(np.int64) % experts
    counts += np.bincount(chosen.ravel(), minlength=experts)
    return counts[: experts // ep]


def block_counts(slots: float, held: int) -> np.ndarray:
    """float64[g] when tokens come in whole blocks of 128 rows, expert after expert, as benchmarks of
    contiguous layouts spread them: few tokens use few experts.
    """
    blocks, rest = divmod(slots / BLOCK, held)
    counts = np.full(held, blocks * BLOCK)
    full = int(rest)
    counts[:full] += BLOCK
    if full < held:
        counts[full] += (rest - full) * BLOCK
    return counts


def arriving(counts: np.ndarray, tokens: float) -> float:
    """How many of the tokens come to a rank whose experts get these counts, each token counted once."""
    missed = np.prod(1.0 - np.minimum(counts / tokens, 1.0))
    return float(tokens * (1.0 - missed))


def scaled_to_arrivals(counts: np.ndarray, tokens: float, arrived: float) -> np.ndarray:
    """The counts, larger or smaller by one factor, for which as many tokens arrive as were counted."""
    if arrived >= tokens - 0.5:
        # Nearly all arrive whatever the counts are: they say nothing then.
        return counts
    low, high = 1.0 / _FAR, _FAR
    for _ in range(40):
        middle = (low * high) ** 0.5
        enough = arriving(np.minimum(counts * middle, tokens), tokens) >= arrived
        low, high = (low, middle) if enough else (middle, high)
    return np.minimum(counts * high, tokens)


def random_counts(tokens: int, top_k: int, held: int, ep: int = 1) -> np.ndarray:
    """float64[held], largest first: the mean order of counts when tokens choose experts at random.

    tokens  of each rank
    held    experts of each rank
    ep      ranks whose tokens come to it
    """
    if top_k >= held * ep:
        return np.full(int(held), float(tokens * ep))
    shares = (_uniform(int(held)), top_k / (held * ep), int(tokens * ep))
    counts = -np.sort(-_binomial(*shares), axis=1).mean(axis=0)
    return np.asarray(counts * (tokens * top_k / counts.sum()))


def _binomial(at: np.ndarray, chance: float, trials: int) -> np.ndarray:
    """Quantiles of the binomial distribution."""
    most = int(trials * chance + 8.0 * (trials * chance) ** 0.5 + 8.0)
    hits = np.arange(min(most, trials) + 1)
    logs = np.array(
        [lgamma(trials + 1.0) - lgamma(h + 1.0) - lgamma(trials - h + 1.0) for h in hits.tolist()]
    )
    below = np.cumsum(np.exp(logs + hits * log(chance) + (trials - hits) * log1p(-chance)))
    return np.searchsorted(below, at).astype(np.float64)


@cache
def _uniform(experts: int) -> np.ndarray:
    """float64[DRAWS, experts], one of each DRAWS-quantile per expert, in random order."""
    rng = stream(0, "measured expert loads", experts)
    order = np.argsort(rng.random((DRAWS, experts)), axis=0)
    values: np.ndarray = (order + rng.random((DRAWS, experts))) / DRAWS
    return values


def _drawn(tokens: int, top_k: int, experts: int, alpha: float, front: bool) -> np.ndarray:
    """float64[DRAWS, experts] counts; a token uses an expert once, so none exceeds the tokens."""
    wanted = tokens * top_k
    low, high = (_MANY[0], _MANY[1] * tokens) if wanted > experts else _FEW
    # At an exponent of 1 the formula is the limit of its neighbours.
    rest = 1.0 - alpha if alpha != 1.0 else 1e-9
    weights = (_uniform(experts) * (high**rest - low**rest) + low**rest) ** (1.0 / rest)
    shares = _capped(weights / weights.sum(axis=1, keepdims=True) * wanted, float(tokens))
    counts = np.round(shares)
    for one in counts:
        _settle(one, int(wanted - one.sum()), front, tokens)
    return counts


def _capped(shares: np.ndarray, most: float) -> np.ndarray:
    """What exceeds the most goes to the others in proportion."""
    wanted = shares.sum(axis=1, keepdims=True)
    for _ in range(8):
        full = shares >= most
        kept = np.where(full, most, 0.0).sum(axis=1, keepdims=True)
        others = np.where(full, 0.0, shares).sum(axis=1, keepdims=True)
        shares = np.where(full, most, shares * ((wanted - kept) / np.maximum(others, 1e-300)))
    return np.asarray(np.minimum(shares, most))


def _settle(counts: np.ndarray, left: int, front: bool, most: int) -> None:
    """What rounding left over: to idle experts if there are, else to the busiest; or taken from the least."""
    if left > 0:
        idle = np.flatnonzero(counts == 0)
        given = min(left, len(idle))
        chosen = np.arange(given) if front else np.arange(given) * len(idle) // max(given, 1)
        counts[idle[chosen]] += 1
        left -= given
        order = np.argsort(-counts, kind="stable")
        order = order[counts[order] < most]
        counts[order[:left]] += 1
    elif left < 0:
        order = np.argsort(counts, kind="stable")
        order = order[counts[order] > 0]
        np.subtract.at(counts, order[np.arange(-left) % len(order)], 1)
        np.maximum(counts, 0, out=counts)


def _levelled(counts: np.ndarray, ep: int, slots: int) -> np.ndarray:
    """float64[slots / ep] of the busiest rank after the busiest experts were copied and all were packed."""
    heap = [(-count, 1) for count in sorted(counts.tolist(), reverse=True)]
    for _ in range(slots - len(heap)):
        count, copies = min(heap)
        heap.remove((count, copies))
        heap.append((count * copies / (copies + 1), copies + 1))
    pieces = sorted((-count for count, copies in heap for _ in range(copies)), reverse=True)
    held = slots // ep
    ranks: list[tuple[float, int, list[float]]] = [(0.0, rank, []) for rank in range(ep)]
    done: list[tuple[float, int, list[float]]] = []
    for piece in pieces:
        load, rank, mine = heappop(ranks)
        mine.append(piece)
        if len(mine) == held:
            done.append((load + piece, rank, mine))
        else:
            heappush(ranks, (load + piece, rank, mine))
    return np.array(max(done)[2])
