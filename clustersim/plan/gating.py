"""Tokens → experts: how many tokens of every source rank go to every expert.

Every entry of GATINGS gives counts whose rows sum to tokens * top_k and of which none exceeds the
source's tokens: a token takes `top_k` different experts. By which law, plan.conditional says; how
popular an expert is, plan.popularity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

from clustersim.errors import pick
from clustersim.plan.conditional import capped, choose, counts, log_odds, suffixes
from clustersim.plan.distinct import counted
from clustersim.plan.popularity import load_shares, popularity
from clustersim.seeds import stream
from clustersim.spec.model import Model
from clustersim.spec.workload import Gating

__all__ = ["CHOICES", "GATINGS", "distinct_tokens", "expert_counts", "popularity"]

Generator = np.random.Generator
#: (tokens of every source, laws of a layer, tokens' law, top_k, generator) → counts.
Skew = Callable[[np.ndarray, np.ndarray, int, Generator], np.ndarray]
#: Tokens and their choices, block by block: int[T] sources, int[T, top_k] experts, int[T] how many such.
Chosen = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]

#: Tokens of a token batch up to which they are drawn one by one; beyond, their counts are. The law is
#: the same, but only single tokens can be counted once per NVLink domain.
DRAWN_ONE_BY_ONE = 1 << 16
#: Tokens drawn at a time; bounds the memory of a draw, changes no result's distribution.
_DRAWN_TOGETHER = 1 << 17


def even(tokens: np.ndarray, share: np.ndarray, top_k: int, rng: Generator) -> np.ndarray:
    """Every expert gets the same, to within one token, by dealing the choices out in turn.

    tokens   int[R] tokens of each source rank
    share    float64[E]; only its length matters here
    Returns  int64[R, E]
    """
    experts = share.shape[-1]
    choices = tokens.astype(np.int64) * top_k
    first = np.cumsum(choices) - choices
    whole, left = np.divmod(choices, experts)
    turn = (np.arange(experts) - first[:, None]) % experts
    return np.asarray(whole[:, None] + (turn < left[:, None]))


def drawn(tokens: np.ndarray, share: np.ndarray, top_k: int, rng: Generator) -> np.ndarray:
    """Each token draws different experts at random; an expert gets its share of all choices on average.

    Shapes as in `even`.
    """
    if tokens.sum() > DRAWN_ONE_BY_ONE:
        return counts(tokens, _law(share, top_k), rng)
    found = np.zeros((len(tokens), len(share)), dtype=np.int64)
    for owners, chosen, _ in drawn_choices(tokens, share, top_k, rng):
        cells = owners[:, None] * len(share) + chosen
        found += np.bincount(cells.ravel(), minlength=found.size).reshape(found.shape)
    return found


def drawn_choices(tokens: np.ndarray, share: np.ndarray, top_k: int, rng: Generator) -> Chosen:
    """The choices behind `drawn`; the same generator gives the same ones."""
    source = np.repeat(np.arange(len(tokens)), tokens)
    law = _law(share, top_k)
    for first in range(0, len(source), _DRAWN_TOGETHER):
        owners = source[first : first + _DRAWN_TOGETHER]
        yield owners, choose(len(owners), law, rng), np.ones(len(owners), dtype=np.int64)


def _law(share: np.ndarray, top_k: int) -> np.ndarray:
    """What plan.conditional draws from, float64[top_k + 1, E + 1]."""
    share = capped(share, top_k)
    by_rank = np.argsort(-share, kind="stable")
    odds = np.empty(len(share))
    odds[by_rank] = _odds_by_rank(share[by_rank].tobytes(), top_k)
    return np.asarray(suffixes(odds[None], top_k)[0])


@lru_cache(maxsize=1024)
def _odds_by_rank(shares: bytes, top_k: int) -> np.ndarray:
    # Layers mostly differ in who stands where, not in the shares: one solution serves them all.
    return np.asarray(log_odds(np.frombuffer(shares)[None], top_k)[0])


def expert_counts(
    tokens: np.ndarray, model: Model, gating: Gating, seed: int, token_batch: int, step: int = 0
) -> np.ndarray:
    """Gating of one token batch in every layer.

    tokens       int[N] tokens of each source rank of a stage
    token_batch  number of the token batch: its own draws, whatever else is drawn
    step         steps of the run that came before: how far popularity has moved
    Returns      int64[L, N, E]
    """
    skew = pick(GATINGS, gating.skew, "gating.skew")
    shares = load_shares(gating, model, seed, step)
    return np.stack(
        [
            skew(tokens, share, model.top_k, stream(seed, "gating", "choice", token_batch, layer))
            for layer, share in enumerate(shares)
        ]
    )


def distinct_tokens(
    tokens: np.ndarray,
    model: Model,
    gating: Gating,
    seed: int,
    token_batch: int,
    home: np.ndarray,
    step: int = 0,
) -> np.ndarray | None:
    """Tokens of each source with an expert in each domain, by the choices behind `expert_counts`.

    home     int64[L, N, E] NVLink domain in which an expert stands for a source
    Returns  int64[L, N, D]; None where the skew gives counts only
    """
    choices = CHOICES.get(gating.skew)
    if choices is None or tokens.sum() > DRAWN_ONE_BY_ONE:
        return None
    domains = int(home.max()) + 1
    shares = load_shares(gating, model, seed, step)
    return np.stack(
        [
            counted(
                choices(tokens, share, model.top_k, stream(seed, "gating", "choice", token_batch, layer)),
                home[layer],
                domains,
            )
            for layer, share in enumerate(shares)
        ]
    )


_DRAWN = ("uniform", "zipf", "gini", "hot", "hot_rank", "topics", "fitted", "replayed")
GATINGS: dict[str, Skew] = {"even": even, **dict.fromkeys(_DRAWN, drawn)}
#: Skews whose tokens are known one by one, as far as somebody asks. Of even load only the counts are: how
#: it is dealt out says nothing about which experts a token takes together.
CHOICES: dict[str, Callable[[np.ndarray, np.ndarray, int, Generator], Chosen]] = dict.fromkeys(
    _DRAWN, drawn_choices
)
