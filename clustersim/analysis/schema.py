"""What every key of summary.json means; docs/summary.md is printed from here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Changed whenever a key changes its meaning or goes away.
SCHEMA_VERSION = 2

_DISTRIBUTION = {
    "mean": "mean",
    "p50": "half of them are at most this, interpolated linearly",
    "p90": "nine in ten are at most this",
    "p95": "19 in 20 are at most this",
    "p99": "99 in 100 are at most this",
    "max": "the largest",
    "min": "the smallest",
    "count": "how many there were",
}

#: Keys that hold a whole distribution; None where there is nothing to distribute.
DISTRIBUTIONS = (
    "latency.step",
    "latency.token_batch",
    "latency.tpot",
    "latency.ttft",
    "latency.request",
    "phases.<phase>.step",
)

#: key → what it is. `[]` is every entry of a list, `<x>` a key that depends on the run.
SCHEMA: dict[str, str] = {
    "schema_version": "version of this page that the file follows",
    "name": "name of the scenario",
    "scenario_hash": "hash of the resolved scenario; equal scenarios share it",
    "seed": "seed of every random stream",
    "wall_seconds": "how long the simulation took on the computer that ran it, s",
    "simulated_seconds": "end of the simulated run, which began at 0, s; the window of all utilizations",
    "events": "events the simulation handled",
    "operators": "spans simulated: operators times the ranks they ran on",
    "throughput.total_tokens_per_second": "input and output tokens from the first arrival to the last "
    "finish, 1/s",
    "throughput.output_tokens_per_second": "tokens made in that time, 1/s",
    "throughput.input_tokens_per_second": "prompt tokens read in that time, 1/s",
    "throughput.dropped_share": "the part of all choices of tokens for experts that no expert had room for "
    "(gating.capacity_factor): tokens per second count such tokens like others; null without experts",
    "latency.step": "a step, from its first micro-batch's start at stage 0 to its last one's end, s",
    "latency.token_batch": "one micro-batch's pass through all pipeline stages, s",
    "latency.tpot": "per request, mean time per further output token, s: (finish - first token) / (output "
    "tokens - 1), or (finish - start) / output tokens where the prompt was in the KV cache already",
    "latency.ttft": "per request that read its prompt in this run, from arrival to first output token, s",
    "latency.request": "per request, from arrival to finish, s",
    "phases.<phase>.steps": "steps of this phase; the phases are prefill and decode, as far as they ran",
    "phases.<phase>.tokens": "prompt tokens read (prefill), or tokens made (decode)",
    "phases.<phase>.tokens_per_second": "these, from the start of the first step to the end of the last, 1/s",
    "phases.<phase>.period": "from the first step's start to the last one's end, divided by the steps: what "
    "a step costs where steps overlap in the pipeline, s",
    "phases.<phase>.step": "the steps of this phase, s",
    "phases.<phase>.steady.cut": "steps left out as warm-up, at most half of them, by MSER-5: where the "
    "standard error of the mean of the others is least",
    "phases.<phase>.steady.settled": "whether that is before half; else a trend may remain",
    "phases.<phase>.steady.warm_up": "the same in words",
    "phases.<phase>.steady.mean": "mean of the other steps, s",
    "phases.<phase>.steady.mean_half_width": "half of its 95 % interval by batch means: how far a run "
    "without end may be from it, s; null where the steps are too few",
    "phases.<phase>.steady.mean_how": "how it was found, or why there is none",
    "phases.<phase>.steady.p99": "99 in 100 of the other steps are at most this, interpolated linearly, s",
    "phases.<phase>.steady.p99_low": "its 95 % interval by order statistics, from, s; null where the steps "
    "are too few",
    "phases.<phase>.steady.p99_high": "likewise, to, s",
    "phases.<phase>.steady.p99_how": "how it was found, or why there is none",
    "phases.<phase>.bounds.compute": "no step can be faster: FLOP of the busiest rank at peak rate, s; "
    "mean over steps",
    "phases.<phase>.bounds.memory": "no step can be faster: HBM bytes of the busiest rank, s; mean over "
    "steps",
    "phases.<phase>.bounds.network": "no step can be faster: bytes over the busiest link, s; mean over steps",
    "phases.<phase>.bounds.bound_by": "the largest of the three",
    "phases.<phase>.parts[].operator": "where a GPU's time goes in one step: the operator",
    "phases.<phase>.parts[].kind": "compute or exchange",
    "phases.<phase>.parts[].stream": "the in-order queue it runs on; the parts of `compute` add up, those "
    "of other streams run beside them",
    "phases.<phase>.parts[].busy": "time computing or exchanging per step and GPU, s; mean over all steps "
    "and all GPUs, also those that never run it",
    "phases.<phase>.parts[].wait": "time waiting for others before it could begin, likewise, s",
    "bounds.compute": "as in the phases, mean over all steps, s",
    "bounds.memory": "as in the phases, mean over all steps, s",
    "bounds.network": "as in the phases, mean over all steps, s",
    "bounds.bound_by": "the largest of the three",
    "mfu": "useful FLOP of all GPUs / what they could have done at peak rate in the window",
    "cause.reasons[]": "why a rank is waited for, the weightiest reason first: hot expert, slow GPU, larger "
    "shard or slow exchange; or alone: hot experts on many ranks, or slow link; `cause` is null where "
    "nothing costs 2 % of a step",
    "cause.rank": "the rank that others wait for most; of hot experts on many ranks, that of the worst "
    "place; null of a link",
    "cause.gpu": "its GPU",
    "cause.link": "the slow link, or null",
    "cause.links": "how many links of one vertex are as slow as it; null where no link is the cause",
    "cause.vertex": "that vertex; null where it is one link only",
    "cause.link_load": "bytes of the link / mean of the links between such vertices that carry any",
    "cause.layer": "layer in which the rank is waited for most, if an expert is a reason, else null",
    "cause.expert": "the expert on the rank with most tokens there",
    "cause.expert_load": "its tokens / mean of the expert copies of the layer",
    "cause.every_layer": "whether the expert has as many tokens in every layer, to within 10 %",
    "cause.rank_load": "tokens of all experts of the rank in the layer in which it is waited for most / mean "
    "of the ranks; null of a link",
    "cause.slowness": "how many times as long the rank's GPU takes for the same work as the median GPU",
    "cause.wait": "how long each other GPU of its stage waits for the rank in a step; how long a GPU waits "
    "for hot experts on many ranks together, mean; or how much longer the link's bytes take in a step, s",
    "cause.share": "that as a share of `cause.period`",
    "cause.period": "what a step costs: the run from the first step's start to the last one's end / the "
    "steps, s",
    "cause.step": "a step from its start to its end, mean, s: longer than the period where steps overlap in "
    "the pipeline",
    "cause.next.reasons[]": "what costs most beside the cause, or would if that were mended: reasons as "
    "above; `cause.next` is null where nothing else costs 2 % of the period",
    "cause.next.rank": "its rank, or null",
    "cause.next.gpu": "the GPU of the rank",
    "cause.next.link": "the slow link, or null",
    "cause.next.ranks": "how many EP ranks hold the hot experts where they are many, or null",
    "cause.next.rank_load": "tokens of the rank / mean of the ranks in the layer in which it is waited for "
    "most, or over the run if it is not yet; null of others",
    "cause.next.slowness": "as `cause.slowness`; null of others",
    "cause.next.wait": "as `cause.wait`, were the cause mended; of a rank by its own computing, s",
    "cause.next.share": "that as a share of the period",
    "cause.next.now": "how long each other GPU of its stage waits for the rank in a step as things are, s; "
    "null of others",
    "cause.next.more": "how many others cost nearly as much: further ranks and causes of other kinds",
    "cause.ranks": "how many EP ranks with hot experts are waited for where they are many, else null",
    "cause.moves[]": "layer, step: the rank with the hot experts changes from one to the next; empty where "
    "one rank or a link is the cause",
    "cause.places[].rank": "of hot experts on many ranks the places that cost most, three at most, else "
    "empty: the rank, the first of those that share an expert",
    "cause.places[].gpu": "its GPU",
    "cause.places[].layer": "the layer",
    "cause.places[].expert": "the expert with most tokens there while the rank is waited for",
    "cause.places[].expert_load": "its tokens / mean of the expert copies of the layer meanwhile",
    "cause.places[].rank_load": "tokens of the rank / mean of the ranks meanwhile",
    "cause.places[].wait": "how long a GPU waits there in a step, mean, s",
    "cause.places[].share": "that as a share of what a step costs",
    "experts.imbalance.mean": "largest / mean tokens over the EP ranks of one layer of one token batch; "
    "mean over those",
    "experts.imbalance.max": "the largest over those",
    "experts.queue_wait.mean": "time a token stood in its expert's queue, mean over tokens, s",
    "experts.queue_wait.p50": "half of the tokens waited at most this, s; to within 0.1 %",
    "experts.queue_wait.p99": "99 in 100 tokens waited at most this, s; to within 0.1 %",
    "experts.queue_wait.max": "the longest that a token waited, s",
    "experts.queue_wait.coming": "of the mean, the time until the tokens had come that are served together "
    "with it; such waits are the senders' doing, s",
    "experts.queue_wait.behind": "of the mean, the time behind other work of the rank, mostly other experts, "
    "s",
    "experts.queue_length.mean": "tokens in a queue when its service began, mean over queues that had any",
    "experts.queue_length.max": "tokens in the longest queue",
    "experts.queue_length.over_time": "tokens that wait in all queues of a rank, mean over the window and "
    "the ranks that hold experts",
    "experts.slowest.over": "what such a token takes / the mean over all tokens of the run",
    "experts.slowest.rank": "rank whose tokens take longest, behind other work and in service, in one layer; "
    "mean over its tokens of the run",
    "experts.slowest.layer": "that layer",
    "experts.slowest.expert": "the expert there whose tokens take most time in all",
    "experts.slowest.coming": "how long its tokens wait for those still to come from other ranks, mean, s",
    "experts.slowest.behind": "how long they then wait behind other work of the rank, mean, s",
    "experts.slowest.service": "how long the service of its queue takes, mean over its tokens, s",
    "experts.service.mean": "time an expert copy took to serve a queue, mean over queues that had tokens, s",
    "experts.service.p50": "half of them were served in at most this, s",
    "experts.service.p99": "99 in 100 were served in at most this, s",
    "experts.service.max": "the longest, s",
    "experts.tokens": "tokens that came to expert copies, each counted once per copy it went to",
    "experts.dropped": "choices for experts that had no capacity left (gating.capacity_factor); nobody "
    "served them",
    "rebalancing.planned": "how often a new placement of the experts was planned; `rebalancing` is null "
    "where they stay where they are",
    "rebalancing.moved": "how often weights began to move",
    "rebalancing.finished": "how often all of them came before the run was over",
    "rebalancing.idle.below_threshold": "plans that moved nothing: the imbalance was below the threshold",
    "rebalancing.idle.nothing_better": "those whose plan would have gained no layer least_gain",
    "rebalancing.idle.too_late": "those that the run's end came before",
    "rebalancing.offered.before": "imbalance of the places as they were, mean over plans with nothing better",
    "rebalancing.offered.wished": "the same of what the policy would have had instead",
    "rebalancing.copies": "expert copies that moved to another rank",
    "rebalancing.bytes": "their weights that came over links",
    "rebalancing.moving": "time from the first weights' start to the last layer's new places or the run's "
    "end, all moves, s",
    "rebalancing.stopped": "time in which passes waited for weights and none was under way, s",
    "rebalancing.stopped_share": "this / the window",
    "rebalancing.imbalance.mean": "as `experts.imbalance.mean`",
    "rebalancing.imbalance.max": "as `experts.imbalance.max`",
    "rebalancing.imbalance.first": "what the mean would have been by the same tokens at the first places",
    "rebalancing.of_moves.before": "imbalance of the places as they were under the observed loads, mean over "
    "layers and moves",
    "rebalancing.of_moves.foreseen": "the same of the places as planned",
    "rebalancing.of_moves.after": "the same under the loads that really came after the move",
    "rebalancing.of_moves.unmoved": "imbalance that the old places would have had under these",
    "rebalancing.gained": "estimate: what the experts' service would have taken longer at the first places, "
    "by a line through the run's service times over tokens, s",
    "rebalancing.net": "estimate: gained - stopped, s",
    "algorithms.<kind>.<algorithm>": "share of the exchanges of a kind that were done by an algorithm; those "
    "of all groups of a stage count as one",
    "memory.rank": "the rank whose HBM is fullest",
    "memory.gpu": "its GPU",
    "memory.parts.<part>": "what takes the HBM of that rank, bytes",
    "memory.total": "the sum of the parts, bytes",
    "memory.capacity": "HBM of that GPU, bytes",
    "tiers.<tier>.links": "links between these kinds of vertices",
    "tiers.<tier>.bytes": "bytes they carried, what protocols put on the wire counted",
    "tiers.<tier>.mean": "mean of their utilizations",
    "tiers.<tier>.max": "the largest of their utilizations",
    "queues.<tier>.mean": "bytes that wait for a link between these kinds of vertices, mean over the "
    "window and the links; `queues` is null where links have no queues",
    "queues.<tier>.max": "the most that waited for one of them at once, bytes",
    "claimed.source": "who claims what follows; `claimed` is null where nothing is claimed",
    "claimed.against": "scenario whose newest result is set beside this one, or null",
    "claimed.total_tokens_per_second.claimed": "what is claimed, 1/s",
    "claimed.total_tokens_per_second.found": "what this run found, 1/s",
    "claimed.total_tokens_per_second.ratio": "found / claimed",
    "claimed.tpot.claimed": "what is claimed, s",
    "claimed.tpot.found": "mean of `latency.tpot`, s",
    "claimed.tpot.ratio": "found / claimed",
    "beside.label": "what the run was compared with, by the same random numbers; `beside` is null where the "
    "scenario names nothing",
    "beside.found.<number>": "total_tokens_per_second, the means of tpot, ttft and step, imbalance and "
    "dropped_share, as elsewhere in this summary; of the other run",
    "beside.ratio.<number>": "this run / the other, or null",
    "prices.shares.<origin>": "share of the computing time that is measured, interpolated between "
    "measured calls, extrapolated beyond them or from a relative of the GPU, or formula alone; `prices` is "
    "null where nothing was computed",
    "prices.bases[].basis": "measured table: gpu, format and library; empty for the data sheet alone",
    "prices.bases[].share": "share of the computing time that rests on it",
    "prices.beyond[].operator": "an operator whose price is extrapolated or a formula's; the largest only",
    "prices.beyond[].kernel": "GPU kernel it calls",
    "prices.beyond[].origin": "extrapolated or formula",
    "prices.beyond[].basis": "as in `prices.bases`",
    "prices.beyond[].share": "share of the computing time",
    "prices.beyond[].octaves": "the furthest it lies beyond what was measured, powers of two",
    "gpus[].gpu": "vertex of the topology",
    "gpus[].rank": "its rank",
    "gpus[].server": "server it sits in",
    "gpus[].stage": "pipeline stage",
    "gpus[].compute": "share of the window its compute stream computed",
    "gpus[].exchange": "share of the window its compute stream exchanged",
    "gpus[].wait": "share of the window its compute stream waited for other ranks",
    "gpus[].idle": "the rest: compute + exchange + wait + idle = 1",
    "gpus[].mfu": "useful FLOP / what it could have done at peak rate in the window",
    "gpus[].waited_for.operator": "the operator in which it waited longest; `waited_for` is null if "
    "it never waited",
    "gpus[].waited_for.rank": "the rank it waited for most in that operator, or null",
    "links[].link": "source->target, by vertices of the topology",
    "links[].tier": "kinds of the two vertices",
    "links[].bandwidth": "nominal capacity, bytes/s",
    "links[].bytes": "bytes carried, what protocols put on the wire counted",
    "links[].utilization": "bytes / what its capacity allowed over the run, faults counted",
    "notes": "sentences on what stands out, the claims first",
}


#: Keys that hold words, and such that are true or false; all others hold numbers. Any may be null.
_WORDS = (
    "name", "scenario_hash", "phases.<phase>.steady.warm_up", "phases.<phase>.steady.mean_how",
    "phases.<phase>.steady.p99_how", "phases.<phase>.bounds.bound_by", "phases.<phase>.parts[].operator",
    "phases.<phase>.parts[].kind", "phases.<phase>.parts[].stream", "bounds.bound_by", "cause.reasons[]",
    "cause.gpu", "cause.link", "cause.vertex", "cause.next.reasons[]", "cause.next.gpu", "cause.next.link",
    "cause.moves[]", "cause.places[].gpu", "memory.gpu", "claimed.source",
    "claimed.against", "beside.label", "prices.bases[].basis", "prices.beyond[].operator",
    "prices.beyond[].kernel", "prices.beyond[].origin", "prices.beyond[].basis", "gpus[].gpu",
    "gpus[].waited_for.operator", "links[].link", "links[].tier", "notes[]",
)  # fmt: skip
_FLAGS = ("phases.<phase>.steady.settled", "cause.every_layer")


def misfit(summary: Mapping[str, Any]) -> str:
    """What in a summary.json is not of its key's kind, such as a word in the place of a number; "" if all is.

    Keys that are not known here, and such that are missing, do not count: other versions differ by them.
    """
    return next(_misfits(summary, _tree(), ""), "")


def _tree() -> dict[str, Any]:
    """What a summary is made of: tables by key ("<>" for any), lists as {"[]": entry}, and kinds."""
    whole: dict[str, Any] = {}
    for key in SCHEMA:
        # Notes are the one list that the schema has no entry of.
        name = "notes[]" if key == "notes" else key
        kind = "text" if name in _WORDS else "true or false" if name in _FLAGS else "a number"
        *tables, last = [
            part for word in name.split(".") for part in (("<>",) if word[0] == "<" else _opened(word))
        ]
        place = whole
        for part in tables:
            place = place.setdefault(part, {})
        place[last] = dict.fromkeys(_DISTRIBUTION, "a number") if key in DISTRIBUTIONS else kind
    return whole


def _opened(word: str) -> tuple[str, ...]:
    return (word[:-2], "[]") if word.endswith("[]") else (word,)


def _misfits(value: Any, form: Any, place: str) -> Iterator[str]:
    wanted = form if isinstance(form, str) else "a list" if "[]" in form else "a table"
    if value is None:
        return
    if _kind(value) != wanted:
        yield f"{place} holds {_kind(value)}, not {wanted}"
    elif wanted == "a list":
        for number, entry in enumerate(value):
            yield from _misfits(entry, form["[]"], f"{place}[{number}]")
    elif wanted == "a table":
        for key, entry in value.items():
            below = form.get(key, form.get("<>"))
            if below is not None:
                yield from _misfits(entry, below, f"{place}.{key}" if place else key)


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", str: "text", list: "a list", dict: "a table", type(None): "nothing"}
    return kinds.get(type(value), "a number")


def difference(ours: Any, theirs: Any, place: str = "") -> str:
    """The first key at which the form of one summary is not that of another; "" if they have one form."""
    if _kind(ours) != _kind(theirs):
        return f"{place} holds {_kind(theirs)}, not {_kind(ours)}"
    if isinstance(ours, dict):
        lacking = [key for key in ours if key not in theirs]
        if lacking:
            return f"{place}{'.' if place else ''}{lacking[0]} is missing"
        pairs = [(f"{place}.{key}" if place else key, ours[key], theirs[key]) for key in ours]
    elif isinstance(ours, list):
        if len(ours) != len(theirs):
            return f"{place} has {len(theirs)} entries, not {len(ours)}"
        pairs = [(f"{place}[{n}]", a, b) for n, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    else:
        return ""
    return next((found for name, a, b in pairs if (found := difference(a, b, name))), "")


_HEAD = f"""# summary.json

Schema version {SCHEMA_VERSION}. This page is printed from `clustersim/analysis/schema.py`; do not edit it.

All quantities are SI: seconds, bytes, bytes/s; shares are fractions of one. What a run has no data
for is `null`. `[]` stands for every entry of a list, `<x>` for a key that depends on the run. A run
that failed leaves a summary with the key `error` instead.

"""


def schema_page() -> str:
    """docs/summary.md: every key of summary.json with its meaning."""
    whole = ", ".join(f"`{key}`" for key in DISTRIBUTIONS)
    return f"{_HEAD}{_table(SCHEMA)}\n## Distributions\n\n{whole} hold:\n\n{_table(_DISTRIBUTION)}"


def _table(meanings: dict[str, str]) -> str:
    rows = "".join(f"| `{key}` | {meaning} |\n" for key, meaning in meanings.items())
    return f"| key | what it is |\n|---|---|\n{rows}"
