"""Comparisons and replications: what every key means; docs/compare.md is printed from here."""

from __future__ import annotations

#: Changed whenever a key changes its meaning or goes away.
SCHEMA_VERSION = 1

_INTERVAL = {
    "value": "mean over runs",
    "low": "from here to `high` the true mean lies with probability `level`; null where that is not known",
    "high": "as `low`",
    "half_width": "(high - low) / 2; 0 where all runs gave the same",
    "level": "0.95",
    "count": "runs, or pairs of runs, it rests on",
    "how": "how the interval was found, or why there is none",
}

_DIFFERENCE = {
    "ratio": "mean of the side / mean of A; null by zero",
    "pairs": "pairs of runs with the same seed, and so the same random numbers; 0 where there are none and "
    "the interval is Welch's",
    "verdict": "more than noise: the interval leaves out 0; not more than noise: it does not; no difference; "
    "one seed: there is no interval",
}

#: Keys of what `clustersim compare --json` prints: key → what it is.
COMPARED: dict[str, str] = {
    "schema_version": "version of this page",
    "question": "compare",
    "level": "how sure the intervals are, 0.95",
    "sides[].side": "A, B, C ...; all are held against A",
    "sides[].name": "name of the scenario",
    "sides[].where": "folder of the result",
    "sides[].scenario_hash": "hash of the resolved scenario, of the first run",
    "sides[].seeds[]": "seeds of the runs",
    "sides[].phases[]": "phases that ran",
    "differs[].key": "a key of the resolved scenario that is not the same on all sides",
    "differs[].values[]": "its value on each side; null where it is not set; what is long is cut",
    "metrics[].metric": "name of a headline number",
    "metrics[].dimension": "time (s), size (bytes), rate (tokens/s), share (of one) or number",
    "metrics[].better": "more or less",
    "metrics[].values[]": "of each side, an interval; null where it has no such number",
    "metrics[].differences[].side": "of each side but A: side - A, an interval and what follows",
    "metrics[].differences[].lacking": "instead, why it cannot be compared",
    "explained[].side": "of each side but A",
    "explained[].phases[].phase": "a phase that ran on both sides",
    "explained[].phases[].basis": "critical path: the mean step's, by cause; or GPU time: what a step costs "
    "the mean GPU, where no spans were recorded",
    "explained[].phases[].steps[]": "of A and of the side: steps that are `explained`, of `all`, in one run",
    "explained[].phases[].a": "mean over the compared runs of A, s",
    "explained[].phases[].b": "mean over those of the side, s",
    "explained[].phases[].difference": "b - a: an interval and a difference's keys",
    "explained[].phases[].parts[].cause": "what makes part of the difference",
    "explained[].phases[].parts[].words": "what it is",
    "explained[].phases[].parts[].a": "s of it in A; those of all parts add up to `a`",
    "explained[].phases[].parts[].b": "s of it on the side",
    "explained[].phases[].parts[].share": "of the whole difference; null where there is none",
    "explained[].phases[].parts[].difference": "b - a: those of all parts add up to the whole difference",
    "broken[]": "sentences on the bounds of --fail-if that are broken",
    "notes[]": "what cannot be compared, or only with care",
}

#: Keys of the summary.json that `clustersim run --seeds N` leaves: key → what it is.
REPLICATED: dict[str, str] = {
    "schema_version": "version of this page",
    "question": "seeds",
    "name": "name of the scenario",
    "scenario_hash": "hash of the resolved scenario with the first seed",
    "seeds[]": "of the replications; the summary of each is summaries/seed-<seed>.json: as summary.json of a "
    "run, without `gpus`, `links`, `wall_seconds` and `beside`, and beside it `paths`",
    "level": "how sure the intervals are, 0.95",
    "metrics.<metric>": "mean over the replications of a headline number of each run, and so of its p50 or "
    "p99: an interval",
    "metrics.<metric>.dimension": "as in a comparison",
    "metrics.<metric>.min": "smallest of the replications",
    "metrics.<metric>.max": "largest of them",
    "warm_up.<phase>.cut[]": "steps left out as warm-up by MSER-5, of each replication",
    "warm_up.<phase>.steps": "steps of a replication",
    "warm_up.<phase>.settled": "in how many replications the cut lies before half",
    "warm_up.<phase>.mean": "mean of the steps without warm-up, an interval over the replications, s",
    "warm_up.<phase>.p99": "p99 of these, likewise, s",
    "paths.<phase>.<cause>": "seconds of the mean step's critical path, an interval; `paths.<phase>` is null "
    "where no spans were recorded",
}

_HEAD = f"""# Comparisons and replications

Schema version {SCHEMA_VERSION}. Printed from `clustersim/analysis/compare_schema.py`; do not edit it.

All quantities are SI: seconds, bytes, bytes/s; shares are fractions of one. `[]` stands for every entry of a
list, `<x>` for a key that depends on the run.

A run is exact for its seed. An interval says how far the mean over other seeds may be from what was found: it
is Student's t over replications. Runs with the same seed have the same random numbers on both sides, so what
is compared are pairs, and the interval is that of their differences. Each interval is right in 19 of 20
cases: of twenty numbers that do not differ, one will seem to.

"""


def compare_page() -> str:
    """docs/compare.md: every key with its meaning."""
    return (
        f"{_HEAD}## clustersim compare --json\n\n{_table(COMPARED)}\n"
        f"## summary.json of clustersim run --seeds\n\n{_table(REPLICATED)}\n"
        f"## An interval\n\n{_table(_INTERVAL)}\n"
        f"## A difference\n\nAn interval, and:\n\n{_table(_DIFFERENCE)}"
    )


def _table(meanings: dict[str, str]) -> str:
    rows = "".join(f"| `{key}` | {meaning} |\n" for key, meaning in meanings.items())
    return f"| key | what it is |\n|---|---|\n{rows}"
