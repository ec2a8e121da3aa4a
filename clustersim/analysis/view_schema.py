"""What every key means that `clustersim trace VIEW --json` prints; docs/views.md is printed from here."""

from __future__ import annotations

_TIMES = "from when to when, s"
_FOLDER = {"folder": "the result folder"}
_STATES = {
    "compute": "share of the window its compute stream computed",
    "exchange": "share it exchanged",
    "wait": "share it waited for other ranks",
    "idle": "the rest",
}
_QUEUE = {
    "length.mean": "tokens in the queue when service began, mean over passes that brought some",
    "length.max": "the most",
    "wait.mean": "how long a token waits in the queue, mean over tokens, s; coming and behind add up to it",
    "wait.coming": "of this, for tokens still to come that are served together with it, s; null where an "
    "older version recorded the run",
    "wait.behind": "of this, behind other work of the rank, s; null likewise",
    "wait.p99": "99 in 100 tokens of the worst pass waited at most this, s",
    "wait.max": "the longest that a token waited, s",
    "service": "from beginning to end of the service, mean over passes that brought tokens, s",
}


def _under(place: str, keys: dict[str, str]) -> dict[str, str]:
    return {f"{place}.{key}": meaning for key, meaning in keys.items()}


#: View → key → what it is. `[]` is every entry of a list, `<x>` a key that depends on the run.
VIEWS: dict[str, dict[str, str]] = {
    "summary": {
        **_FOLDER,
        "summary": "the content of summary.json, as in [summary.md](summary.md)",
        "recorded.trace_version": "version of the trace",
        "recorded.level": "sums, spans or flows: what was recorded",
        "recorded.steps.all": "steps of the run",
        "recorded.steps.spans": "those of which spans were recorded",
        "recorded.rows.<table>": "rows of a table of the trace",
    },
    "gpus": {
        **_FOLDER,
        "window[]": _TIMES,
        "by": "gpu, server, stage or shard: what is one line",
        "gpus[].gpu": "with gpu: vertex of the topology",
        "gpus[].rank": "its rank",
        "gpus[].server": "server it sits in, or the server, stage or shard that is the line",
        "gpus[].stage": "pipeline stage, likewise",
        "gpus[].shard": "shard, likewise",
        "gpus[].gpus": "else: how many GPUs are taken together, as a mean",
        "gpus[].worst": "else: the one of them that was longest without work",
        **_under("gpus[]", _STATES),
        "gpus[].mfu": "useful FLOP / what could have been done at peak rate; null in a part of the run",
        "gpus[].waited_for.operator": "the operator in which it waited longest; `waited_for` is null if it "
        "never waited, and in a part of the run",
        "gpus[].waited_for.rank": "the rank it waited for most in that operator, or null",
        "over_time.edges[]": "times between the bins, s; `over_time` is null without --over-time",
        "over_time.state": "what the lines on a terminal show",
        "over_time.lines[].name": "GPU, server, stage or shard",
        "over_time.lines[].gpus": "how many GPUs the line is a mean of",
        **{f"over_time.lines[].{key}[]": f"in each bin: {said}" for key, said in _STATES.items()},
    },
    "links": {
        **_FOLDER,
        "window[]": _TIMES,
        "tiers.<tier>.links": "links between these kinds of vertices",
        "tiers.<tier>.bytes": "bytes they carried, what protocols put on the wire counted",
        "tiers.<tier>.mean": "mean of their utilizations",
        "tiers.<tier>.max": "the largest of their utilizations",
        "links[].link": "source->target, by vertices of the topology; the busiest first",
        "links[].tier": "kinds of the two vertices",
        "links[].bandwidth": "nominal capacity, bytes/s",
        "links[].bytes": "bytes carried",
        "links[].utilization": "bytes / what its capacity allowed in the window",
        "over_time.edges[]": "times between the bins, s; `over_time` is null without --over-time",
        "over_time.tiers[].tier": "kinds of the two vertices",
        "over_time.tiers[].bytes[]": "bytes in each bin",
        "over_time.tiers[].mean[]": "mean utilization of its links in each bin",
        "over_time.tiers[].max[]": "utilization of the busiest of them in each bin",
        "over_time.links[].link": "one of the --each busiest links",
        "over_time.links[].bytes[]": "bytes in each bin",
        "over_time.links[].utilization[]": "utilization in each bin",
    },
    "experts": {
        **_FOLDER,
        "order": "what copies are sorted by; empty: behind and service together",
        "layers[].layer": "a layer with experts",
        "layers[].tokens": "tokens that came to its experts",
        "layers[].imbalance": "tokens of the busiest EP rank / their mean, mean over the passes",
        "layers[].busiest.ep_rank": "EP rank that got most tokens over the run",
        "layers[].busiest.expert": "expert that got most tokens over the run",
        "layers[].busiest.load": "its tokens / the mean of experts",
        **_under("layers[]", _QUEUE),
        "copies[].layer": "layer of an expert copy",
        "copies[].rank": "rank that holds it",
        "copies[].gpu": "its GPU",
        "copies[].slot": "slot of the rank",
        "copies[].expert": "logical expert",
        "copies[].passes": "token batches in which the copy was there",
        "copies[].tokens": "tokens that came for it",
        "copies[].load": "these / the mean of the copies of its layer",
        **_under("copies[]", _QUEUE),
        "over_time.edges[]": "times between the bins, s; `over_time` is null without --over-time",
        "over_time.lines[].rank": "a rank with experts",
        "over_time.lines[].gpu": "its GPU",
        "over_time.lines[].tokens[]": "tokens that wait there, mean in each bin",
    },
    "stragglers": {
        **_FOLDER,
        "steps": "steps of the run",
        "seconds": "all waiting for ranks, added up over those that waited, s",
        "operators[].operator": "an exchange in which ranks waited for others, the longest first",
        "operators[].seconds": "how long, all together, s",
        "operators[].share": "of all such waiting",
        "operators[].rank": "the rank most waited for in it",
        "ranks[].rank": "a rank that others waited for, the one that cost most first",
        "ranks[].gpu": "its GPU",
        "ranks[].stage": "its pipeline stage",
        "ranks[].seconds": "how long all others together waited for it, s",
        "ranks[].share": "of all such waiting",
        "ranks[].each": "how long each other rank of its stage waited for it in a step, mean, s",
        "ranks[].at[].operator": "an exchange in which most of it was",
        "ranks[].at[].layer": "its layer",
        "ranks[].at[].seconds": "how long, s",
        "ranks[].slowness": "how many times as long it computes as priced, relative to the median rank",
        "ranks[].load": "its tokens / the mean of ranks, in the layer in which it was waited for most; null "
        "without experts",
        "ranks[].reasons[]": "slow GPU, more tokens; none where it was itself held up",
        "next.reasons[]": "why the next straggler would be waited for, were the first mended; `next` is null "
        "where there is none, or one operator is asked about",
        "next.rank": "its rank",
        "next.gpu": "its GPU",
        "next.rank_load": "its tokens / the mean of ranks, in the layer in which it is waited for most",
        "next.slowness": "how many times as long it computes as the median GPU, for the same work",
        "next.wait": "how long each other GPU of its stage would wait for it in a step, by its computing, s",
        "next.now": "how long each does as things are, s",
        "next.more": "how many further ranks cost nearly as much",
        "moments[].operator": "exchange in which ranks waited for one, the longest first, a thousand at "
        "most; `moments` is null where no spans were recorded",
        "moments[].layer": "its layer; -1 outside of layers",
        "moments[].token_batch": "its token batch",
        "moments[].step": "its step",
        "moments[].rank": "the rank waited for; -1 where its span was not recorded",
        "moments[].ranks": "how many waited",
        "moments[].seconds": "how long, all together, s",
        "moments[].longest": "how long the first of them, s",
        "moments[].start": "when the first began to wait, s",
        "moments[].end": "when they met, s",
        "moments_all": "how many moments there were",
        "note": "why there are no moments",
    },
    "slice": {
        **_FOLDER,
        "window[]": _TIMES,
        "gpus[].rank": "a rank asked for",
        "gpus[].gpu": "its GPU",
        "gpus[].server": "its server",
        "gpus[].stage": "its pipeline stage",
        "gpus[].streams[]": "its in-order queues",
        "whole": "whether all spans of that time were recorded",
        "pieces[].rank": "rank that does it",
        "pieces[].stream": "stream that it is on",
        "pieces[].operator": "operator",
        "pieces[].layer": "layer; -1 outside of layers",
        "pieces[].token_batch": "token batch",
        "pieces[].span": "number of the span in the trace",
        "pieces[].state": "compute, exchange or wait",
        "pieces[].start": "when it begins, s",
        "pieces[].end": "when it ends, s",
        "pieces[].rank_awaited": "the rank that a wait is for, or null",
    },
    "sql": {
        "columns[]": "names of the columns",
        "types[]": "their types, as DuckDB calls them",
        "rows[][]": "values; what JSON has no form for is text",
        "cut": "whether there were more rows",
        "notes[]": "why a table named is empty",
    },
    "why": {
        "what": "step or request",
        "number": "its number",
        "start": "when it began, s",
        "end": "when it ended, s",
        "latency": "end - start, s; the parts of the path add up to it",
        "causes.<cause>": "of this by cause, s",
        "in_bubbles.<cause>": "what other stages did in pipeline bubbles, s; they add up to the bubbles",
        "lines[].start": "when the first part of the line begins, s; without --all",
        "lines[].seconds": "how long its parts take, s",
        "lines[].where": "what its parts have in common, in words",
        "lines[].causes.<cause>": "of this by cause, s",
        "lines[].does.<operator>": "of this by operator, s",
        "lines[].words": "what its longest part is about",
        "lines[].parts": "how many parts of the path it has",
        "parts[].cause": "with --all: cause of a part of the path, in order of time",
        "parts[].inside": "for a bubble, what was done meanwhile; else the cause",
        "parts[].operator": "operator on the path; empty where there is none",
        "parts[].layer": "its layer; -1 where there is none, also below",
        "parts[].rank": "its rank",
        "parts[].stage": "its pipeline stage",
        "parts[].token_batch": "its token batch",
        "parts[].start": "when the part begins, s",
        "parts[].seconds": "how long it takes, s",
        "parts[].words": "what happened",
    },
    "bounds": {
        "bounds[].name": "what is taken away",
        "bounds[].seconds": "mean step without it at best, s",
        "bounds[].p99": "p99 step, likewise, s",
        "bounds[].speedup": "mean step / that",
        "bounds[].faster": "by which share the mean step could be shorter at most",
        "bounds[].of_p99": "the same of the p99 step",
        "bounds[].words": "what it means",
        "unexplained": "by how much recorded times are off from what the graph says, at most, s",
        "shares.steps": "steps whose critical paths are known; `shares` is null where none is",
        "shares.mean.seconds": "the mean of them, s",
        "shares.mean.by.<cause>": "of this by cause, s",
        "shares.p99.step": "the step at p99",
        "shares.p99.seconds": "how long it takes, s",
        "shares.p99.by.<cause>": "of this by cause, s",
    },
    "bounds --check": {
        "[].name": "what is taken away",
        "[].recorded": "mean step as recorded, s",
        "[].bound": "without it at best, s",
        "[].run": "mean step of a run without it, s",
        "[].tolerance": "by which share a run may be below the bound",
        "[].holds": "whether it is not further below",
        "[].how": "what was run",
    },
    "export": {
        "path": "the file, or folder of a csv",
        "format": "perfetto, chrome or csv",
        **_FOLDER,
        "bytes": "its size",
        "window[]": _TIMES,
        "spans": "spans in it",
        "slices": "boxes of a timeline",
        "arrows": "arrows of a timeline",
        "points": "points of a timeline's counters",
        "rows.<table>": "of a csv: rows by table",
        "notes[]": "what was left out",
    },
}

_HEAD = """# What `clustersim trace VIEW --json` prints

This page is printed from `clustersim/analysis/view_schema.py`; do not edit it.

All quantities are SI: seconds, bytes, bytes/s; shares are fractions of one. What a run has no data for is
`null`. `[]` stands for every entry of a list, `<x>` for a key that depends on the run.
"""


def views_page() -> str:
    """docs/views.md: every key of every view with its meaning."""
    return _HEAD + "".join(_told(view, keys) for view, keys in VIEWS.items())


def _told(view: str, keys: dict[str, str]) -> str:
    rows = "".join(f"| `{key}` | {meaning} |\n" for key, meaning in keys.items())
    return f"\n## trace {view}\n\n| key | what it is |\n|---|---|\n{rows}"
