"""Results side by side: what is faster, whether that is more than noise, and which causes add up to it.

A side is one or several runs of one scenario under different seeds. The first side is what the others are
held against. Runs with the same seed have the same random numbers, so their differences are pairs, and what
both sides have in common falls out of them. `compare_schema.py` beside it says what every key means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

import numpy as np

from clustersim.analysis.compare_schema import SCHEMA_VERSION
from clustersim.analysis.critical_path import CAUSES, Paths
from clustersim.analysis.statistics import LEVEL, Interval, difference_interval, mean_interval
from clustersim.trace.record import Trace

#: Keys of a summary that a record goes without: lists by GPU and link, and what is no property of the run.
_LEFT_OUT = ("gpus", "links", "wall_seconds", "beside")
#: Relative: below this a difference is roundoff.
_ROUNDOFF = 1e-9
_LONGEST_VALUE = 160
#: Keys of a scenario that change nothing in what happens.
_ABOUT = ("name", "description", "claimed", "beside")

#: Tables of a scenario that say what a deployment is put to.
_ASKED = ("workload", "gating", "faults")

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Side:
    """One of the results that are compared.

    letter    A, B, C ...
    name      of the scenario
    where     folder or file
    records   seed → as `record`
    scenario  its resolved tables
    """

    letter: str
    name: str
    where: str
    records: Mapping[int, Record]
    scenario: Mapping[str, Any]

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that ran."""
        return tuple(next(iter(self.records.values()))["summary"]["phases"])


@dataclass(frozen=True, slots=True)
class Metric:
    """A headline number.

    value      summary → number in SI units, or None where the run has no such thing
    dimension  as `statistics.said` wants it
    better     "more" or "less"; "" for what is neither
    alike      it can be compared only where the same phases ran
    """

    value: Callable[[Record], float | None]
    dimension: str
    better: str
    alike: bool = False


def record(summary: Mapping[str, Any], trace: Trace) -> dict[str, Any]:
    """What is kept of one run: its summary without long lists, and its critical paths by cause.

    Returns  summary; paths: phase → `critical_path.shares`, None where no span was recorded
    """
    paths = _paths(trace, list(summary["phases"]))
    return {"summary": {k: v for k, v in summary.items() if k not in _LEFT_OUT}, "paths": paths}


def _paths(trace: Trace, phases: Sequence[str]) -> dict[str, Any]:
    if not len(trace.tables["spans"]["rank"]):
        return dict.fromkeys(phases)
    paths = Paths(trace)
    return {phase: paths.shares(phase) for phase in phases}


# ---- the headline numbers -------------------------------------------------------------------------------


def _at(*keys: str) -> Callable[[Record], float | None]:
    def value(summary: Record) -> float | None:
        found: Any = summary
        for key in keys:
            found = None if found is None else found.get(key)
        return None if found is None else float(found)

    return value


def exposed_exchange(summary: Mapping[str, Any]) -> float | None:
    """Time per step and GPU that exchanges take or are waited for with nothing computed meanwhile, s."""
    steps = sum(phase["steps"] for phase in summary["phases"].values())
    exposed = sum(
        phase["steps"] * (part["busy"] + part["wait"])
        for phase in summary["phases"].values()
        for part in phase["parts"]
        if part["kind"] == "exchange" and part["stream"] == "compute"
    )
    return exposed / steps if steps else None


#: Name → headline number, in the order in which they are shown.
METRICS: dict[str, Metric] = {
    "throughput": Metric(_at("throughput", "total_tokens_per_second"), "rate", "more", True),
    "TPOT mean": Metric(_at("latency", "tpot", "mean"), "time", "less"),
    "TPOT p99": Metric(_at("latency", "tpot", "p99"), "time", "less"),
    "TTFT mean": Metric(_at("latency", "ttft", "mean"), "time", "less"),
    "TTFT p50": Metric(_at("latency", "ttft", "p50"), "time", "less"),
    "TTFT p99": Metric(_at("latency", "ttft", "p99"), "time", "less"),
    "step mean": Metric(_at("latency", "step", "mean"), "time", "less", True),
    "step p50": Metric(_at("latency", "step", "p50"), "time", "less", True),
    "step p99": Metric(_at("latency", "step", "p99"), "time", "less", True),
    **{
        f"{phase} step {statistic}": Metric(_at("phases", phase, "step", statistic), "time", "less")
        for phase in ("prefill", "decode")
        for statistic in ("mean", "p99")
    },
    **{
        f"settled {phase} step": Metric(_at("phases", phase, "steady", "mean"), "time", "less")
        for phase in ("prefill", "decode")
    },
    "exposed exchange": Metric(exposed_exchange, "time", "less", True),
    "imbalance": Metric(_at("experts", "imbalance", "mean"), "number", "less"),
    "MFU": Metric(_at("mfu"), "share", "more"),
    "memory": Metric(_at("memory", "total"), "size", "less"),
}


