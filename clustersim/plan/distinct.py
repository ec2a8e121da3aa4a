"""Tokens counted once per NVLink domain, however many of their experts stand in it.

A hierarchical all-to-all sends a token once to every domain that holds some of its experts. Where
tokens were drawn one by one these are counted; where only counts per expert are known, expected.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

#: Scalings of the odds at most, and the error in choices per token at which they stop.
_SCALINGS = 200
_EXACT = 1e-9


def counted(
    choices: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    home: np.ndarray,
    domains: int,
) -> np.ndarray:
    """Tokens of each source with at least one choice in each domain.

    choices  blocks as an entry of plan.gating.CHOICES gives them
    home     int64[N, E] domain in which each expert stands for each source
    domains  D
    Returns  int64[N, D]
    """
    found = np.zeros(len(home) * domains)
    for owners, chosen, times in choices:
        cells = np.sort(owners[:, None] * domains + home[owners[:, None], chosen], axis=1)
        first = np.ones(cells.shape, dtype=bool)
        first[:, 1:] = cells[:, 1:] != cells[:, :-1]
        weights = np.broadcast_to(times[:, None], cells.shape)[first]
        found += np.bincount(cells[first], weights=weights, minlength=len(found))
    return found.reshape(len(home), domains).astype(np.int64)


def expected(tokens: np.ndarray, copies: np.ndarray, domain: np.ndarray, top_k: int) -> np.ndarray:
    """Tokens of each source that are expected to have a choice in each domain, counts per copy given.

    tokens   int64[N, C] tokens of each source for each expert copy
    copies   int32[C] logical expert of each
    domain   int64[C] domain in which each stands
    top_k    different experts a token takes
    Returns  float64[N, D]; at least the largest expert's tokens in the domain, at most all choices in it

    A token's set of experts is taken to be as random as the counts allow: it has probability
    proportional to the product of odds of its experts (conditional Poisson sampling: independent
    choices, given that there are just top_k). Within a domain the odds are those of independent
    choices with the given shares; they are scaled per domain until the expected choices in each
    domain are those counted. The result is exact for top_k = 1, and where all experts are chosen
    equally often (hypergeometric); of tokens drawn as plan.conditional does it is
    within 2.5 % in the cases of tests/test_distinct.py.

    Source   Chen, Dempster, Liu, Biometrika 81(3), 1994 (the law); Deming, Stephan, Annals of
             Mathematical Statistics 11(4), 1940 (scaling to given sums)
    """
    whole = tokens.sum(axis=1) / top_k
    share = tokens / np.maximum(whole, 1.0)[:, None]
    chosen = _by_domain(share, copies, domain)
    return np.asarray(_in_domains(share, chosen, chosen, domain, top_k) * whole[:, None])


def expected_by_odds(
    tokens: np.ndarray, odds: np.ndarray, home: np.ndarray, domains: int, top_k: int
) -> np.ndarray:
    """As `expected` where the odds of the experts are known: exact but for the sampling of the counts.

    tokens   int64[N, E] tokens of each source for each expert
    odds     float64[E] logarithms, as plan.conditional.log_odds gives them
    home     int64[N, E] domain in which each expert stands for each source
    Returns  float64[N, D]
    """
    whole = tokens.sum(axis=1) / top_k
    share = tokens / np.maximum(whole, 1.0)[:, None]
    once = _independent(odds, top_k)
    found = np.zeros((len(tokens), domains))
    for domain in np.unique(home, axis=0):
        rows = np.flatnonzero((home == domain).all(axis=1))
        experts = np.arange(len(odds))
        chosen = _by_domain(share[rows], experts, domain)
        alone = _by_domain(once[None], experts, domain)
        some = _in_domains(share[rows], chosen, np.repeat(alone, len(rows), axis=0), domain, top_k)
        found[rows, : some.shape[1]] = some * whole[rows, None]
    return found


def _independent(odds: np.ndarray, top_k: int) -> np.ndarray:
    """Chances of independent choices with these odds, scaled to top_k in the mean, float64[E]."""
    low, high = -800.0, 800.0
    for _ in range(80):
        middle = (low + high) / 2
        with np.errstate(over="ignore"):
            total = (1.0 / (1.0 + np.exp(-(odds + middle)))).sum()
        low, high = (middle, high) if total < top_k else (low, middle)
    with np.errstate(over="ignore"):
        return np.asarray(1.0 / (1.0 + np.exp(-(odds + middle))))


def _in_domains(
    share: np.ndarray, chosen: np.ndarray, alone: np.ndarray, domain: np.ndarray, top_k: int
) -> np.ndarray:
    """Share of a source's tokens with a choice in each domain, float64[N, D].

    share    float64[N, C] of its tokens for each place
    chosen   float64[N, D, most] the same by domain
    alone    float64[N, D, most] chances of independent choices with the experts' odds
    """
    domains = chosen.shape[1]
    chance = np.zeros((len(share), domains, top_k + 1))
    chance[:, :, 0] = 1.0
    for p in np.moveaxis(alone, 2, 0)[:, :, :, None]:
        chance[:, :, 1:] = chance[:, :, 1:] * (1 - p) + chance[:, :, :-1] * p
        chance[:, :, :1] *= 1 - p
    mean = share @ (domain[:, None] == np.arange(domains))
    some = 1.0 - _none_there(chance, mean)
    largest = chosen.max(axis=2)
    return np.asarray(np.clip(some, largest, np.minimum(mean, 1.0)))


def _by_domain(share: np.ndarray, copies: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """Share of a source's tokens that go to each expert of each domain, float64[N, D, most].

    A token goes to one copy of an expert only, so the copies in a domain count as one.
    """
    experts = int(copies.max()) + 1
    places, which = np.unique(domain * experts + copies, return_inverse=True)
    home = places // experts
    sizes = np.bincount(home)
    number = np.arange(len(places)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    found = np.zeros((len(share), len(sizes), int(sizes.max())))
    for copy, place in enumerate(which.tolist()):
        found[:, home[place], number[place]] += share[:, copy]
    return np.minimum(found, 1.0)


def _none_there(chance: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Chance that none of a token's choices lies in a domain.

    chance   float64[N, D, k + 1] of 0 … k independent choices in each domain
    mean     float64[N, D] choices there are to be expected; sums to k
    Returns  float64[N, D]
    """
    k = chance.shape[2] - 1
    number = np.arange(k + 1)
    for _ in range(_SCALINGS):
        chance = chance / chance.sum(axis=2, keepdims=True)
        joint = chance * _all_but_one(chance)[:, :, ::-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            given = np.nan_to_num(joint / joint.sum(axis=2, keepdims=True))
            found = given @ number
            scale = np.where(found > 0, mean / found, 1.0)
        if (np.abs(found - mean)[mean.sum(axis=1) > 0] <= _EXACT).all():
            break
        chance = chance * scale[:, :, None] ** number
    return np.asarray(given[:, :, 0])


def _all_but_one(factors: np.ndarray) -> np.ndarray:
    """For every domain the product of the polynomials of all others, to the same degree.

    factors  float64[N, D, k + 1]
    """
    n, domains, width = factors.shape
    if domains == 1:
        one = np.zeros_like(factors)
        one[:, :, 0] = 1.0
        return one
    if domains % 2:
        one = np.zeros((n, 1, width))
        one[:, :, 0] = 1.0
        return _all_but_one(np.concatenate([factors, one], axis=1))[:, :domains]
    even, odd = factors[:, 0::2], factors[:, 1::2]
    others = _all_but_one(_product(even, odd))
    result = np.empty_like(factors)
    result[:, 0::2], result[:, 1::2] = _product(others, odd), _product(others, even)
    return result


def _product(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of polynomials in the last axis, cut off at their degree."""
    result = np.zeros_like(one)
    width = one.shape[-1]
    for power in range(width):
        result[..., power:] += one[..., power : power + 1] * other[..., : width - power]
    return result
