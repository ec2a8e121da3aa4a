"""Tokens → experts: how many tokens of every source rank go to every expert.

Every entry of GATINGS gives counts whose rows sum to tokens * top_k and of which none exceeds the
source's tokens: a token takes `top_k` different experts. By which law, plan.conditional says; how
popular an expert is, plan.popularity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np

from clustersim.errors import pick
from clustersim.plan.conditional import capped, choose, counts, log_odds, suffixes
from clustersim.plan.distinct import counted, expected_by_odds
from clustersim.plan.popularity import load_shares, moved, popularity, topic_popularity, topics_of
from clustersim.seeds import stream
from clustersim.spec.model import Model
from clustersim.spec.routing import unpacked
from clustersim.spec.workload import Gating

__all__ = ["CHOICES", "GATINGS", "distinct_tokens", "expert_counts", "popularity", "within_capacity"]

Generator = np.random.Generator
#: Tokens and their choices, block by block: int[T] sources, int[T, top_k] experts, int[T] how many such.
Chosen = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]

#: Tokens of a token batch up to which they are drawn one by one; beyond, their counts are. The law is
#: the same, but only single tokens can be counted once per NVLink domain.
DRAWN_ONE_BY_ONE = 1 << 16
#: Tokens drawn at a time, and tokens times experts scored at a time; they bound the memory of a draw and
#: change no result's distribution.
_DRAWN_TOGETHER = 1 << 17
_SCORED_TOGETHER = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """Which tokens are gated.

    tokens       int[N] of each source rank of a stage
    token_batch  number of the token batch: its own draws, whatever else is drawn
    step         steps of the run that came before: how far popularity has moved
    shards       of the attention; a shard's ranks follow each other. 0: every source is its own
    """

    tokens: np.ndarray
    model: Model
    gating: Gating
    seed: int
    token_batch: int
    step: int = 0
    shards: int = 0

    def rng(self, layer: int) -> Generator:
        """The generator of a layer's choices."""
        return stream(self.seed, "gating", "choice", self.token_batch, layer)

    @property
    def one_by_one(self) -> bool:
        """Whether every token is drawn."""
        return bool(self.tokens.sum() <= DRAWN_ONE_BY_ONE)


