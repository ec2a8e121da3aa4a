"""What holds a run up: the rank that is waited for, and why; hot experts that are spread over many ranks; or
the link that is slow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from clustersim.analysis.hot_experts import AFTER_SERVICE, HOT, HotExperts, hot_experts
from clustersim.analysis.latency import numbers, words
from clustersim.trace.record import Columns, Trace
from clustersim.units import show

Cause = Mapping[str, Any]

#: What costs less than this share of a step is no bottleneck.
_WORTH_A_CAUSE = 0.02
#: A reason that accounts for less than this share of what the rank takes longer is not told.
_WORTH_A_REASON = 0.1
#: Hot experts are one rank's where it bears this share of the waiting for them.
_ONE_RANK = 0.5
#: A GPU below this is not slow.
_SLOW = 1.02
#: Operators that are an expert's service.
_SERVICE = ("expert_gemm_1", "expert_activation", "expert_gemm_2")

#: Reasons: what a rank takes longer for.
EXPERT, GPU, SHARD, EXCHANGE = "hot expert", "slow GPU", "larger shard", "slow exchange"
#: Reasons that are no single rank's.
SPREAD, LINK = "hot experts on many ranks", "slow link"


def cause(trace: Trace) -> dict[str, Any] | None:
    """The rank for which others wait most; the hot experts of many ranks or the slow link that cost more;
    None where none of these is worth a word.

    Returns  reasons: of EXPERT, GPU, SHARD, EXCHANGE for a rank, the weightiest first; [SPREAD]; [LINK]
             rank, gpu, link: which; of hot experts on many ranks the worst
             layer, expert, expert_load: the expert with most tokens on the rank in the layer in which it is
             waited for most, and its tokens / mean of all copies, if it is a reason
             rank_load: tokens of the rank in that layer / mean of all ranks
             slowness: how many times as long its operators take as those of the median GPU, for the same work
             wait: s that each other GPU of its stage waits for it in a step, that a GPU waits for all hot
             experts together, or that a link's bytes take longer in a step; share: of a step
             ranks, moves, places: of hot experts on many ranks, as `HotExperts` has them
    """
    steps, period = _steps(trace)
    if not period:
        return None
    rank, wait = _most_waited_for(trace, steps)
    link, longer = _slow_link(trace, steps)
    slow = slowness(trace)
    worth = _WORTH_A_CAUSE * period
    reasons = _reasons(trace, rank, slow) if wait >= worth else []
    spread = hot_experts(trace, steps, slow)
    if spread and (spread.wait < worth or (reasons and not _more_than_one(spread, wait))):
        spread = None
    most = spread.wait if spread else wait
    if longer >= worth and (longer > most or (not spread and reasons in ([], [EXCHANGE]))):
        return {**_NOTHING, "reasons": [LINK], "link": link, "wait": longer, "share": longer / period}
    if spread:
        return _spread(trace, spread, slow, period)
    if not reasons:
        return None
    found = {**_NOTHING, "reasons": reasons, "rank": rank, "gpu": _gpu(trace, rank)}
    hot = _hottest(trace, rank) if EXPERT in reasons else {}
    about = {
        "rank_load": _rank_load(trace, rank, _layer(trace, rank)),
        "slowness": float(slow[rank]),
    }
    return {**found, **hot, **about, "wait": wait, "share": wait / period}


_NOTHING: dict[str, Any] = {
    **dict.fromkeys(
        ("rank", "gpu", "link", "layer", "expert", "expert_load", "rank_load", "slowness", "ranks")
    ),
    "moves": [],
    "places": [],
}


def _more_than_one(spread: HotExperts, wait: float) -> bool:
    """Whether waiting for hot experts is more than that for one rank, and mostly for others than one."""
    return spread.wait > wait and spread.one_rank < _ONE_RANK


def _spread(trace: Trace, spread: HotExperts, slowness: np.ndarray, period: float) -> dict[str, Any]:
    places = [
        {**one, "gpu": _gpu(trace, one["rank"]), "share": one["wait"] / period} for one in spread.places
    ]
    which = ("rank", "gpu", "layer", "expert", "expert_load", "rank_load")
    return {
        **_NOTHING,
        "reasons": [SPREAD],
        **{key: places[0][key] for key in which},
        "slowness": float(slowness[places[0]["rank"]]),
        "ranks": spread.ranks,
        "moves": spread.moves,
        "places": places,
        "wait": spread.wait,
        "share": spread.wait / period,
    }


def cause_notes(found: Cause | None) -> Iterator[str]:
    """The cause in one line, or nothing."""
    if found is None:
        return
    cost = f"{show(found['wait'], 'time')} of each step ({found['share']:.0%})"
    if found["link"] is not None:
        yield f"Link {found['link']} is the bottleneck: it is slow, and its bytes take {cost} longer for it."
        return
    if found["reasons"] == [SPREAD]:
        yield _said_spread(found, cost)
        return
    why = " and ".join(_SAID[reason](found) for reason in found["reasons"])
    even = found["reasons"] == [GPU] and found["rank_load"] < HOT
    alone = "; the rank is slow, not overloaded" if even else ""
    yield (
        f"Rank {found['rank']} ({found['gpu']}) is the bottleneck: {why}{alone}; "
        f"the others wait {cost} for it."
    )


def _said_spread(found: Cause, cost: str) -> str:
    moves = " and ".join(f"from {what} to {what}" for what in found["moves"])
    where = f"on another rank {moves}" if moves else "on several ranks"
    worst, *others = found["places"]
    then = [f"layer {one['layer']}, rank {one['rank']}, expert {one['expert']}" for one in others]
    return (
        f"Hot experts are the bottleneck, {where}: the GPUs wait {cost} for them, on {found['ranks']} ranks "
        f"in all. Worst is layer {worst['layer']}: expert {worst['expert']} on rank {worst['rank']} "
        f"({worst['gpu']}) gets {worst['expert_load']:.1f} x the mean tokens (the rank "
        f"{worst['rank_load']:.1f} x), {show(worst['wait'], 'time')} of each step ({worst['share']:.1%})"
        f"{'; then ' if then else ''}{'; '.join(then)}."
    )


def _said_expert(found: Cause) -> str:
    return (
        f"expert {found['expert']} of layer {found['layer']} gets {found['expert_load']:.1f} x the mean "
        f"tokens (the rank {found['rank_load']:.1f} x)"
    )


_SAID: dict[str, Callable[[Cause], str]] = {
    EXPERT: _said_expert,
    GPU: lambda found: f"its GPU takes {found['slowness']:.2f} x as long as the others for the same work",
    SHARD: lambda found: "its shard has more to do than the others",
    EXCHANGE: lambda found: "its exchanges take longer than those of the others",
}


# ---- who is waited for --------------------------------------------------------------------------


def _steps(trace: Trace) -> tuple[int, float]:
    """How many steps there were, and what one costs, s."""
    steps = trace.tables["steps"]
    count = len(numbers(steps, "start"))
    if not count:
        return 0, 0.0
    return count, float(numbers(steps, "end").max() - numbers(steps, "start").min()) / count


def _most_waited_for(trace: Trace, steps: int) -> tuple[int, float]:
    """The rank, and how long each other GPU of its stage waits for it in a step, s."""
    waits, ranks = trace.tables["waits"], trace.tables["ranks"]
    if not len(numbers(waits, "rank")):
        return 0, 0.0
    seconds = np.bincount(numbers(waits, "rank"), weights=numbers(waits, "seconds"))
    rank = int(seconds.argmax())
    others = int((numbers(ranks, "stage") == _of(ranks, "stage")[rank]).sum()) - 1
    return rank, float(seconds[rank]) / max(others, 1) / steps


def _of(ranks: Columns, name: str) -> dict[int, Any]:
    """Rank → what a column says of it."""
    return dict(zip(numbers(ranks, "rank").tolist(), numbers(ranks, name).tolist(), strict=True))


def _gpu(trace: Trace, rank: int) -> str:
    ranks = trace.tables["ranks"]
    place = int(np.argmax(numbers(ranks, "rank") == rank))
    return str(words(ranks, "gpu")[place])


# ---- why ----------------------------------------------------------------------------------------


def _reasons(trace: Trace, rank: int, slow: np.ndarray) -> list[str]:
    """What the rank takes longer for than the mean of its stage, each at the speed of the median GPU."""
    parts = {
        EXPERT: _busy(trace, "compute", _SERVICE, True) / slow,
        SHARD: _busy(trace, "compute", _SERVICE, False) / slow,
        EXCHANGE: _busy(trace, "exchange", (), False),
    }
    stage = _of(trace.tables["ranks"], "stage")
    mates = np.array([one for one, where in stage.items() if where == stage[rank]])
    longer = {reason: float(time[rank] - time[mates].mean()) for reason, time in parts.items()}
    longer[EXPERT] = max(longer[EXPERT], _service_beyond(trace, rank, slow))
    computing = float((parts[EXPERT] + parts[SHARD])[rank])
    longer[GPU] = computing * (slow[rank] - 1.0) if slow[rank] >= _SLOW else 0.0
    if _rank_load(trace, rank, _layer(trace, rank)) >= HOT:
        # Tokens for hot experts also come by its links.
        longer[EXPERT] += max(longer.pop(EXCHANGE), 0.0)
    else:
        longer[EXPERT] = 0.0
    whole = sum(max(time, 0.0) for time in longer.values())
    weighty = [reason for reason, time in longer.items() if time > 0 and time >= _WORTH_A_REASON * whole]
    return sorted(weighty, key=lambda reason: -longer[reason])


def slowness(trace: Trace) -> np.ndarray:
    """How many times as long each rank's operators took as the median GPU's would, float64[rank]."""
    ranks = trace.tables["ranks"]
    priced = np.bincount(numbers(ranks, "rank"), weights=numbers(ranks, "priced"))
    busy = _busy(trace, "compute", (), False)
    took = np.divide(busy, priced, out=np.ones_like(priced), where=priced > 0)
    middle = float(np.median(took))
    return took / middle if middle > 0 else np.ones_like(took)


def _busy(trace: Trace, kind: str, operators: tuple[str, ...], these: bool) -> np.ndarray:
    """Seconds each rank's compute stream was busy with these operators of a kind, or all others."""
    sums, size = trace.tables["sums"], len(numbers(trace.tables["ranks"], "rank"))
    chosen = (words(sums, "stream") == "compute") & (words(sums, "kind") == kind)
    chosen &= np.isin(words(sums, "operator"), operators) == these
    return np.bincount(numbers(sums, "rank")[chosen], weights=numbers(sums, "busy")[chosen], minlength=size)


