"""One question: how far would the numbers move under other seeds? One scenario, once for each of several.

All replications run side by side on all cores, and every one that is done is kept at once: the same call goes
on where it was interrupted. The folder is no result of a single run: it holds no trace, but the summaries of
all replications and one with means and intervals over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustersim.analysis.compare import Record, record, summed_up
from clustersim.analysis.compare_schema import SCHEMA_VERSION
from clustersim.analysis.critical_path import CAUSES
from clustersim.analysis.statistics import LEVEL, mean_interval
from clustersim.errors import ClustersimError, ResultError
from clustersim.spec.scenario import Scenario
from clustersim.spec.writing import scenario_hash, to_toml
from clustersim.study.cases import Base, Bench, Case, Tell, key_of, variant, write_whole
from clustersim.study.run import load, run_scenario
from clustersim.trace.plain import json_text, plain, read_json
from clustersim.trace.results import SCENARIO, SUMMARY, check_place

QUESTION = "seeds"
KEPT = "cases.jsonl"
SUMMARIES = "summaries"


@dataclass(frozen=True, slots=True)
class Plan:
    """Replications that are to be run.

    base      the scenario as it was named
    scenario  with the first seed
    seeds     of all
    folder    where they are to lie
    """

    base: Base
    scenario: Scenario
    seeds: tuple[int, ...]
    folder: Path

    def cases(self) -> list[Case]:
        """One for each seed."""
        return [variant(self.base, f"seed {seed}", (f"seed={seed}",)) for seed in self.seeds]


def planned(
    file: str | Path, overrides: Sequence[str], seed: int | None, count: int, out: Path | None = None
) -> Plan:
    """Replications of a scenario file with `count` seeds, from its own or `seed` on.

    out      the folder itself; by default results/<name>-<hash>-seeds<count>
    Raises   ScenarioError for the mistakes of the file; ResultError where something else lies in the folder
    """
    scenario = load(file, overrides, seed)
    name = f"{scenario.name}-{scenario_hash(scenario)}-seeds{count}"
    folder = out if out is not None else Path("results") / name
    if not (folder / KEPT).is_file():
        # Of an interrupted call there is nothing else yet.
        check_place(folder)
    seeds = tuple(range(scenario.seed, scenario.seed + count))
    return Plan(Base(str(file), tuple(overrides)), scenario, seeds, folder)


def replicate(plan: Plan, tell: Tell = lambda done, all_: None, workers: int = 0) -> dict[str, Any]:
    """Runs what is not done yet, writes the folder and gives its summary.

    tell     called after every replication with (done, all)
    workers  processes; 0 for one per core
    Raises   ClustersimError where a replication fails: means over the others would leave out the worst
    """
    with Bench(workers, plan.folder / KEPT, resume=True, work=replication) as bench:
        outcomes = bench.all(plan.cases(), tell)
    for seed, outcome in zip(plan.seeds, outcomes, strict=True):
        if outcome.figures is None:
            raise ClustersimError(
                f"{plan.base.file}: the replication with seed {seed} failed, so there is no mean: "
                f"{outcome.error}"
            )
    records = {s: o.figures for s, o in zip(plan.seeds, outcomes, strict=True) if o.figures is not None}
    found: dict[str, Any] = plain(_summary(plan, records))
    _save(plan, records, found)
    return found


def replication(scenario: Scenario) -> dict[str, Any]:
    """Runs a scenario and keeps its record."""
    result = run_scenario(scenario)
    found: dict[str, Any] = plain(record(result.summary, result.trace.raw))
    return found


def done(plan: Plan) -> int:
    """How many replications are kept already, by this version of the program."""
    path = plan.folder / KEPT
    if not path.is_file():
        return 0
    keys = {key_of(case.scenario) for case in plan.cases() if case.scenario is not None}
    with Bench(1, path, resume=True, work=replication) as bench:
        return sum(bench.has(key) for key in keys)


def is_replications(folder: Path) -> bool:
    """Whether a folder holds replications, whole."""
    try:
        return read_json(folder / SUMMARY, "missing").get("question") == QUESTION
    except ResultError:
        return False


def read_replications(folder: Path) -> tuple[dict[str, Any], dict[int, Record]]:
    """Summary of the folder, and seed → record.

    Raises   ResultError where a part is missing, damaged or of another version
    """
    found = read_json(folder / SUMMARY, "missing, so these are no replications")
    if found.get("schema_version") != SCHEMA_VERSION:
        raise ResultError(
            f"{folder}: replications of version {found.get('schema_version')}, this program reads "
            f"{SCHEMA_VERSION}; run `clustersim run FILE --seeds N` again"
        )
    missing = "missing; the replications are not whole"
    return found, {s: read_json(folder / SUMMARIES / f"seed-{s}.json", missing) for s in found["seeds"]}


def _save(plan: Plan, records: Mapping[int, Record], found: Mapping[str, Any]) -> None:
    for seed, one in records.items():
        write_whole(plan.folder / SUMMARIES / f"seed-{seed}.json", json_text(one))
    write_whole(plan.folder / SCENARIO, to_toml(plan.scenario))
    # Last: with it the folder counts as whole.
    write_whole(plan.folder / SUMMARY, json_text(found))


def _summary(plan: Plan, records: Mapping[int, Record]) -> dict[str, Any]:
    phases = list(next(iter(records.values()))["summary"]["phases"])
    return {
        "schema_version": SCHEMA_VERSION,
        "question": QUESTION,
        "name": plan.scenario.name,
        "scenario_hash": scenario_hash(plan.scenario),
        "seeds": list(plan.seeds),
        "level": LEVEL,
        "metrics": summed_up(records),
        "warm_up": dict(_warm_up(phases, records)),
        "paths": {phase: _paths(phase, records) for phase in phases},
    }


def _warm_up(phases: Sequence[str], records: Mapping[int, Record]) -> Iterator[tuple[str, Any]]:
    for phase in phases:
        ran = [one["summary"]["phases"][phase] for one in records.values()]
        held = [found["steady"] for found in ran]
        yield (
            phase,
            {
                "cut": [one["cut"] for one in held],
                "steps": ran[0]["steps"],
                "settled": sum(one["settled"] for one in held),
                "mean": mean_interval([one["mean"] for one in held]).as_json(),
                "p99": mean_interval([one["p99"] for one in held]).as_json(),
            },
        )


def _paths(phase: str, records: Mapping[int, Record]) -> dict[str, Any] | None:
    found = [one["paths"].get(phase) for one in records.values()]
    if not all(found):
        return None
    each = [one["mean"]["by"] for one in found if one]
    return {
        cause: mean_interval([by.get(cause, 0.0) for by in each]).as_json()
        for cause in CAUSES
        if any(cause in by for by in each)
    }
