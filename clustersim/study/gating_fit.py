"""Two questions: which generator gives expert loads like these, and what do those of a scenario look like?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clustersim.errors import ClustersimError, nearest
from clustersim.plan.conditional import counts, log_odds, suffixes
from clustersim.plan.popularity import fitted_curve, gini, load_shares, settled
from clustersim.seeds import stream
from clustersim.spec.documents import DocumentError
from clustersim.spec.routing import NoSuchMeasurement, Routing, choose, listed, read_routing
from clustersim.spec.scenario import Scenario
from clustersim.spec.workload import LayerCurve
from clustersim.study.idle import gating_notes

#: A fit is good where the Gini coefficient is off by at most this, the busiest expert by this share, and no
#: more than this share of the tokens is at another rank of popularity.
GINI_WITHIN, PEAK_WITHIN, MISPLACED_WITHIN = 0.02, 0.10, 0.10
#: Bends that are tried, and the points of a rank curve that are shown.
_BENDS = np.linspace(-1.5, 1.5, 31)
_POINTS = 16
#: With fewer tokens per expert the draw itself makes loads uneven, which the fit must leave room for.
_PLENTY = 2000
_ROUNDS, _DRAWS = 6, 16
#: Draws whose mean is held against what was measured: of few tokens a single one says little.
_SHOWN = 16


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """One measurement and the generator that gives the like.

    curves   one per measured layer
    drawn    int64[L, draws, E] tokens per expert in some draws of as many tokens as were measured
    """

    routing: Routing
    curves: tuple[LayerCurve, ...]
    drawn: np.ndarray


def read(path: Path, top_k: int = 0, only: str = "", measurement: str = "") -> list[Routing]:
    """The measurements of a file whose names hold `only`, or the one that is called `measurement`.

    top_k    experts of a token, where the file does not say
    Raises   ClustersimError that names the file, the line and what is wanted
    """
    try:
        found = read_routing(path)
        chosen = [choose(found, measurement)] if measurement else found
    except NoSuchMeasurement as error:
        raise ClustersimError(f"--measurement: {path} {error.problem}") from None
    except DocumentError as error:
        at = f":{error.line}" if error.line else ""
        raise ClustersimError(f"{path}{at}: {error.problem}") from None
    chosen = [routing for routing in chosen if only.casefold() in routing.name.casefold()]
    if not chosen:
        near = nearest(only, [routing.name for routing in found])
        raise ClustersimError(
            f'--only "{only}": {path} holds no such measurement{near}; there are {listed(found)}'
        )
    return [_with_top_k(routing, top_k, path) for routing in chosen]


def _with_top_k(routing: Routing, top_k: int, path: Path) -> Routing:
    """The measurement with what the file does not say."""
    experts = routing.counts.shape[1]
    if top_k and routing.top_k not in (0, top_k):
        said = f'{path} says top-{routing.top_k} of "{routing.name}" itself'
        raise ClustersimError(f"--top-k {top_k}: {said}; leave it out")
    if routing.top_k > experts:
        said = f"{experts} expert{'s' * (experts > 1)}, fewer than the {routing.top_k} of a token"
        raise ClustersimError(f'{path}: "{routing.name}" has {said}')
    if top_k > experts:
        raise ClustersimError(
            f"--top-k {top_k}: {path} has experts 0 to {experts - 1}; at most {experts} can be"
        )
    return replace(routing, top_k=routing.top_k or top_k)


def fit(routing: Routing, seed: int = 0) -> Fit:
    """The Gini coefficient, the busiest expert and the bend of every layer."""
    top_k = max(routing.top_k, 1)
    curves, drawn = [], []
    for at, layer in enumerate(routing.layers):
        measured = routing.counts[at]
        curve = _settled(measured, layer, top_k, seed)
        curves.append(curve)
        drawn.append(_draw(curve, measured, top_k, _SHOWN, seed, layer))
    return Fit(routing, tuple(curves), np.stack(drawn))


def _settled(measured: np.ndarray, layer: int, top_k: int, seed: int) -> LayerCurve:
    """A curve whose draws are like what was measured, the unevenness of the draw itself left out."""
    wished = float(gini(measured))
    peak = float(measured.max() / measured.mean())
    curve = _bent(measured, layer, wished, peak, top_k)
    if measured.mean() >= _PLENTY:
        return curve
    target, top = wished, peak
    for _ in range(_ROUNDS):
        some = _draw(curve, measured, top_k, _DRAWS, seed, layer, 1)
        target = min(max(target + wished - float(gini(some).mean()), 0.0), 0.9999)
        found = float((some.max(axis=1) / some.mean(axis=1)).mean())
        top = min(max(top * peak / found, 1.0), len(measured) / top_k)
        curve = LayerCurve(layer=layer, gini=target, peak=top, bend=curve.bend)
    return curve


def _bent(measured: np.ndarray, layer: int, wished: float, peak: float, top_k: int) -> LayerCurve:
    by_rank = np.sort(measured / measured.sum())[::-1]

    def misplaced(bend: float) -> float:
        """Of the tokens, twice the share that another rank of popularity would get."""
        curve = LayerCurve(layer=layer, gini=wished, peak=max(peak, 1.0), bend=bend)
        return float(np.abs(fitted_curve(curve, len(measured), top_k) - by_rank).sum())

    bend = min((round(float(b), 2) for b in _BENDS), key=lambda b: (round(misplaced(b), 6), abs(b)))
    return LayerCurve(layer=layer, gini=wished, peak=max(peak, 1.0), bend=bend)


def _draw(
    curve: LayerCurve, measured: np.ndarray, top_k: int, draws: int, seed: int, *name: int
) -> np.ndarray:
    """int64[draws, E] of as many tokens as were measured."""
    share = fitted_curve(curve, len(measured), top_k)
    law = suffixes(log_odds(share[None], top_k), top_k)[0]
    tokens = max(round(int(measured.sum()) / top_k), 1)
    return counts(np.full(draws, tokens), law, stream(seed, "gating", "fit", *name))


def summary(fits: Sequence[Fit], path: Path) -> dict[str, Any]:
    """What `clustersim gating fit --json` prints: measured beside fitted, layer by layer."""
    within = {"gini": GINI_WITHIN, "max_over_mean": PEAK_WITHIN, "misplaced": MISPLACED_WITHIN}
    return {"file": str(path), "within": within, "measurements": [_measurement(one) for one in fits]}


def _measurement(one: Fit) -> dict[str, Any]:
    layers = []
    for at, curve in enumerate(one.curves):
        measured, fitted = _looks(one.routing.counts[at]), _looks(one.drawn[at])
        off = abs(measured["gini"] - fitted["gini"])
        peak = abs(fitted["max_over_mean"] / measured["max_over_mean"] - 1.0)
        by_rank = [_by_rank(counts) for counts in (one.routing.counts[at], one.drawn[at])]
        misplaced = float(np.abs(by_rank[0] - by_rank[1]).mean() / 2)
        layers.append(
            {
                "layer": curve.layer,
                "measured": measured,
                "fitted": fitted,
                "parameters": curve.model_dump(),
                "gini_error": off,
                "max_over_mean_error": peak,
                "misplaced": misplaced,
                "chance_gini": _chance_gini(one.routing.counts[at]),
                "kept": bool(off <= GINI_WITHIN and peak <= PEAK_WITHIN and misplaced <= MISPLACED_WITHIN),
            }
        )
    return {
        "name": one.routing.name,
        "top_k": one.routing.top_k or None,
        "experts": int(one.routing.counts.shape[1]),
        "named_again": one.routing.again,
        "layers": layers,
        "worst_gini_error": max(row["gini_error"] for row in layers),
        "worst_max_over_mean_error": max(row["max_over_mean_error"] for row in layers),
        "worst_misplaced": max(row["misplaced"] for row in layers),
        "kept": all(row["kept"] for row in layers),
    }


def _chance_gini(measured: np.ndarray) -> float:
    """Gini coefficient that chance alone gives about as many tokens to experts that are all alike.

    Of a normal distribution it is its standard deviation over its mean and the root of pi; counts of m
    tokens scatter by the root of m.
    """
    experts = len(measured)
    return float(np.sqrt((1.0 - 1.0 / experts) / (np.pi * max(float(measured.mean()), 1e-9))))


def _by_rank(load: np.ndarray) -> np.ndarray:
    """Loads over the mean, falling; of several draws the mean at every rank. float64[E]"""
    rows = np.atleast_2d(load)
    return np.asarray(np.sort(rows / rows.mean(axis=1, keepdims=True), axis=1)[:, ::-1].mean(axis=0))


def _looks(load: np.ndarray) -> dict[str, Any]:
    """Gini coefficient, busiest over mean, and the loads over the mean at ranks evenly apart."""
    by_rank = _by_rank(load)
    some = np.unique(np.round(np.linspace(0, len(by_rank) - 1, min(_POINTS, len(by_rank)))).astype(int))
    return {
        "gini": float(gini(load).mean()),
        "max_over_mean": float(by_rank[0]),
        "rank_curve": by_rank[some].tolist(),
    }


def to_toml(one: Fit, path: Path) -> str:
    """The [gating] table of a scenario that draws such loads."""
    rows = "".join(
        f"  {{ layer = {c.layer}, gini = {c.gini:.5f}, peak = {c.peak:.5g}, bend = {c.bend:.2f} }},\n"
        for c in one.curves
    )
    experts = one.routing.counts.shape[1]
    said = "".join(letter if letter.isprintable() else "?" for letter in f"{one.routing.name}, {path.name}")
    return f'# Fitted to {said}\n[gating]\nskew = "fitted"\nfitted_experts = {experts}\nlayers = [\n{rows}]\n'


def the_only(chosen: Sequence[Routing]) -> Routing:
    """The one measurement there is. Raises ClustersimError where there are several: a [gating] is of one."""
    if len(chosen) > 1:
        raise ClustersimError(
            f"--out takes one of {len(chosen)} measurements; choose by --measurement: {listed(chosen)}"
        )
    return chosen[0]


def write(one: Fit, path: Path, out: Path) -> None:
    """Writes the [gating] table. Raises ClustersimError where the file cannot be written."""
    part = out.with_name(f"{out.name}.part")
    try:
        part.write_text(to_toml(one, path), encoding="utf-8")
        os.replace(part, out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ClustersimError(f"--out {out}: {error.strerror or error}") from None


# --- what a scenario's gating looks like ----------------------------------------------------------


def look(scenario: Scenario) -> dict[str, Any]:
    """Gini coefficient, busiest expert and rank curve of every layer, and how they move.

    Raises   ClustersimError where the model has no experts
    """
    model = scenario.model
    if not model.experts:
        raise ClustersimError(f"{model.name} has no experts; nothing is gated")
    gating = settled(scenario)
    layers = [layer for layer in range(model.layers) if model.has_experts(layer)]
    first = load_shares(gating, model, scenario.seed)
    moves = []
    for step in _steps(scenario):
        share = load_shares(gating, model, scenario.seed, step)[layers]
        pairs = zip(first[layers], share, strict=True)
        moves.append(
            {
                "step": step,
                "gini": float(gini(share).mean()),
                "max_over_mean": float(share.max(axis=1).mean() * model.experts),
                "rank_correlation": float(np.mean([rank_correlation(a, b) for a, b in pairs])),
            }
        )
    return {
        "name": scenario.name,
        "skew": gating.skew,
        "motion": gating.motion,
        "experts": model.experts,
        "top_k": model.top_k,
        "layers": [
            {"layer": layer, **_looks(first[layer]), "busiest_expert": int(first[layer].argmax())}
            for layer in layers
        ],
        "steps": moves,
        "notes": gating_notes(scenario),
    }


def _steps(scenario: Scenario) -> list[int]:
    """Steps at which a motion shows."""
    g = scenario.gating
    half = max(round(g.half_life), 1)
    return {
        "still": [0],
        "drifting": [0, max(half // 2, 1), half, 2 * half, 4 * half],
        "bursting": [0, g.burst_every, g.burst_every + g.burst_steps, 2 * g.burst_every],
        "rotating": [0, g.rotate_every, 2 * g.rotate_every],
    }[g.motion]


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's coefficient; 1 where a load has no order, for then nothing has moved."""
    ranks = [
        np.argsort(np.argsort(load, kind="stable"), kind="stable").astype(float) for load in (one, other)
    ]
    if len(one) < 2 or np.array_equal(one, other):
        return 1.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