def _service_beyond(trace: Trace, rank: int, slow: np.ndarray) -> float:
    """Seconds its experts take longer than the mean of ranks, summed over the layers and token batches in
    which they do: hot experts of other layers may be elsewhere."""
    table = trace.tables["experts"]
    if not len(numbers(table, "rank")):
        return 0.0
    ranks = int(numbers(table, "rank").max()) + 1
    layers = int(numbers(table, "layer").max()) + 1
    place = numbers(table, "token_batch").astype(np.int64) * layers + numbers(table, "layer")
    keys, which = np.unique(place * ranks + numbers(table, "rank"), return_inverse=True)
    begun = np.full(len(keys), np.inf)
    done = np.full(len(keys), -np.inf)
    np.minimum.at(begun, which, numbers(table, "served"))
    np.maximum.at(done, which, numbers(table, "done"))
    service = (done - begun) / slow[keys % ranks]
    starts = np.flatnonzero(np.diff(keys // ranks, prepend=-1))
    members = np.diff(starts, append=len(keys))
    mean = np.repeat(np.add.reduceat(service, starts) / members, members)
    mine = keys % ranks == rank
    return float(np.maximum(service[mine] - mean[mine], 0.0).sum())


def _layer(trace: Trace, rank: int) -> int:
    """The layer in which a rank is waited for most after the service of its experts."""
    waits = trace.tables["waits"]
    mine = (numbers(waits, "rank") == rank) & np.isin(words(waits, "operator"), AFTER_SERVICE)
    layer, seconds = numbers(waits, "layer")[mine], numbers(waits, "seconds")[mine]
    return int(np.bincount(layer, weights=seconds).argmax()) if len(layer) else -1


def _rank_load(trace: Trace, rank: int, layer: int) -> float:
    """Tokens of a rank's experts in a layer / mean over the ranks; 0 where it has none."""
    table = trace.tables["experts"]
    here = numbers(table, "layer") == layer
    owner, tokens = numbers(table, "rank")[here], numbers(table, "tokens")[here]
    ranks = len(np.unique(owner))
    total = float(tokens.sum())
    return float(tokens[owner == rank].sum()) * ranks / total if total else 0.0


def _hottest(trace: Trace, rank: int) -> dict[str, Any]:
    """The expert copy with most tokens on a rank, in the layer in which the rank is waited for most."""
    table, layer = trace.tables["experts"], _layer(trace, rank)
    here = numbers(table, "layer") == layer
    owner, slot, tokens = (numbers(table, name)[here] for name in ("rank", "slot", "tokens"))
    expert = numbers(table, "expert")[here]
    copies = len(np.unique(owner.astype(np.int64) * (int(slot.max()) + 1) + slot))
    mine = owner == rank
    got = np.bincount(expert[mine], weights=tokens[mine])
    most = int(got.argmax())
    return {
        "layer": layer,
        "expert": most,
        "expert_load": float(got[most]) * copies / float(tokens.sum()),
    }


def _slow_link(trace: Trace, steps: int) -> tuple[str | None, float]:
    """The link whose bytes take most longer in a step because faults slow it, and how much, s."""
    links, window = trace.tables["links"], float(trace.facts["simulated_seconds"])
    size, offered = numbers(links, "bytes"), numbers(links, "offered")
    if not len(size) or not steps:
        return None, 0.0
    used = (size > 0) & (offered > 0)
    needed = np.divide(size * window, offered, out=np.zeros_like(size), where=used)
    longer = np.where(used, needed - size / numbers(links, "bandwidth"), 0.0) / steps
    worst = int(longer.argmax())
    return f"{words(links, 'source')[worst]}->{words(links, 'target')[worst]}", float(longer[worst])
