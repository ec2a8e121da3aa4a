"""Tokens that take `top_k` different experts, every expert with a given chance: conditional Poisson sampling.

Of all laws with the same chances of the single experts this is the most random one (of largest
entropy): a set of experts has probability proportional to the product of its experts' odds. Nothing
else is known about tokens of which only counts per expert are known, and plan.distinct supposes the same.
Odds are kept as logarithms: those of a model's experts reach over more than a float does.

Source   Chen, Dempster, Liu, Biometrika 81(3), 1994
"""

from __future__ import annotations

import numpy as np

Generator = np.random.Generator

#: Chances are not told apart from one and from zero within this.
_CERTAIN = 1e-9
#: Steps at most until the odds give the chances, and the error in chances at which they stop.
_STEPS = 500
_EXACT = 1e-11


def capped(share: np.ndarray, top_k: int) -> np.ndarray:
    """Shares of choices of which none exceeds what one expert can get, 1 / top_k.

    What is beyond goes to the others in proportion, evenly where these have nothing.

    share    float64[E], sums to 1
    Returns  float64[E], sums to 1
    """
    return below(share, 1.0 / min(top_k, len(share)))


def below(share: np.ndarray, most: float) -> np.ndarray:
    """As `capped`, with any largest share of at least 1 / E."""
    if most * len(share) <= 1.0 + 1e-12:
        return np.full(len(share), 1.0 / len(share))
    full = np.zeros(len(share), dtype=bool)
    found = share
    while (found > most * (1 + 1e-12)).any():
        full |= found > most * (1 - 1e-12)
        others = np.where(full, 0.0, share)
        if others.sum() <= 0.0:
            others = np.where(full, 0.0, 1.0)
        found = np.where(full, most, others * ((1.0 - full.sum() * most) / others.sum()))
    return np.asarray(found)


def log_odds(share: np.ndarray, top_k: int) -> np.ndarray:
    """The odds under which each expert gets its share of the choices, as logarithms.

    share    float64[X, E] of X laws, as `capped` gives them
    Returns  float64[X, E]; -inf for an expert that nobody takes
    """
    if top_k >= share.shape[1]:
        return np.zeros(share.shape)
    chance = _below_one(share * top_k, top_k)
    with np.errstate(divide="ignore"):
        wanted = np.log(chance) - np.log1p(-chance)
    odds = wanted.copy()
    for step in range(_STEPS):
        left_out = _without_one(odds, top_k)
        with np.errstate(invalid="ignore"):
            ratio = left_out[..., 0] - left_out[..., 1]
        found = odds + np.where(np.isfinite(ratio), ratio, 0.0)
        error = np.abs(1.0 / (1.0 + np.exp(-found)) - chance).max()
        with np.errstate(invalid="ignore"):
            # A whole step is right where experts are taken independently, half a step where one is
            # taken just when another is not; in turn they serve all that lies between.
            change = (wanted - found) / (1 + step % 2)
            odds = np.where(np.isfinite(wanted), odds + change, wanted)
        if error <= _EXACT:
            break
    return np.asarray(odds)


def _below_one(chance: np.ndarray, top_k: int) -> np.ndarray:
    """Chances of finite odds: what is certain is left a little, and the others get it."""
    certain = chance > 1.0 - _CERTAIN
    others = np.where(certain, 0.0, chance)
    left = top_k - certain.sum(axis=1, keepdims=True) * (1.0 - _CERTAIN)
    total = others.sum(axis=1, keepdims=True)
    spread = np.where(certain, 0.0, 1.0) / np.maximum((~certain).sum(axis=1, keepdims=True), 1)
    shared = np.where(total > 0.0, others / np.where(total > 0.0, total, 1.0), spread)
    return np.asarray(np.where(certain, 1.0 - _CERTAIN, shared * left))


def _without_one(odds: np.ndarray, top_k: int) -> np.ndarray:
    """Sums over all sets of top_k - 1 and of top_k experts other than each; float64[X, E, 2], logarithms."""
    after = suffixes(odds, top_k)
    before = suffixes(odds[:, ::-1], top_k)[:, :, ::-1]
    # before[x, r, e + 1] are those of the experts up to e, so before[x, r, e] those before e.
    parts = []
    for size in (top_k - 1, top_k):
        terms = [before[:, r, :-1] + after[:, size - r, 1:] for r in range(size + 1)]
        parts.append(np.logaddexp.reduce(np.stack(terms), axis=0))
    return np.stack(parts, axis=-1)


def suffixes(odds: np.ndarray, top_k: int) -> np.ndarray:
    """Sums over all sets of r of the experts from e on of the product of their odds, as logarithms.

    odds     float64[X, E] logarithms
    Returns  float64[X, top_k + 1, E + 1]
    """
    laws, experts = odds.shape
    sums = np.full((experts + 1, laws, top_k + 1), -np.inf)
    sums[:, :, 0] = 0.0
    for e in range(experts - 1, -1, -1):
        np.logaddexp(sums[e + 1, :, 1:], odds[:, e : e + 1] + sums[e + 1, :, :-1], out=sums[e, :, 1:])
    return np.ascontiguousarray(sums.transpose(1, 2, 0))


def choose(tokens: int, sums: np.ndarray, rng: Generator) -> np.ndarray:
    """The experts of each token.

    sums     float64[top_k + 1, E + 1] `suffixes` of one law
    Returns  int64[T, top_k] in ascending order, no expert twice in a row
    """
    top_k, experts = sums.shape[0] - 1, sums.shape[1] - 1
    chosen = np.empty((tokens, top_k), dtype=np.int64)
    at = np.zeros(tokens, dtype=np.int64)
    for k in range(top_k):
        left = sums[top_k - k]
        # Of the sets that lie in what is left, those that begin behind e are a share that falls with e.
        with np.errstate(divide="ignore"):
            point = left[at] + np.log(rng.random(tokens))
        found = experts - np.searchsorted(left[::-1], point, side="right")
        # Rounding must not lead back, nor so far that too few are left.
        chosen[:, k] = np.clip(found, at, experts - (top_k - k))
        at = chosen[:, k] + 1
    return chosen


def counts(tokens: np.ndarray, sums: np.ndarray, rng: Generator) -> np.ndarray:
    """Tokens of each source for each expert, without looking at single tokens; the law is that of `choose`.

    Experts are asked in turn how many of the tokens take them, of those that have r choices left:
    binomial draws, as all of these are alike.

    tokens   int[N] tokens of each source
    sums     as for `choose`
    Returns  int64[N, E]
    """
    top_k, experts = sums.shape[0] - 1, sums.shape[1] - 1
    with np.errstate(invalid="ignore"):
        passed = np.exp(sums[1:, 1:] - sums[1:, :-1])
    takes = np.clip(np.nan_to_num(1.0 - passed), 0.0, 1.0).T
    result = np.zeros((len(tokens), experts), dtype=np.int64)
    waiting = np.zeros((len(tokens), top_k + 1), dtype=np.int64)
    waiting[:, top_k] = tokens
    for e in range(experts):
        # Whoever needs all that are left takes them, however the shares were rounded.
        chance = np.where(np.arange(1, top_k + 1) >= experts - e, 1.0, takes[e])
        took = rng.binomial(waiting[:, 1:], chance)
        result[:, e] = took.sum(axis=1)
        waiting[:, 1:] -= took
        waiting[:, :-1] += took
    return result