def summed_up(records: Mapping[int, Record]) -> dict[str, dict[str, Any]]:
    """Metric → mean over runs with its interval, smallest and largest; those that some run lacks are left
    out, and steps by phase where there is just one phase."""
    found = {}
    for name in shown_metrics([tuple(r["summary"]["phases"]) for r in records.values()]):
        values = _values(records, name)
        if values and not name.startswith("settled"):
            each = list(values.values())
            spread = {"min": min(each), "max": max(each)}
            found[name] = {"dimension": METRICS[name].dimension, **mean_interval(each).as_json(), **spread}
    return found


def shown_metrics(phases: Sequence[tuple[str, ...]]) -> list[str]:
    """Names of metrics: steps of single phases only where some run has another phase."""
    mixed = len({phase for one in phases for phase in one}) > 1
    names = [f"{phase} step" for phase in ("prefill", "decode")]
    return [name for name in METRICS if mixed or not any(name.startswith(one) for one in names)]


def _values(records: Mapping[int, Record], name: str) -> dict[int, float]:
    """Seed → value; empty where some run has none."""
    found = {seed: METRICS[name].value(one["summary"]) for seed, one in records.items()}
    return {seed: v for seed, v in found.items() if v is not None} if None not in found.values() else {}


# ---- differences ----------------------------------------------------------------------------------------

#: What may be said of a difference.
VERDICTS = ("more than noise", "not more than noise", "no difference", "one seed")


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any]:
    """theirs - ours, its interval, and what may be said of it.

    ours, theirs  seed → value; pairs where at least two seeds, or the only one, are the same
    Returns       as `Interval.as_json`, and ratio (of the means of what was compared; None by zero), pairs,
                  verdict (of VERDICTS)
    """
    common = [seed for seed in ours if seed in theirs]
    paired = len(common) > 1 or (common and min(len(ours), len(theirs)) == 1)
    if paired:
        a, b = ([side[seed] for seed in common] for side in (ours, theirs))
        interval = mean_interval(_settled(np.subtract(b, a), max(map(abs, (*a, *b)))))
    else:
        a, b = list(ours.values()), list(theirs.values())
        interval = difference_interval(a, b)
    scale = max(map(abs, (*a, *b)))
    mean_a, mean_b = (mean_interval(values).value for values in (a, b))
    return {
        **interval.as_json(),
        "ratio": mean_b / mean_a if mean_a else None,
        "pairs": len(common) if paired else 0,
        "verdict": _verdict(interval, scale),
    }


def _settled(found: np.ndarray, scale: float) -> np.ndarray:
    """Differences that differ among each other by roundoff alone are the same."""
    same = np.abs(found - found[0]).max() <= _ROUNDOFF * scale
    return np.full_like(found, found.mean()) if same else found


def _verdict(interval: Interval, scale: float) -> str:
    if abs(interval.value) <= _ROUNDOFF * scale and not interval.half_width:
        return "no difference"
    held = interval.holds(0.0)
    if held is None:
        return "one seed"
    return "not more than noise" if held else "more than noise"


# ---- explained by cause ---------------------------------------------------------------------------------

#: Basis of an explanation → what its parts are of.
BASES = {
    "critical path": "the mean step's critical path by cause",
    "GPU time": "what a step costs the mean GPU; no spans were recorded on some side, so critical paths are "
    "not known",
}
_GPU_TIME = {
    "compute": "computing",
    "exchange": "sending and receiving with nothing computed meanwhile",
    "wait": "ready, but a peer is not",
    "idle": "nothing to do",
}


def explained(ours: Side, theirs: Side) -> list[dict[str, Any]]:
    """For each phase that ran on both sides, the difference of a step cut into causes that add up to it.

    Returns  phase, basis (of BASES), steps (of each side), a, b: s; difference as `difference`;
             parts: cause, words, a, b, share (of the difference) and difference, longest first
    """
    return [_explained(ours, theirs, phase) for phase in ours.phases if phase in theirs.phases]


