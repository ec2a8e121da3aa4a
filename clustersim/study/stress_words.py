"""Sentences of the stress suite: what stands out, where a bound breaks, and what helps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from clustersim.analysis.culprits import said_hottest, said_worst_gpu
from clustersim.study.slo import Slo
from clustersim.study.stress_cases import AS_STATED, BALANCED

Found = Mapping[str, Any]

#: A rank with so many times the mean tokens over the whole run is named as a cause.
_HOT = 1.15
#: An imbalance from which on it is mentioned.
_WORTH_A_WORD = 1.05
#: A placement that is faster by less is not said to help: draws alone make such differences.
_WORTH = 0.02
#: Cases that are listed in one sentence.
_LISTED = 4


def notes_of(found: Found) -> Iterator[str]:
    """Sentences on what stands out."""
    rows = {row["case"]: row for row in found["suite"] if not row["error"]}
    stressed = [row for name, row in rows.items() if name not in (BALANCED, AS_STATED)]
    if stressed:
        worst = max(stressed, key=lambda row: row["against_balanced"]["p99_step"])
        yield (
            f"The worst case is {worst['case']}: its p99 step takes {_times(worst)} x that under even load; "
            f"{said_cause(worst['figures'])}."
        )
    yield from _both_at_once(rows)
    if found["help"]:
        yield from helped(found["help"])
    elif "help" in found["parts"]:
        yield "There is nothing to place in another way: no experts, or all of them on one rank."


def said_cause(figures: Found) -> str:
    """What holds the run up, in one line; else the hot rank, or the GPU that others wait for."""
    if figures["cause"] is not None:
        said = str(figures["cause"]).rstrip(".")
        return said[0].lower() + said[1:]
    hot, waited = figures["hottest"], figures["worst_gpu"]
    if hot is not None and hot["load"] >= _HOT:
        return said_hottest(hot)
    return said_worst_gpu(waited) if waited is not None else "nobody waits for anybody"


def _times(row: Found) -> str:
    return f"{row['against_balanced']['p99_step']:.2f}"


def _both_at_once(rows: Found) -> Iterator[str]:
    names = ("hot_rank", "slow_gpu", "hot_on_slow_gpu")
    if not all(name in rows for name in names):
        return
    hot, slow, both = (rows[name]["against_balanced"]["p99_step"] - 1 for name in names)
    more = "more" if both > hot + slow else "no more"
    yield (
        f"A hot rank costs {hot:+.1%} of a step, a slow GPU {slow:+.1%}, the hot rank on the slow GPU "
        f"{both:+.1%}: {more} than the two added up."
    )


def said_break(row: Found, slo: Slo, mildest: str) -> str:
    """Where the bound breaks, with the range that was searched.

    row      an entry of `breaking` without this sentence
    mildest  what the mildest value means, in words
    """
    if row["lacking"]:
        return f"does not apply, {row['lacking']}"
    if row["verdict"] == "failed":
        wrong = next(probe for probe in row["probes"] if probe["error"])
        return f"not found: at {wrong['at']:g} {wrong['error']}"
    if row["verdict"] == "never":
        worst = (max if slo.most else min)(probe["value"] for probe in row["probes"])
        most = "at most" if slo.most else "at least"
        return (
            f"up to {row['high']:g}, the worst of {len(row['probes'])} values tried, the bound holds: "
            f"{slo.subject()} is {most} "
            f"{slo.said_value(worst)} against the bound {slo.said_value(slo.limit)}"
        )
    if row["verdict"] == "always":
        return (
            f"even at {row['low']:g} ({mildest}) the bound is missed: {slo.subject()} is "
            f"{slo.said_value(row['probes'][0]['value'])} against the bound {slo.said_value(slo.limit)}"
        )
    return _breaks(row)


def _breaks(row: Found) -> str:
    near = f"{row['precision']:.0%}" if row["precision_is_ratio"] else f"{row['precision']:g}"
    load = (row["figures"] or {}).get("imbalance")
    skewed = load is not None and load["mean"] >= _WORTH_A_WORD
    beside = f"; there the busiest rank has {load['mean']:.2f} x the mean load" if skewed and load else ""
    return (
        f"the bound holds at {row['kept_at']:.4g} and is first missed at {row['missed_at']:.4g} (searched "
        f"from {row['low']:g} to {row['high']:g}, to within {near}){beside}"
    )


def helped(help_: Found) -> Iterator[str]:
    """Which placement does better than the file's own: over all cases, in single ones, and if moved."""
    ran = [one for one in help_["summary"] if one["ran"]]
    own = help_["summary"][0]
    if own["ran"]:
        yield from _over_all(own, ran)
        yield from _in_single(help_)
    yield from _moved(help_["moving"])


