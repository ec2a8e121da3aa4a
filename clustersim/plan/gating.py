"""Tokens → experts: how many tokens of every source rank go to every expert.

Every entry of GATINGS gives counts whose rows sum to tokens * top_k and of which none exceeds the
source's tokens: a token takes `top_k` different experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from clustersim.errors import pick
from clustersim.plan.distinct import counted
from clustersim.seeds import stream
from clustersim.spec.model import Model
from clustersim.spec.workload import Gating

Generator = np.random.Generator
Skew = Callable[[np.ndarray, np.ndarray, int, Generator], np.ndarray]
#: Tokens and their choices, block by block: int[T] sources, int[T, top_k] experts, int[T] how many such.
Chosen = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]

#: Tokens drawn at a time; bounds the memory of a draw, changes no result's distribution.
_DRAWN_TOGETHER = 1 << 17
#: Rejections before the rest is drawn with explicit exclusion; either way the law is the same.
_REJECTIONS = 8


def popularity(gating: Gating, experts: int, layer: int, seed: int) -> np.ndarray:
    """How likely each expert of a layer is to be a token's first choice.

    Returns  float64[E], sums to 1; rank r of the layer's own order has weight (r + 1) ** -exponent
    """
    exponent = gating.exponent if gating.skew == "zipf" else 0.0
    weight = np.arange(1, experts + 1, dtype=float) ** -exponent
    if gating.shuffle:
        weight = weight[stream(seed, "gating", "popularity", layer).permutation(experts)]
    return np.asarray(weight / weight.sum())


def even(tokens: np.ndarray, share: np.ndarray, top_k: int, rng: Generator) -> np.ndarray:
    """Every expert gets the same, to within one token, by dealing the choices out in turn.

    tokens   int[R] tokens of each source rank
    share    float64[E]; only its length matters here
    Returns  int64[R, E]
    """
    experts = len(share)
    choices = tokens.astype(np.int64) * top_k
    first = np.cumsum(choices) - choices
    whole, left = np.divmod(choices, experts)
    turn = (np.arange(experts) - first[:, None]) % experts
    return np.asarray(whole[:, None] + (turn < left[:, None]))


def drawn(tokens: np.ndarray, share: np.ndarray, top_k: int, rng: Generator) -> np.ndarray:
    """Each token draws its experts one after the other, without repetition, by popularity.

    Shapes as in `even`. Exact for every token: successive sampling (Plackett-Luce).
    """
    counts = np.zeros((len(tokens), len(share)), dtype=np.int64)
    for owners, chosen, _ in drawn_choices(tokens, share, top_k, rng):
        cells = owners[:, None] * len(share) + chosen
        counts += np.bincount(cells.ravel(), minlength=counts.size).reshape(counts.shape)
    return counts


def drawn_choices(tokens: np.ndarray, share: np.ndarray, top_k: int, rng: Generator) -> Chosen:
    """The choices behind `drawn`; the same generator gives the same ones."""
    source = np.repeat(np.arange(len(tokens)), tokens)
    for first in range(0, len(source), _DRAWN_TOGETHER):
        owners = source[first : first + _DRAWN_TOGETHER]
        yield owners, choose(len(owners), share, top_k, rng), np.ones(len(owners), dtype=np.int64)


def choose(tokens: int, share: np.ndarray, top_k: int, rng: Generator) -> np.ndarray:
    """The experts of each token in the order of choice.

    Returns  int64[T, top_k], no expert twice in a row
    """
    edges = np.cumsum(share)
    chosen = np.empty((tokens, top_k), dtype=np.int64)
    for k in range(top_k):
        todo = np.arange(tokens)
        for _ in range(_REJECTIONS):
            drawn = np.searchsorted(edges, rng.random(len(todo)) * edges[-1], side="right")
            chosen[todo, k] = np.minimum(drawn, len(share) - 1)
            todo = todo[(chosen[todo, :k] == chosen[todo, k : k + 1]).any(axis=1)]
            if not len(todo):
                break
        else:
            chosen[todo, k] = _choose_among_the_rest(chosen[todo, :k], share, rng)
    return chosen


def _choose_among_the_rest(taken: np.ndarray, share: np.ndarray, rng: Generator) -> np.ndarray:
    # Gumbel-max: the argmax of log-weight + Gumbel noise over what is left follows the same law.
    with np.errstate(divide="ignore"):
        score = np.log(share) + rng.gumbel(size=(len(taken), len(share)))
    np.put_along_axis(score, taken, -np.inf, axis=1)
    return np.asarray(score.argmax(axis=1))


def expert_counts(
    tokens: np.ndarray, model: Model, gating: Gating, seed: int, token_batch: int
) -> np.ndarray:
    """Gating of one token batch in every layer.

    tokens       int[N] tokens of each source rank of a stage
    token_batch  number of the token batch: its own draws, whatever else is drawn
    Returns      int64[L, N, E]
    """
    skew = pick(GATINGS, gating.skew, "gating.skew")
    return np.stack(
        [
            skew(
                tokens,
                popularity(gating, model.experts, layer, seed),
                model.top_k,
                stream(seed, "gating", "choice", token_batch, layer),
            )
            for layer in range(model.layers)
        ]
    )


def distinct_tokens(
    tokens: np.ndarray, model: Model, gating: Gating, seed: int, token_batch: int, home: np.ndarray
) -> np.ndarray | None:
    """Tokens of each source with an expert in each domain, by the choices behind `expert_counts`.

    home     int64[L, N, E] NVLink domain in which an expert stands for a source
    Returns  int64[L, N, D]; None where the skew gives counts only
    """
    choices = CHOICES.get(gating.skew)
    if choices is None:
        return None
    domains = int(home.max()) + 1
    return np.stack(
        [
            counted(
                choices(
                    tokens,
                    popularity(gating, model.experts, layer, seed),
                    model.top_k,
                    stream(seed, "gating", "choice", token_batch, layer),
                ),
                home[layer],
                domains,
            )
            for layer in range(model.layers)
        ]
    )


GATINGS: dict[str, Skew] = {"even": even, "zipf": drawn}
#: Skews whose tokens are known one by one, as far as somebody asks. Of even load only the counts are: how
#: it is dealt out says nothing about which experts a token takes together.
CHOICES: dict[str, Callable[[np.ndarray, np.ndarray, int, Generator], Chosen]] = {
    "zipf": drawn_choices,
}
