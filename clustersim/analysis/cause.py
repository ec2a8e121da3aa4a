"""What holds a run up: the rank that is waited for, and why; hot experts that are spread over many ranks; or
the link that is slow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from clustersim.analysis.hot_experts import AFTER_SERVICE, HOT, HotExperts, hot_experts
from clustersim.analysis.latency import numbers, words
from clustersim.analysis.lateness import SERVICE, RankLoads, busy, late, slowness
from clustersim.trace.record import Columns, Trace
from clustersim.units import show

Cause = Mapping[str, Any]

#: What costs less than this share of a step is no bottleneck.
_WORTH_A_CAUSE = 0.02
#: A reason that accounts for less than this share of what the rank takes longer is not told.
_WORTH_A_REASON = 0.1
#: Hot experts are one rank's where it bears this share of the waiting for them.
_ONE_RANK = 0.5
#: A link with this times the mean bytes of its kind is told to be full.
_FULL = 1.5
#: A place of hot experts below this share of a step is not told.
_WORTH_A_PLACE = 0.005
#: What differs by less than this is alike; what costs this share of the worst is nearly as bad.
_ALIKE, _NEARLY = 0.01, 0.9
#: Layers are alike where loads differ by less than this: tokens are drawn.
_NOISE = 0.1
#: A second rank for which this share of all waiting is comes before those that nobody waits for yet.
_NEXT = 0.1
#: A rank is told to be waited for longer without the cause where it is by this factor.
_MUCH_MORE = 1.25
#: A GPU below this is not slow.
_SLOW = 1.02

#: Reasons: what a rank takes longer for.
EXPERT, GPU, SHARD, EXCHANGE = "hot expert", "slow GPU", "larger shard", "slow exchange"
#: Reasons that are no single rank's.
SPREAD, LINK = "hot experts on many ranks", "slow link"


def cause(trace: Trace) -> dict[str, Any] | None:
    """The rank for which others wait most; the hot experts of many ranks or the slow link that cost more;
    None where none of these is worth a word.

    Returns  reasons: of EXPERT, GPU, SHARD, EXCHANGE for a rank, the weightiest first; [SPREAD]; [LINK]
             rank, gpu, link: which; of hot experts on many ranks the worst
             links, vertex: how many links are as slow, and where they meet, None if there is one only
             link_load: bytes of the link / mean of the links of its tier that carry any
             layer, expert, expert_load: the expert with most tokens on the rank in the layer in which it is
             waited for most, and its tokens / mean of all copies, if it is a reason
             every_layer: whether it has as many in every layer
             rank_load: tokens of the rank in that layer / mean of all ranks
             slowness: how many times as long its operators take as those of the median GPU, for the same work
             wait: s that each other GPU of its stage waits for it in a step, that a GPU waits for all hot
             experts together, or that a link's bytes take longer in a step; share: of the period
             period: s from one step to the next, mean; step: s of a step, mean: longer where steps overlap
             ranks, moves, places: of hot experts on many ranks, as `HotExperts` has them
             next: what else holds the run up or would without this, as `_next` has it; None: nothing
    """
    steps, period, step = _steps(trace)
    if not period:
        return None
    rank, wait = _most_waited_for(trace, steps)
    link = _slow_link(trace, steps)
    longer = link["wait"]
    slow = slowness(trace)
    worth = _WORTH_A_CAUSE * period
    reasons = _reasons(trace, rank, slow) if wait >= worth else []
    all_hot = spread = hot_experts(trace, steps, slow)
    if spread and (spread.wait < worth or (reasons and not _more_than_one(spread, wait))):
        spread = None
    most = spread.wait if spread else wait
    if longer >= worth and (longer > most or (not spread and reasons in ([], [EXCHANGE]))):
        found = {"reasons": [LINK], **link}
    elif spread:
        found = _spread(trace, spread, slow, period)
    elif reasons:
        found = _one_rank(trace, rank, reasons, slow) | {"wait": wait}
    else:
        return None
    found = {**_NOTHING, **found, "share": found["wait"] / period, "period": period, "step": step}
    return found | {"next": _next(trace, found, steps, slow, link, all_hot)}


_NOTHING: dict[str, Any] = {
    **dict.fromkeys(("rank", "gpu", "link", "links", "vertex", "link_load", "layer", "expert")),
    **dict.fromkeys(("expert_load", "every_layer", "rank_load", "slowness", "ranks")),
    "moves": [],
    "places": [],
}


def _one_rank(trace: Trace, rank: int, reasons: list[str], slow: np.ndarray) -> dict[str, Any]:
    hot = _hottest(trace, rank) if EXPERT in reasons else {}
    return {
        "reasons": reasons,
        "rank": rank,
        "gpu": _gpu(trace, rank),
        **hot,
        "rank_load": _rank_load(trace, rank, _layer(trace, rank)),
        "slowness": float(slow[rank]),
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
        "reasons": [SPREAD],
        **{key: places[0][key] for key in which},
        "slowness": float(slowness[places[0]["rank"]]),
        "ranks": spread.ranks,
        "moves": spread.moves,
        "places": places,
        "wait": spread.wait,
    }


# ---- what else ----------------------------------------------------------------------------------


def _next(
    trace: Trace,
    found: Cause,
    steps: int,
    slow: np.ndarray,
    link: Mapping[str, Any],
    spread: HotExperts | None,
) -> dict[str, Any] | None:
    """What costs most beside a cause, or would if the cause were mended; None where nothing is worth a word.

    Returns  reasons, rank, gpu, link, rank_load, slowness: as in `cause`; of a rank that nobody waits
             for yet, its load over the run
             wait: s of a step, without the cause; share: of the period
             now: s of a step that each other GPU of its stage waits for the rank as things are
             more: how many others cost as much or nearly so: ranks, or causes of another kind
    """
    worth, kind = _WORTH_A_CAUSE * found["period"], found["reasons"]
    others = []
    if kind != [LINK] and link["wait"] >= worth:
        others.append({"reasons": [LINK], "link": link["link"], "wait": link["wait"], "more": 0})
    scattered = spread is not None and spread.wait >= worth and spread.one_rank < _ONE_RANK
    if scattered and EXPERT not in kind and kind != [SPREAD]:
        assert spread is not None
        others.append({"reasons": [SPREAD], "ranks": spread.ranks, "wait": spread.wait, "more": 0})
    rank = next_rank(trace, steps, slow, found["rank"], kind)
    # Hot experts that are told of together need not be told of one by one.
    if rank and rank["wait"] >= worth and not (scattered and rank["reasons"] == [EXPERT]):
        others.append(rank)
    if not others:
        return None
    most = max(others, key=lambda one: one["wait"])
    nothing = dict.fromkeys(("rank", "gpu", "link", "ranks", "rank_load", "slowness", "now"))
    more = most["more"] + len(others) - 1
    return {**nothing, **most, "more": more, "share": most["wait"] / found["period"]}


def next_rank(
    trace: Trace, steps: int, slow: np.ndarray, rank: int | None, reasons: list[str]
) -> dict[str, Any] | None:
    """The rank that is waited for most if a cause is gone; None where nobody would be.

    rank, reasons  the cause; of hot experts on many ranks the service of experts is gone, of one rank the
                   rank and those that share what makes it late
    """
    spread = reasons == [SPREAD]
    gone = set() if rank is None or spread else _sharers(trace, rank, reasons)
    held = late(trace, steps, gone, served=not spread)
    seconds = np.resize(np.append(_waited(trace), np.zeros(len(held))), len(held))
    seconds[list(gone)] = 0.0
    # Who is waited for already comes first, where no link and no hot experts of others make it late.
    waited = gone and seconds.max() >= _NEXT * _waited(trace).sum()
    worst = int((seconds if waited else held).argmax())
    if held[worst] <= 0:
        return None
    # Where it is waited for it is told by its load there, else by that of the run.
    there = _rank_load(trace, worst, _layer(trace, worst)) if waited else 0.0
    load = there or RankLoads(trace).of(worst) or 0.0
    equal = seconds if waited else held
    others = _mates(trace, worst) * steps
    # Mending one cause makes nobody wait longer.
    wait = min(float(held[worst]), float(_waited(trace).sum()) / others)
    return {
        "reasons": _reasons(trace, worst, slow, load),
        "rank": worst,
        "gpu": _gpu(trace, worst),
        "rank_load": load,
        "slowness": float(slow[worst]),
        "wait": wait,
        "now": float(seconds[worst]) / others,
        "more": int((equal >= _NEARLY * equal[worst]).sum()) - 1,
    }


def _sharers(trace: Trace, rank: int, reasons: list[str]) -> set[int]:
    """A rank and those that have the same experts, if these make it late, or the same shard."""
    found, table, ranks = {rank}, trace.tables["experts"], trace.tables["ranks"]
    if EXPERT in reasons:
        places = numbers(table, "ep_rank")
        mine = np.isin(places, places[numbers(table, "rank") == rank])
        stage = _of(ranks, "stage")
        holders = np.unique(numbers(table, "rank")[mine]).tolist()
        found |= {one for one in holders if stage[one] == stage[rank]}
    if SHARD in reasons:
        shard = _of(ranks, "shard")
        found |= {one for one in shard if shard[one] == shard[rank]}
    return found


# ---- in words -----------------------------------------------------------------------------------


def cause_notes(found: Cause | None) -> Iterator[str]:
    """The cause in one line, or nothing."""
    if found is None:
        return
    overlap = found["step"] > (1 + _ALIKE) * found["period"]
    of = f" of the {show(found['period'], 'time')} from one step to the next" if overlap else ""
    cost = f"{show(found['wait'], 'time')} of each step ({found['share']:.0%}{of})"
    if found["link"] is not None:
        said = _said_link(found, cost)
    elif found["reasons"] == [SPREAD]:
        said = _said_spread(found, cost)
    else:
        said = _said_rank(found, cost)
    yield f"{said}{_said_next(found)}."


def _said_rank(found: Cause, cost: str) -> str:
    why = " and ".join(_SAID[reason](found) for reason in found["reasons"])
    even = found["reasons"] == [GPU] and found["rank_load"] < HOT
    alone = "; the rank is slow, not overloaded" if even else ""
    return (
        f"Rank {found['rank']} ({found['gpu']}) is the bottleneck: {why}{alone}; "
        f"the others wait {cost} for it"
    )


def _said_link(found: Cause, cost: str) -> str:
    full = ""
    if found["link_load"] >= _FULL:
        full = f" and carr{'y' if found['vertex'] else 'ies'} {found['link_load']:.1f} x the mean bytes"
    if found["vertex"] is None:
        return f"Link {found['link']} is the bottleneck: it is slow{full}, and its bytes take {cost} longer"
    return (
        f"The {found['links']} links of {found['vertex']} are the bottleneck: they are slow{full}, and the "
        f"bytes of each, such as {found['link']}, take {cost} longer"
    )


def _said_spread(found: Cause, cost: str) -> str:
    moves = " and ".join(f"from {what} to {what}" for what in found["moves"])
    where = f"on another rank {moves}" if moves else "on several ranks"
    said = (
        f"Hot experts are the bottleneck, {where}: the GPUs wait {cost} for them, on {found['ranks']} ranks "
        "in all"
    )
    places = [one for one in found["places"] if one["share"] >= _WORTH_A_PLACE]
    if not places:
        return said
    worst, *others = places
    then = [f"layer {one['layer']}, rank {one['rank']}, expert {one['expert']}" for one in others]
    return (
        f"{said}. Worst is layer {worst['layer']}: expert {worst['expert']} on rank {worst['rank']} "
        f"({worst['gpu']}) gets {worst['expert_load']:.1f} x the mean tokens (the rank "
        f"{worst['rank_load']:.1f} x), {show(worst['wait'], 'time')} of each step ({worst['share']:.1%})"
        f"{'; then ' if then else ''}{'; '.join(then)}"
    )


def _said_expert(found: Cause) -> str:
    got = f"gets {found['expert_load']:.1f} x the mean tokens"
    load = f"(the rank {found['rank_load']:.1f} x)"
    if found["every_layer"]:
        return f"expert {found['expert']} {got} in every layer {load}"
    return f"expert {found['expert']} of layer {found['layer']} {got} {load}"


_SAID: dict[str, Callable[[Cause], str]] = {
    EXPERT: _said_expert,
    GPU: lambda found: f"its GPU takes {found['slowness']:.2f} x as long as the others for the same work",
    SHARD: lambda found: "its shard has more to do than the others",
    EXCHANGE: lambda found: "its exchanges take longer than those of the others",
}


def _said_next(found: Cause) -> str:
    """The second cause, as the end of a sentence."""
    after = found["next"]
    if after is None:
        return ""
    wait = f"{show(after['wait'], 'time')} ({after['share']:.0%})"
    more = f" and {after['more']} more" if after["more"] else ""
    if after["reasons"] == [LINK]:
        return f"; besides, link {after['link']} is slow: its bytes take {wait} longer{more}"
    if after["reasons"] == [SPREAD]:
        return f"; besides, the GPUs wait {wait} for hot experts on {after['ranks']} ranks{more}"
    why = " and ".join(_SAID_NEXT[one](after) for one in after["reasons"] if one in _SAID_NEXT)
    who = f"rank {after['rank']} ({after['gpu']}){why and ', '}{why}{why and ','}{more}"
    if found["link"] or after["now"] < _WORTH_A_CAUSE * found["period"]:
        without = "it" if found["rank"] is not None or found["links"] == 1 else "them"
        return f"; without {without}, {who} would hold the others up {wait}"
    spread = found["reasons"] == [SPREAD]
    much = not spread and after["wait"] > _MUCH_MORE * after["now"]
    then = f"; {show(after['wait'], 'time')} without rank {found['rank']}" if much else ""
    now = f"{show(after['now'], 'time')} ({after['now'] / found['period']:.0%}{then})"
    others = "besides, GPUs wait" if spread else "they also wait"
    return f"; {others} {now} for {who.rstrip(',')}"


_SAID_NEXT: dict[str, Callable[[Cause], str]] = {
    EXPERT: lambda after: f"which gets {after['rank_load']:.1f} x the mean tokens",
    GPU: lambda after: f"whose GPU takes {after['slowness']:.2f} x as long",
    SHARD: lambda after: "whose shard has more to do",
}


# ---- who is waited for --------------------------------------------------------------------------


def _steps(trace: Trace) -> tuple[int, float, float]:
    """How many steps there were, what one costs, and how long one is, mean, s: more where they overlap."""
    steps = trace.tables["steps"]
    start, end = numbers(steps, "start"), numbers(steps, "end")
    if not len(start):
        return 0, 0.0, 0.0
    return len(start), float(end.max() - start.min()) / len(start), float((end - start).mean())


def _most_waited_for(trace: Trace, steps: int) -> tuple[int, float]:
    """The rank, and how long each other GPU of its stage waits for it in a step, s."""
    seconds = _waited(trace)
    if not len(seconds):
        return 0, 0.0
    rank = int(seconds.argmax())
    return rank, float(seconds[rank]) / _mates(trace, rank) / steps


def _waited(trace: Trace) -> np.ndarray:
    """float64[highest rank waited for + 1] s that others waited for each, all together."""
    waits = trace.tables["waits"]
    return np.bincount(numbers(waits, "rank"), weights=numbers(waits, "seconds"))


def _mates(trace: Trace, rank: int) -> int:
    """How many other ranks its stage has, 1 at least."""
    ranks = trace.tables["ranks"]
    return max(int((numbers(ranks, "stage") == _of(ranks, "stage")[rank]).sum()) - 1, 1)


def _of(ranks: Columns, name: str) -> dict[int, Any]:
    """Rank → what a column says of it."""
    return dict(zip(numbers(ranks, "rank").tolist(), numbers(ranks, name).tolist(), strict=True))


def _gpu(trace: Trace, rank: int) -> str:
    ranks = trace.tables["ranks"]
    place = int(np.argmax(numbers(ranks, "rank") == rank))
    return str(words(ranks, "gpu")[place])


# ---- why ----------------------------------------------------------------------------------------


def _reasons(trace: Trace, rank: int, slow: np.ndarray, load: float | None = None) -> list[str]:
    """What the rank takes longer for than the mean of its stage, each at the speed of the median GPU.

    load  its tokens / mean of the ranks; None: where it is waited for most
    """
    if load is None:
        load = _rank_load(trace, rank, _layer(trace, rank))
    parts = {
        EXPERT: busy(trace, "compute", SERVICE, True) / slow,
        SHARD: busy(trace, "compute", SERVICE, False) / slow,
        EXCHANGE: busy(trace, "exchange", (), False),
    }
    stage = _of(trace.tables["ranks"], "stage")
    mates = np.array([one for one, where in stage.items() if where == stage[rank]])
    longer = {reason: float(time[rank] - time[mates].mean()) for reason, time in parts.items()}
    longer[EXPERT] = max(longer[EXPERT], _service_beyond(trace, rank, slow))
    computing = float((parts[EXPERT] + parts[SHARD])[rank])
    longer[GPU] = computing * (slow[rank] - 1.0) if slow[rank] >= _SLOW else 0.0
    if load >= HOT:
        # Tokens for hot experts also come by its links.
        longer[EXPERT] += max(longer.pop(EXCHANGE), 0.0)
    else:
        longer[EXPERT] = 0.0
    whole = sum(max(time, 0.0) for time in longer.values())
    weighty = [reason for reason, time in longer.items() if time > 0 and time >= _WORTH_A_REASON * whole]
    return sorted(weighty, key=lambda reason: -longer[reason])


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
        "every_layer": _everywhere(trace, rank, most),
    }


def _everywhere(trace: Trace, rank: int, expert: int) -> bool:
    """Whether an expert has most tokens of a rank in each of its layers, and alike in all but for noise."""
    table = trace.tables["experts"]
    layer, tokens = numbers(table, "layer"), numbers(table, "tokens")
    mine = numbers(table, "rank") == rank
    kinds = int(numbers(table, "expert").max()) + 1
    size = (int(layer.max()) + 1) * kinds
    place = layer.astype(np.int64) * kinds + numbers(table, "expert")
    got = np.bincount(place[mine], weights=tokens[mine], minlength=size).reshape(-1, kinds)
    got = got[np.unique(layer[mine])]
    its = got[:, expert]
    # In one layer it is no news that it is so in all.
    return len(its) > 1 and bool((its == got.max(axis=1)).all() and its.min() >= (1 - _NOISE) * its.max())


def _slow_link(trace: Trace, steps: int) -> dict[str, Any]:
    """The link whose bytes take most longer in a step because faults slow it: link, wait (how much, s),
    link_load, and links and vertex where others of a vertex are as slow."""
    table, window = trace.tables["links"], float(trace.facts["simulated_seconds"])
    size, offered = numbers(table, "bytes"), numbers(table, "offered")
    if not len(size) or not steps:
        return {"link": None, "wait": 0.0}
    used = (size > 0) & (offered > 0)
    needed = np.divide(size * window, offered, out=np.zeros_like(size), where=used)
    longer = np.where(used, needed - size / numbers(table, "bandwidth"), 0.0) / steps
    worst = int(longer.argmax())
    source, target, tier = (words(table, name) for name in ("source", "target", "tier"))
    alike = used & (longer >= _NEARLY * longer[worst])
    ends = [str(source[worst]), str(target[worst])]
    meeting = [int((alike & ((source == end) | (target == end))).sum()) for end in ends]
    several = max(meeting) > 1
    return {
        "link": f"{ends[0]}->{ends[1]}",
        "wait": float(longer[worst]),
        "link_load": float(size[worst] / size[used & (tier == tier[worst])].mean()) if used[worst] else 0.0,
        "links": max(meeting) if several else 1,
        "vertex": ends[int(np.argmax(meeting))] if several else None,
    }
