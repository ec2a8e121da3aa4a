"""How popular the experts of a layer are: the law, who stands where in it, and how that moves.

A law gives shares of all choices by rank, the most popular first. An order says which rank an expert
has. Motions change the order, or add a burst to the shares. All of it follows from the seed, the
layer and the step alone: any step can be asked for without those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from statistics import NormalDist

import numpy as np

from clustersim.errors import pick
from clustersim.plan.conditional import below, capped
from clustersim.seeds import stream
from clustersim.spec.model import Model
from clustersim.spec.routing import unpacked
from clustersim.spec.scenario import Scenario
from clustersim.spec.workload import Gating, LayerCurve, burst_experts, fewest_hot

#: Halvings of an interval of exponents; the last is below what a float can tell apart.
_HALVINGS = 60
#: Widest lognormal that is tried, as standard deviation of the logarithm.
_WIDEST = 100.0
#: Spans of layers that a sentence names.
_SPANS = 6
#: Waves whose sum is a drifting score.
_WAVES = 32
#: Correlation of two normal scores at which that of their ranks is one half: 2 sin(pi / 12).
_HALF = 2.0 * np.sin(np.pi / 12.0)


def settled(scenario: Scenario) -> Gating:
    """The scenario's gating with the number of experts on a rank filled in where a hot rank needs it."""
    gating = scenario.gating
    if gating.skew != "hot_rank" or gating.hot_experts:
        return gating
    held = max(scenario.model.experts // scenario.deployment.expert_parallel, 1)
    return gating.model_copy(update={"hot_experts": held})


def popularity(
    gating: Gating, experts: int, layer: int, seed: int, step: int = 0, top_k: int = 1
) -> np.ndarray:
    """Share of a layer's choices that each expert is expected to get.

    step     steps of the run that came before
    top_k    no share exceeds 1 / top_k
    Returns  float64[E], sums to 1
    """
    shares = pick(SHARES, gating.skew, "gating.skew")
    return moved(shares(gating, experts, layer, seed, step, top_k), gating, layer, seed, step, top_k)


def moved(share: np.ndarray, gating: Gating, layer: int, seed: int, step: int, top_k: int) -> np.ndarray:
    """Shares after the bursts and rotations of so many steps, float64[E]."""
    return MOTIONS[gating.motion](share, gating, layer, seed, step, top_k)


def load_shares(gating: Gating, model: Model, seed: int, step: int = 0) -> np.ndarray:
    """`popularity` of all layers, float64[L, E]."""
    return np.stack(
        [popularity(gating, model.experts, layer, seed, step, model.top_k) for layer in range(model.layers)]
    )


def stand_ins(gating: Gating, model: Model) -> list[str]:
    """Sentences on what popularity stands for where it is not what was asked for or measured.

    That is: a Zipf law cut to what an expert can get; fitted or measured layers that stand for others, or
    have other choices.
    """
    if gating.skew == "zipf":
        return _cut_zipf(gating, model)
    if gating.skew == "fitted":
        return _standing(sorted(curve.layer for curve in gating.layers), "fitted", model)
    if gating.skew != "replayed" or not gating.content:
        return []
    measured = unpacked(gating.content)
    notes = _standing(measured.layers, "measured", model)
    if measured.top_k not in (0, model.top_k):
        notes.append(f"Measured with top-{measured.top_k}; a token of {model.name} takes top-{model.top_k}.")
    if measured.again:
        notes.append(
            f"{measured.again:,} rows of the measured counts name an expert of a layer once more; they are "
            "added up."
        )
    return notes


def _cut_zipf(gating: Gating, model: Model) -> list[str]:
    """A sentence on a Zipf law whose first experts would get more than an expert can."""
    if not model.experts:
        return []
    wished = _power_law(model.experts, gating.exponent)
    most = 1.0 / model.top_k
    if wished[0] <= most * (1 + 1e-9):
        return []
    full = int((capped(wished, model.top_k) >= most * (1 - 1e-9)).sum())
    cut = "first expert is cut to that" if full == 1 else f"first {full} experts get just that"
    return [
        f"No expert can get more than 1/{model.top_k} of a layer's choices (top-{model.top_k}), "
        f"{most * model.experts:.2f} x the mean: the Zipf law's {cut}, where the law asks for "
        f"{wished[0] * model.experts:.2f} x for the first, and what is cut off goes to the others."
    ]


def _standing(known: Sequence[int], what: str, model: Model) -> list[str]:
    """Sentences on layers that others stand for, and on those that stand for none."""
    layers = [layer for layer in range(model.layers) if model.has_experts(layer)]
    of = {layer: min(known, key=lambda one: abs(one - layer)) for layer in layers}
    spans = [
        f"{_span([layer for layer, _ in run])} as layer {stands}"
        for stands, some in groupby(((n, one) for n, one in of.items() if n != one), key=lambda pair: pair[1])
        for run in [list(some)]
    ]
    notes = []
    if spans:
        more = f" and {len(spans) - _SPANS} more" if len(spans) > _SPANS else ""
        said = ", ".join(spans[:_SPANS]) + more
        notes.append(f"Layers that were not {what} have the popularity of the nearest one that was: {said}.")
    left = [layer for layer in known if layer not in of.values()]
    if left:
        few = ", ".join(map(str, left[:_SPANS])) + (" ..." if len(left) > _SPANS else "")
        notes.append(
            f"{len(left)} {what} layer{'s' * (len(left) > 1)} ({few}) stand{'s' * (len(left) == 1)} for no "
            f"layer with experts of {model.name}."
        )
    return notes


def _span(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"


def gini(load: np.ndarray) -> np.ndarray:
    """Gini coefficient of each row: 0 all alike, 1 - 1 / E one has it all.

    load     [..., E], at least 0
    Returns  float64[...]; 0 where there is no load
    """
    n = load.shape[-1]
    rising = np.sort(np.asarray(load, dtype=float), axis=-1)
    total = rising.sum(axis=-1)
    weighted = rising @ (2.0 * np.arange(1, n + 1) - n - 1)
    return np.asarray(weighted / np.where(total > 0, n * total, 1.0))


# --- laws: shares by rank, falling ----------------------------------------------------------------


def _flat(gating: Gating, experts: int, top_k: int) -> np.ndarray:
    return np.full(experts, 1.0 / experts)


def _zipf(gating: Gating, experts: int, top_k: int) -> np.ndarray:
    return capped(_power_law(experts, gating.exponent), top_k)


def _power_law(experts: int, exponent: float) -> np.ndarray:
    weight = np.arange(1, experts + 1, dtype=float) ** -exponent
    return np.asarray(weight / weight.sum())


def _wished(gating: Gating, experts: int, top_k: int) -> np.ndarray:
    return lognormal(experts, gating.gini, top_k)


def _hot(gating: Gating, experts: int, top_k: int) -> np.ndarray:
    hot = min(_hot_experts(gating, top_k), experts)
    share = np.full(experts, (1.0 - gating.hot_share) / max(experts - hot, 1))
    share[:hot] = gating.hot_share / hot
    return capped(share / share.sum(), top_k)


def _hot_experts(gating: Gating, top_k: int) -> int:
    return gating.hot_experts or fewest_hot(gating.hot_share, top_k)


@lru_cache(maxsize=1024)
def lognormal(experts: int, wished: float, top_k: int, peak: float = 0.0, bend: float = 0.0) -> np.ndarray:
    """Shares by rank whose Gini coefficient is the wished one, to 1e-9.

    The logarithms are those of a normal distribution's quantiles, as wide as needed (bisection). Counts
    that were measured fall like that: at equal Gini a power law has a hottest expert that is too hot
    and a tail that is too flat (see `clustersim gating fit`).

    peak     of the hottest expert, over the mean; 0: what the law gives
    bend     adds so much of the squared quantile: the hot ones stand out more, and the cold ones less
    Returns  float64[E], falling; the nearest Gini coefficient where the wished one cannot be
    """
    z = _quantiles(experts)
    form = z + bend * z * z / 2.0
    low, high = 0.0, _WIDEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        share = _peaked(np.exp(middle * (form - form.max())), top_k, peak)
        low, high = (middle, high) if gini(share) < wished else (low, middle)
    found = np.sort(_peaked(np.exp(high * (form - form.max())), top_k, peak))[::-1]
    found.setflags(write=False)
    return found


def _peaked(weight: np.ndarray, top_k: int, peak: float) -> np.ndarray:
    """Weights as shares whose largest is `peak` times the mean, or what it is where no peak is given."""
    share = weight / weight.sum()
    if not peak:
        return capped(share, top_k)
    most = min(peak / len(share), 1.0 / top_k)
    if most >= 1.0:
        # One expert has it all: nothing is left to be shared out.
        return np.asarray(np.arange(len(share)) == share.argmax(), dtype=float)
    hottest = int(share.argmax())
    if share[hottest] < most:
        rest = np.delete(share, hottest)
        # Others than the hottest may be beyond its share once they have what it leaves them.
        return np.insert(below(rest / rest.sum(), most / (1.0 - most)) * (1.0 - most), hottest, most)
    return below(share, most)


@lru_cache(maxsize=64)
def _quantiles(experts: int) -> np.ndarray:
    normal = NormalDist()
    return np.array([normal.inv_cdf(1.0 - (r + 0.5) / experts) for r in range(experts)])


def fitted_curve(curve: LayerCurve, experts: int, top_k: int) -> np.ndarray:
    """Shares by rank with a layer's Gini coefficient, its busiest expert and its bend."""
    return lognormal(experts, curve.gini, top_k, curve.peak, curve.bend)


LAWS: dict[str, Callable[[Gating, int, int], np.ndarray]] = {
    "even": _flat,
    "uniform": _flat,
    "zipf": _zipf,
    "gini": _wished,
    "hot": _hot,
}


# --- who has which rank ---------------------------------------------------------------------------


def order(gating: Gating, experts: int, layer: int, seed: int, step: int, *name: int) -> np.ndarray:
    """The rank of every expert of a layer, int64[E].

    name     of a further order: experts rank differently for every topic
    """
    if not gating.shuffle:
        return np.arange(experts)
    at = step if gating.motion == "drifting" else 0
    own = _scores(gating, experts, seed, at, "popularity", layer, *name)
    score = own
    if gating.correlation:
        common = _scores(gating, experts, seed, at, "common", *name)
        score = np.sqrt(gating.correlation) * common + np.sqrt(1.0 - gating.correlation) * own
    rank = np.empty(experts, dtype=np.int64)
    rank[np.argsort(-score, kind="stable")] = np.arange(experts)
    return rank


def _scores(gating: Gating, experts: int, seed: int, step: int, *name: str | int) -> np.ndarray:
    """Normal scores of the experts, float64[E]; of a drift they are correlated from step to step.

    A drifting score is a sum of waves whose frequencies are drawn from a Cauchy distribution: then the
    correlation falls exponentially with the steps between, on average over experts exactly so.
    """
    rng = stream(seed, "gating", *name)
    if gating.motion != "drifting":
        return rng.standard_normal(experts)
    rate = -np.log(_HALF) / gating.half_life
    frequency = rate * rng.standard_cauchy((experts, _WAVES))
    phase = rng.uniform(0.0, 2.0 * np.pi, (experts, _WAVES))
    return np.asarray(np.sqrt(2.0 / _WAVES) * np.cos(frequency * step + phase).sum(axis=1))


# --- skews: shares by expert ----------------------------------------------------------------------


def _ranked(gating: Gating, experts: int, layer: int, seed: int, step: int, top_k: int) -> np.ndarray:
    rank = order(gating, experts, layer, seed, step)
    return np.asarray(LAWS[gating.skew](gating, experts, top_k)[rank])


def _on_rank(gating: Gating, experts: int, layer: int, seed: int, step: int, top_k: int) -> np.ndarray:
    first = gating.hot_rank * _hot_experts(gating, top_k)
    return np.asarray(np.roll(_hot(gating, experts, top_k), first))


def _fitted(gating: Gating, experts: int, layer: int, seed: int, step: int, top_k: int) -> np.ndarray:
    if not gating.layers:
        return np.asarray(_wished(gating, experts, top_k)[order(gating, experts, layer, seed, step)])
    nearest = min(gating.layers, key=lambda curve: abs(curve.layer - layer))
    return np.asarray(fitted_curve(nearest, experts, top_k)[order(gating, experts, layer, seed, step)])


def _replayed(gating: Gating, experts: int, layer: int, seed: int, step: int, top_k: int) -> np.ndarray:
    if not gating.content:
        return _flat(gating, experts, top_k)
    measured = unpacked(gating.content)
    counts = measured.counts[measured.nearest(layer)].astype(float)
    share = np.zeros(experts)
    share[: len(counts)] = counts / counts.sum()
    return capped(share, top_k)


def _topics(gating: Gating, experts: int, layer: int, seed: int, step: int, top_k: int) -> np.ndarray:
    each = topic_popularity(gating, experts, layer, seed, step, top_k)
    return np.asarray(topic_shares(gating) @ each)


def topic_shares(gating: Gating) -> np.ndarray:
    """Share of all requests that each topic has, float64[Z]."""
    weight = np.arange(1, gating.topics + 1, dtype=float) ** -gating.topic_exponent
    return np.asarray(weight / weight.sum())


def topic_popularity(
    gating: Gating, experts: int, layer: int, seed: int, step: int, top_k: int
) -> np.ndarray:
    """Shares of every topic's choices, float64[Z, E]."""
    law = _wished(gating, experts, top_k)
    return np.stack([law[order(gating, experts, layer, seed, step, z)] for z in range(gating.topics)])


def topics_of(gating: Gating, requests: int, seed: int, shard: int) -> np.ndarray:
    """The topic of each of a shard's requests, int64[requests]."""
    rng = stream(seed, "gating", "topics", shard)
    return rng.choice(gating.topics, size=requests, p=topic_shares(gating))


SHARES: dict[str, Callable[[Gating, int, int, int, int, int], np.ndarray]] = {
    **dict.fromkeys(LAWS, _ranked),
    "hot_rank": _on_rank,
    "topics": _topics,
    "fitted": _fitted,
    "replayed": _replayed,
}


# --- motions of the shares ------------------------------------------------------------------------


def _unmoved(share: np.ndarray, gating: Gating, layer: int, seed: int, step: int, top_k: int) -> np.ndarray:
    return share


def _bursting(share: np.ndarray, gating: Gating, layer: int, seed: int, step: int, top_k: int) -> np.ndarray:
    burst, since = divmod(step, gating.burst_every)
    if burst == 0 or since >= gating.burst_steps:
        return share
    experts = len(share)
    hot = stream(seed, "gating", "burst", burst, layer).permutation(experts)[: burst_experts(experts)]
    mixed = (1.0 - gating.burst_share) * share
    mixed[hot] += gating.burst_share / len(hot)
    return capped(mixed, top_k)


def _rotating(share: np.ndarray, gating: Gating, layer: int, seed: int, step: int, top_k: int) -> np.ndarray:
    onward = _hot_experts(gating, top_k) if gating.skew == "hot" else max(gating.hot_experts, 1)
    return np.roll(share, step // gating.rotate_every * onward)


MOTIONS: dict[str, Callable[[np.ndarray, Gating, int, int, int, int], np.ndarray]] = {
    "still": _unmoved,
    "drifting": _unmoved,
    "bursting": _bursting,
    "rotating": _rotating,
}