def even(tokens: np.ndarray, share: np.ndarray, top_k: int, rng: Generator) -> np.ndarray:
    """Every expert gets the same, to within one token, by dealing the choices out round by round.

    A round deals every expert once, in an order of its own: in one order for all of them, sources a few
    places apart would send to the same few servers, which no even load does.

    tokens   int[R] tokens of each source rank
    share    float64[E]; only its length matters here
    Returns  int64[R, E], of no source more choices of an expert than it has tokens
    """
    experts = share.shape[-1]
    whole, left = np.divmod(tokens.astype(np.int64) * top_k, experts)
    found = np.repeat(whole[:, None], experts, axis=1)
    end = np.cumsum(left)
    order = np.empty(-(-int(left.sum()) // experts) * experts, dtype=np.int64)
    for dealt in range(0, len(order), experts):
        # Who goes on into the next round has had some of its experts already.
        source = int(np.searchsorted(end, dealt, side="right"))
        had = order[end[source] - left[source] : dealt]
        turn = rng.permutation(experts)
        order[dealt : dealt + experts] = turn[np.argsort(np.isin(turn, had), kind="stable")]
    np.add.at(found, (np.repeat(np.arange(len(tokens)), left), order[: left.sum()]), 1)
    return found


def drawn(tokens: np.ndarray, share: np.ndarray, top_k: int, rng: Generator) -> np.ndarray:
    """Each token draws different experts at random; an expert gets its share of all choices on average.

    Shapes as in `even`.
    """
    if tokens.sum() > DRAWN_ONE_BY_ONE:
        return counts(tokens, _law(share, top_k), rng)
    return _counted(drawn_choices(tokens, share, top_k, rng), len(tokens), len(share))


def drawn_choices(tokens: np.ndarray, share: np.ndarray, top_k: int, rng: Generator) -> Chosen:
    """The choices behind `drawn`; the same generator gives the same ones."""
    law = _law(share, top_k)
    for owners in _owners(tokens, _DRAWN_TOGETHER):
        yield owners, choose(len(owners), law, rng), np.ones(len(owners), dtype=np.int64)


def _owners(tokens: np.ndarray, together: int) -> Iterator[np.ndarray]:
    """The source of every token, block by block."""
    source = np.repeat(np.arange(len(tokens)), tokens)
    for first in range(0, len(source), together):
        yield source[first : first + together]


def _counted(choices: Chosen, sources: int, experts: int) -> np.ndarray:
    found = np.zeros(sources * experts)
    for owners, chosen, times in choices:
        cells = (owners[:, None] * experts + chosen).ravel()
        found += np.bincount(cells, weights=np.repeat(times, chosen.shape[1]), minlength=len(found))
    return found.astype(np.int64).reshape(sources, experts)


def _law(share: np.ndarray, top_k: int) -> np.ndarray:
    """What plan.conditional draws from, float64[top_k + 1, E + 1]."""
    return _law_of(share.tobytes(), top_k)


@lru_cache(maxsize=256)
def _law_of(share: bytes, top_k: int) -> np.ndarray:
    # As long as popularity stands still, every pass has the same laws.
    return np.asarray(suffixes(_odds(np.frombuffer(share), top_k)[None], top_k)[0])


def _odds(share: np.ndarray, top_k: int) -> np.ndarray:
    """Logarithms of the odds of every expert, float64[E]."""
    share = capped(share, top_k)
    by_rank = np.argsort(-share, kind="stable")
    odds = np.empty(len(share))
    odds[by_rank] = _odds_by_rank(share[by_rank].tobytes(), top_k)
    return odds


@lru_cache(maxsize=1024)
def _odds_by_rank(shares: bytes, top_k: int) -> np.ndarray:
    # Layers mostly differ in who stands where, not in the shares: one solution serves them all.
    return np.asarray(log_odds(np.frombuffer(shares)[None], top_k)[0])


# --- ways that look beyond one layer's shares -----------------------------------------------------


def _simple(ask: Ask, layer: int, share: np.ndarray) -> np.ndarray:
    if ask.gating.skew == "even":
        return _dealt(ask.tokens.astype(np.int64).tobytes(), len(share), ask.model.top_k, layer)
    return GATINGS[ask.gating.skew](ask.tokens, share, ask.model.top_k, ask.rng(layer))


@lru_cache(maxsize=256)
def _dealt(tokens: bytes, experts: int, top_k: int, layer: int) -> np.ndarray:
    # Even load is the same in every pass, so that those that look alike are lowered once, and for every
    # seed. Layers differ: what one sends too much over a link, others make good.
    rng = stream(0, "gating", "even", layer)
    return even(np.frombuffer(tokens, dtype=np.int64), np.ones(experts), top_k, rng)


def _simple_choices(ask: Ask, layer: int, share: np.ndarray) -> Chosen:
    return CHOICES[ask.gating.skew](ask.tokens, share, ask.model.top_k, ask.rng(layer))


def _topic_tokens(ask: Ask) -> np.ndarray:
    """int64[N, Z] tokens of each source about each topic: a shard's requests have as many tokens each."""
    wish, sources = ask.gating, len(ask.tokens)
    each = sources // ask.shards if ask.shards else 1
    split = np.zeros((sources, wish.topics), dtype=np.int64)
    for source, tokens in enumerate(ask.tokens.tolist()):
        topics = topics_of(wish, wish.topic_requests, ask.seed, source // each)
        whole, left = divmod(tokens, wish.topic_requests)
        split[source] = whole * np.bincount(topics, minlength=wish.topics)
        split[source] += np.bincount(topics[:left], minlength=wish.topics)
    return split


def _topic_laws(ask: Ask, layer: int) -> np.ndarray:
    wish, model = ask.gating, ask.model
    laws = topic_popularity(wish, model.experts, layer, ask.seed, ask.step, model.top_k)
    return np.stack([moved(law, wish, layer, ask.seed, ask.step, model.top_k) for law in laws])


def _by_topic(ask: Ask, layer: int, share: np.ndarray) -> np.ndarray:
    if ask.one_by_one:
        return _counted(_by_topic_choices(ask, layer, share), len(ask.tokens), len(share))
    rng, parts = ask.rng(layer), zip(_topic_tokens(ask).T, _topic_laws(ask, layer), strict=True)
    return np.asarray(sum(counts(tokens, _law(law, ask.model.top_k), rng) for tokens, law in parts))


def _by_topic_choices(ask: Ask, layer: int, share: np.ndarray) -> Chosen:
    rng = ask.rng(layer)
    for tokens, law in zip(_topic_tokens(ask).T, _topic_laws(ask, layer), strict=True):
        yield from drawn_choices(tokens, law, ask.model.top_k, rng)


def _replayed(ask: Ask, layer: int, share: np.ndarray) -> np.ndarray:
    return _counted(_replayed_choices(ask, layer, share), len(ask.tokens), len(share))


def _replayed_choices(ask: Ask, layer: int, share: np.ndarray) -> Chosen:
    """Every token is one of those measured, at random, and the same one in all layers."""
    measured = unpacked(ask.gating.content)
    assert measured.ids is not None
    known = measured.ids[:, measured.nearest(layer)].astype(np.int64)
    rng = stream(ask.seed, "gating", "replayed", ask.token_batch)
    for source, tokens in enumerate(ask.tokens.tolist()):
        times = rng.multinomial(tokens, np.full(len(known), 1.0 / len(known)))
        some = np.flatnonzero(times)
        yield np.full(len(some), source), known[some], times[some]


def _in_groups(ask: Ask, layer: int, share: np.ndarray) -> np.ndarray:
    return _counted(_in_groups_choices(ask, layer, share), len(ask.tokens), len(share))


def _in_groups_choices(ask: Ask, layer: int, share: np.ndarray) -> Chosen:
    """Scores, the best groups of experts by the sum of their two best, the best experts inside of these.

    Scores are logarithms of popularity with Gumbel noise: without groups a token would take its experts
    one after the other by popularity.

    Source   DeepSeek-V3 technical report, section 2.1.2, and its published modelling code
    """
    model, rng = ask.model, ask.rng(layer)
    groups, each = model.expert_groups, model.experts // model.expert_groups
    # Of many alike, a share of all choices is a rate at which an expert comes up until top_k have.
    weight = -np.log1p(-np.minimum(share * model.top_k, 1.0 - 1e-9))
    with np.errstate(divide="ignore"):
        affinity = np.maximum(np.log(weight), -700.0)
    for owners in _owners(ask.tokens, max(_SCORED_TOGETHER // model.experts, 1)):
        score = affinity + rng.gumbel(size=(len(owners), model.experts))
        best = np.sort(score.reshape(-1, groups, each), axis=2)[:, :, -2:].sum(axis=2)
        out = np.argsort(-best, axis=1)[:, model.groups_chosen :]
        np.put_along_axis(score.reshape(-1, groups, each), out[:, :, None], -np.inf, axis=1)
        chosen = np.argpartition(-score, model.top_k - 1, axis=1)[:, : model.top_k]
        yield owners, chosen, np.ones(len(owners), dtype=np.int64)


def _way(gating: Gating, model: Model) -> str:
    if gating.node_limited and gating.skew != "even":
        return "in_groups"
    if gating.skew == "replayed" and gating.content:
        ids = unpacked(gating.content).ids
        return "tokens" if ids is not None and ids.shape[2] == model.top_k else "shares"
    return "topics" if gating.skew == "topics" else "shares"


#: way → (counts, choices) of a layer.
_WAYS: dict[
    str,
    tuple[Callable[[Ask, int, np.ndarray], np.ndarray], Callable[[Ask, int, np.ndarray], Chosen]],
] = {
    "shares": (_simple, _simple_choices),
    "topics": (_by_topic, _by_topic_choices),
    "tokens": (_replayed, _replayed_choices),
    "in_groups": (_in_groups, _in_groups_choices),
}


# --- all layers -----------------------------------------------------------------------------------


def expert_counts(
    tokens: np.ndarray,
    model: Model,
    gating: Gating,
    seed: int,
    token_batch: int,
    step: int = 0,
    shards: int = 0,
) -> np.ndarray:
    """Gating of one token batch in every layer. Arguments as of `Ask`.

    Returns      int64[L, N, E]
    """
    pick(GATINGS, gating.skew, "gating.skew")
    ask = Ask(tokens, model, gating, seed, token_batch, step, shards)
    of_layer = _WAYS[_way(gating, model)][0]
    shares = load_shares(gating, model, seed, step)
    if ask.one_by_one:
        return np.stack([of_layer(ask, layer, share) for layer, share in enumerate(shares)])
    # Every layer has its own generator, so who is drawn first changes nothing.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(lambda layer: of_layer(ask, layer, shares[layer]), range(len(shares)))))


def distinct_tokens(ask: Ask, home: np.ndarray, came: np.ndarray) -> np.ndarray | None:
    """Tokens of each source with an expert in each domain, by the choices behind `expert_counts`.

    home     int64[L, N, E] NVLink domain in which an expert stands for a source
    came     int64[L, N, E] what `expert_counts` gave
    Returns  [L, N, D]: counted, or expected under the same law where tokens were not drawn one by one;
             None where the skew gives counts only
    """
    if ask.gating.skew not in CHOICES:
        return None
    domains, way = int(home.max()) + 1, _way(ask.gating, ask.model)
    shares = load_shares(ask.gating, ask.model, ask.seed, ask.step)
    if ask.one_by_one or way in ("tokens", "in_groups"):
        choices = _WAYS[way][1]
        return np.stack(
            [counted(choices(ask, layer, share), home[layer], domains) for layer, share in enumerate(shares)]
        )
    if way == "topics":
        return None
    top_k = ask.model.top_k
    return np.stack(
        [
            expected_by_odds(came[layer], _odds(share, top_k), home[layer], domains, top_k)
            for layer, share in enumerate(shares)
        ]
    )


def within_capacity(came: np.ndarray, factor: float, sharers: int) -> np.ndarray:
    """What experts take when none takes more than `factor` times its even share of an EP group's choices.

    Every source loses the same share of what it sent to a full expert, to within one token: which
    tokens a framework drops (by position, by score) does not show in counts.

    came     int64[L, N, E] choices of every source
    factor   0: no bound
    sharers  ranks that share an expert (ETP): source i is in EP group i % sharers
    Returns  int64[L, N, E]
    """
    if not factor:
        return came
    layers, sources, experts = came.shape
    by_group = came.reshape(layers, sources // sharers, sharers, experts)
    whole = by_group.sum(axis=(1, 3))
    capacity = np.array([[ceil(factor * n / experts - 1e-9) for n in row] for row in whole.tolist()])
    total = by_group.sum(axis=1, keepdims=True)
    most = np.minimum(total, capacity[:, None, :, None])
    # Rounding what has come up to each source leaves just `most` in all.
    until = np.cumsum(by_group, axis=1) * most // np.maximum(total, 1)
    return np.asarray(np.diff(until, axis=1, prepend=0).reshape(came.shape))


_DRAWN = ("uniform", "zipf", "gini", "hot", "hot_rank", "topics", "fitted", "replayed")
#: Skew → counts from the tokens of each source and a layer's shares. Topics and measured tokens have ways
#: of their own in `expert_counts`; here they are drawn by their shares in all.
GATINGS: dict[str, Callable[[np.ndarray, np.ndarray, int, Generator], np.ndarray]] = {
    "even": even,
    **dict.fromkeys(_DRAWN, drawn),
}
#: Skews whose tokens are known one by one, as far as somebody asks. Of even load only the counts are: how
#: it is dealt out says nothing about which experts a token takes together.
CHOICES: dict[str, Callable[[np.ndarray, np.ndarray, int, Generator], Chosen]] = dict.fromkeys(
    _DRAWN, drawn_choices
)