def _over_all(own: Found, ran: list[Found]) -> Iterator[str]:
    # A mean over fewer cases is no mean to compare with.
    alike = [one for one in ran if one["ran"] == own["ran"]]
    best = min(alike, key=lambda one: (-one["kept"], one["mean"]))
    cases = f"the {own['ran']} cases"
    stated = f"as stated, it is kept in {own['kept']}, with a mean p99 step of {own['mean']:.2f} x balanced"
    if best["kept"] > own["kept"]:
        yield (
            f"Over {cases}, {best['placement']} keeps the bound most often: in {best['kept']}, with a mean "
            f"p99 step of {best['mean']:.2f} x balanced; {stated}."
        )
        return
    best = min(alike, key=lambda one: one["mean"])
    if best["mean"] < own["mean"] * (1 - _WORTH):
        yield (
            f"Over {cases}, no other placement keeps the bound more often; {best['placement']} has the least "
            f"mean p99 step, {best['mean']:.2f} x balanced, and keeps the bound in {best['kept']}; {stated}."
        )
        return
    yield (
        f"Over {cases}, no other placement keeps the bound more often or has a mean p99 step that is less by "
        f"{_WORTH:.0%}: {stated}."
    )


def _in_single(help_: Found) -> Iterator[str]:
    """The cases that some placement relieves, those first that it brings back under the bound."""
    better = []
    for row in help_["rows"]:
        own, *others = row["cells"]
        cells = [cell for cell in others if not cell["error"]]
        if own["error"] or not cells:
            continue
        best = min(cells, key=lambda cell: (bool(cell["missed"]), cell["p99_step"]))
        saved = own["missed"] and not best["missed"]
        if saved or best["p99_step"] < own["p99_step"] * (1 - _WORTH):
            ratios = (cell["against_balanced"]["p99_step"] for cell in (own, best))
            words = f"{row['case']} from {{:.2f}} to {{:.2f}} x ({best['placement']}".format(*ratios)
            better.append((not saved, words + (", bound kept)" if saved else ")")))
    if not better:
        yield f"In no single case is another placement's p99 step less by {_WORTH:.0%}."
        return
    better.sort(key=lambda one: one[0])
    more = f", and {len(better) - _LISTED} more in the table" if len(better) > _LISTED else ""
    listed = "; ".join(words for _, words in better[:_LISTED])
    yield f"In single cases another placement relieves the p99 step: {listed}{more}."


def _moved(moving: Found | None) -> Iterator[str]:
    """Whether placing experts anew pays where load moves."""
    rows = [row for row in (moving or {"rows": []})["rows"] if row["gain"] is not None]
    if not moving or not rows:
        return
    pays = [row for row in rows if row["gain"] >= _WORTH]
    best = max(rows, key=lambda row: row["gain"])
    how = (
        f"Experts placed anew every {moving['every']} steps while the load moves change tokens/s by "
        f"{best['gain']:+.1%} at best ({best['case']}, {best['placement']}, {best['transfer']}), the bill "
        "included, against the same placement left alone"
    )
    yield (
        how
        + (
            f": worth it in {len(pays)} of {len(rows)} runs. "
            if pays
            else f": not worth it in any of {len(rows)} runs. "
        )
        + (
            f"Each run has {moving['steps']} steps; where load keeps its shape longer, one bill serves more "
            "of them: `clustersim rebalance` looks for the interval."
        )
    )