def _explained(ours: Side, theirs: Side, phase: str) -> dict[str, Any]:
    known = all(one["paths"].get(phase) for side in (ours, theirs) for one in side.records.values())
    basis = "critical path" if known else "GPU time"
    cut = _of_path if known else _of_gpu
    a, b = ({seed: cut(one, phase) for seed, one in side.records.items()} for side in (ours, theirs))
    whole = difference(_totals(a), _totals(b))
    words = CAUSES if known else _GPU_TIME
    parts = [_part(cause, words[cause], a, b, whole["value"]) for cause in words if _there(cause, a, b)]
    parts.sort(key=lambda part: -abs(part["difference"]["value"]))
    used = _used(a, b)
    return {
        "phase": phase,
        "basis": basis,
        "steps": [_steps(side, phase, known) for side in (ours, theirs)],
        "a": _mean(_totals(used[0])),
        "b": _mean(_totals(used[1])),
        "difference": whole,
        "parts": parts,
    }


def _used(a: Mapping[int, Any], b: Mapping[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
    """What `difference` compares: common seeds only, where there are pairs."""
    common = [seed for seed in a if seed in b]
    if len(common) > 1 or (common and min(len(a), len(b)) == 1):
        return {s: a[s] for s in common}, {s: b[s] for s in common}
    return dict(a), dict(b)


Cut = Mapping[int, Mapping[str, float]]


def _part(cause: str, words: str, a: Cut, b: Cut, whole: float) -> dict[str, Any]:
    ours, theirs = ({seed: by.get(cause, 0.0) for seed, by in side.items()} for side in (a, b))
    found = difference(ours, theirs)
    used = _used(ours, theirs)
    return {
        "cause": cause,
        "words": words,
        "a": _mean(used[0]),
        "b": _mean(used[1]),
        "share": found["value"] / whole if whole else None,
        "difference": found,
    }


def _there(cause: str, *sides: Cut) -> bool:
    return any(by.get(cause) for side in sides for by in side.values())


def _totals(side: Cut) -> dict[int, float]:
    return {seed: fsum(by.values()) for seed, by in side.items()}


def _mean(values: Mapping[int, float]) -> float:
    return mean_interval(list(values.values())).value


def _of_path(one: Record, phase: str) -> dict[str, float]:
    return dict(one["paths"][phase]["mean"]["by"])


def _of_gpu(one: Record, phase: str) -> dict[str, float]:
    """Seconds per step of the mean GPU; they add up to the period."""
    ran = one["summary"]["phases"][phase]
    inline = [part for part in ran["parts"] if part["stream"] == "compute"]
    found = {kind: fsum(p["busy"] for p in inline if p["kind"] == kind) for kind in ("compute", "exchange")}
    found["wait"] = fsum(part["wait"] for part in inline)
    return {**found, "idle": ran["period"] - fsum(found.values())}


def _steps(side: Side, phase: str, known: bool) -> dict[str, int]:
    """Of how many steps, in one run: of the paths, and all."""
    one = next(iter(side.records.values()))
    ran = one["summary"]["phases"][phase]["steps"]
    return {"explained": one["paths"][phase]["steps"] if known else ran, "all": ran}


# ---- all of it ------------------------------------------------------------------------------------------


def compare(sides: Sequence[Side]) -> dict[str, Any]:
    """Two or more sides, the first as what the others are held against: the keys of `compare_schema`."""
    first, *others = sides
    return {
        "schema_version": SCHEMA_VERSION,
        "question": "compare",
        "level": LEVEL,
        "sides": [_about(side) for side in sides],
        "differs": differs([side.scenario for side in sides]),
        "metrics": list(_metrics(sides)),
        "explained": [
            {"side": other.letter, "phases": explained(first, other)} for other in others
        ],
        "notes": list(_notes(sides)),
    }  # fmt: skip


def _about(side: Side) -> dict[str, Any]:
    return {
        "side": side.letter,
        "name": side.name,
        "where": side.where,
        "scenario_hash": next(iter(side.records.values()))["summary"].get("scenario_hash"),
        "seeds": sorted(side.records),
        "phases": list(side.phases),
    }


def _metrics(sides: Sequence[Side]) -> Iterator[dict[str, Any]]:
    first, *others = sides
    for name in shown_metrics([side.phases for side in sides]):
        values = [_values(side.records, name) for side in sides]
        if not any(values) or (name.startswith("settled") and not _cut(sides, name)):
            continue
        metric = METRICS[name]
        yield {
            "metric": name,
            "dimension": metric.dimension,
            "better": metric.better,
            "values": [mean_interval(list(v.values())).as_json() if v else None for v in values],
            "differences": [
                {"side": other.letter, **difference(values[0], found)}
                if values[0] and found and (other.phases == first.phases or not metric.alike)
                else {"side": other.letter, "lacking": _lacking(metric, first, other, values[0], found)}
                for other, found in zip(others, values[1:], strict=True)
            ],
        }


def _cut(sides: Sequence[Side], name: str) -> bool:
    """Whether any warm-up was cut; else the settled mean is the mean."""
    phase = name.split()[1]
    ran = [one["summary"]["phases"].get(phase) for side in sides for one in side.records.values()]
    # A result of an older version does not tell.
    return any(found and found.get("steady") and found["steady"]["cut"] for found in ran)


def _lacking(metric: Metric, first: Side, other: Side, ours: Any, theirs: Any) -> str:
    if metric.alike and first.phases != other.phases:
        return f"{first.letter} ran {_said(first.phases)}, {other.letter} {_said(other.phases)}"
    return f"{' and '.join(s.letter for s, v in ((first, ours), (other, theirs)) if not v)} has none"


def _said(phases: Sequence[str]) -> str:
    return " and ".join(phases) or "no steps"


def _notes(sides: Sequence[Side]) -> Iterator[str]:
    """What cannot be compared, or only with care."""
    first, *others = sides
    for other in others:
        pair = f"{first.letter} and {other.letter}"
        theirs, ours = (_named(side.scenario.get("model")) for side in (other, first))
        if first.scenario.get("model") != other.scenario.get("model"):
            yield (
                f"{pair} serve different models ({ours} and {theirs}): times, rates and memory are compared "
                "as they are, but a token is not the same work."
            )
        if first.phases != other.phases:
            yield (
                f"{first.letter} ran {_said(first.phases)}, {other.letter} {_said(other.phases)}: what mixes "
                "phases (throughput, all steps, exposed exchange) is not compared."
            )
        asked = [key for key in _ASKED if first.scenario.get(key) != other.scenario.get(key)]
        if asked:
            yield (
                f"{pair} were not put to the same test, their {' and '.join(asked)} differ: part of the "
                "differences may be due to that and not to how they are deployed."
            )
        yield from _seed_notes(first, other)
        unknown = {
            phase
            for side in (first, other)
            for one in side.records.values()
            for phase, found in one["paths"].items()
            if found is None and phase in first.phases and phase in other.phases
        }
        if unknown:
            yield f"{pair}: explained by {BASES['GPU time']}."


def _seed_notes(first: Side, other: Side) -> Iterator[str]:
    a, b = set(first.records), set(other.records)
    pair = f"{first.letter} and {other.letter}"
    if not a & b:
        yield f"{pair} have no seed in common: differences hold the noise of both sides, and not of pairs."
    elif a != b and len(a & b) > 1:
        yield f"{pair}: differences are of the {len(a & b)} seeds that both have."
    if min(len(a), len(b)) == 1:
        yield (
            f"{pair}: one seed, so values are exact for it and have no interval; "
            "`clustersim compare` of scenario files with --seeds 10 tells whether a difference is noise."
        )


def _named(model: Any) -> str:
    return str(model.get("name", "?")) if isinstance(model, Mapping) else str(model)


# ---- what differs in the scenarios ----------------------------------------------------------------------


def differs(scenarios: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Keys whose values are not the same on all sides: key, and values (None where it is not set).

    What says nothing about the run, such as its name and what is claimed of it, is left out.
    """
    flat = [dict(_flat({k: v for k, v in one.items() if k not in _ABOUT})) for one in scenarios]
    keys = dict.fromkeys(key for one in flat for key in one)
    return [
        {"key": key, "values": [_short(one.get(key)) for one in flat]}
        for key in keys
        if any(one.get(key) != flat[0].get(key) for one in flat)
    ]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key → value; tables and lists of tables are opened."""
    if isinstance(value, Mapping) and value:
        for name, entry in value.items():
            yield from _flat(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for place, entry in enumerate(value):
            yield from _flat(entry, f"{key}[{place}]")
    else:
        yield key, value


def _short(value: Any) -> Any:
    text = value if isinstance(value, str) else str(value)
    if len(text) <= _LONGEST_VALUE:
        return value
    return f"{text[: _LONGEST_VALUE // 2]}… ({len(text):,} characters)"
