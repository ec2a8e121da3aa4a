"""One question: what becomes of a deployment when load is uneven or hardware slow, and what would help?

The suite holds every stress against even load with the same random numbers; the breaking points say how
much of it the deployment bears before a wished bound is missed; the help runs the same cases under other
placements of experts. All of it is one list of cases, run side by side and kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clustersim.errors import ClustersimError, ResultError
from clustersim.spec.scenario import Scenario
from clustersim.spec.writing import scenario_hash
from clustersim.study.breaking import Probe, Range, as_json, breaking_point, together
from clustersim.study.cases import Base, Bench, Case, Outcome, studies_in, variant, write_whole
from clustersim.study.slo import Slo, default_slo, parse_slo
from clustersim.study.stress_cases import (
    AS_STATED,
    BALANCED,
    EVEN,
    STRESSES,
    Site,
    gini,
    placements_of,
    site_of,
    slow_gpu,
    slow_link,
)
from clustersim.study.stress_moves import moves_of, moving_table
from clustersim.study.stress_schema import SCHEMA_VERSION
from clustersim.study.stress_words import notes_of, said_break
from clustersim.trace.plain import json_text

#: Decode steps that are run of a longer scenario: each is like the one before it, and the motions of the
#: suite are scaled to them.
STEPS = 8
#: The default bound: so many times the p99 step under even load.
WORSE = 1.2
PARTS = ("suite", "breaking", "help")

REPORT = "stress.json"
#: Questions that leave their cases in a folder → the file of the answer.
REPORTS = {"stress": REPORT, "rebalance": "rebalance.json"}
KEPT = "cases.jsonl"
#: Drawings that may lie beside an answer; those that do not belong to it are taken away.
DRAWINGS = ("placements.svg", "placements-load.svg", "map.svg")


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked.

    base      the scenario
    parts     of PARTS; the suite's balanced case is always run
    slo       a bound as text, or empty for the default
    steps     decode steps, 0 for STEPS or fewer if the file has fewer
    """

    base: Base
    parts: tuple[str, ...] = PARTS
    slo: str = ""
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Listener:
    """Who is told what is done meanwhile.

    row   called with (kind, JSON value) for each row of the answer as soon as it is known: head, suite,
          breaking, help
    tell  called with (done, all) while cases run
    """

    row: Callable[[str, Any], None] = field(default=lambda kind, value: None)
    tell: Callable[[int, int], None] = field(default=lambda done, all_: None)


@dataclass(frozen=True, slots=True)
class Worse:
    """What a breaking point is looked for in.

    what       a sentence
    over       how far it is made worse, on a site
    overrides  for a value
    like       the stress of STRESSES that needs the same
    mildest    what its mildest value means
    """

    what: str
    over: Callable[[Site], Range]
    overrides: Callable[[Site, float], Sequence[str]]
    like: str
    mildest: str


#: Cause → how it is made worse until the bound is missed.
CAUSES: Mapping[str, Worse] = {
    "gini": Worse(
        "Gini coefficient of the experts' popularity",
        lambda site: Range(0.0, site.most_gini, 0.01, ratio=False),
        lambda site, value: gini(value),
        "real_text",
        "no skew",
    ),
    "slow GPU": Worse(
        "times that one GPU is slower",
        lambda site: Range(1.0, 16.0, 0.02, ratio=True),
        lambda site, value: (*EVEN, slow_gpu(site, value)),
        "slow_gpu",
        "the GPU as it is",
    ),
    "thin link": Worse(
        "what the bandwidth of one GPU's network card is divided by",
        lambda site: Range(1.0, 64.0, 0.02, ratio=True),
        lambda site, value: (*EVEN, slow_link(site, value)),
        "slow_link",
        "the card as it is",
    ),
}


def prepared(wish: Wish) -> tuple[Base, Scenario]:
    """The base with what all cases share, and the scenario as it is run.

    Raises   ScenarioError for the mistakes of the file
    """
    scenario = wish.base.scenario()
    shared = ["trace.level=sums"]
    steps = wish.steps or min(STEPS, scenario.workload.decode_steps)
    if scenario.workload.phase != "prefill" and steps:
        shared.append(f"workload.decode_steps={steps}")
    elif wish.steps:
        raise ClustersimError(
            f"--steps {wish.steps}: {wish.base.file} only reads prompts; it has no decode steps"
        )
    base = Base(wish.base.file, (*wish.base.overrides, *shared))
    return base, base.scenario()


def folder_of(scenario: Scenario, out: Path | None, *about: str, question: str = "stress") -> Path:
    """Where the answer lies: `out`, or results/<name>-<question>-<hash>.

    about     what else decides which cases are run
    question  of REPORTS
    """
    text = "\0".join((scenario_hash(scenario), *about))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return out if out is not None else Path("results") / f"{scenario.name}-{question}-{digest}"


def study_of(question: str, about: str) -> str:
    """What cases are cases of, in words."""
    return f"{question} of {about}" if about else question


def about(scenario: Scenario) -> str:
    """A scenario in words, with its hash."""
    return f"{scenario.name} ({scenario_hash(scenario)})"


def check_folder(folder: Path, question: str = "stress") -> None:
    """Raises ResultError, before anything is run, where something else than such an answer lies."""
    if folder.exists() and not folder.is_dir():
        raise ResultError(f"{folder}: is not a folder; a result cannot be written there")
    if not folder.is_dir():
        return
    report, kept = REPORTS[question], folder / KEPT
    studies = studies_in(kept) if kept.is_file() else set()
    others = sorted(study for study in studies if study.partition(" of ")[0] != question)
    if others:
        raise ResultError(f"{kept}: holds cases of {others[0]}, not of {question}, and is left alone")
    mine = (folder / report).is_file() or studies or (kept.is_file() and not kept.stat().st_size)
    if not mine and any(folder.iterdir()):
        raise ResultError(
            f"{folder}: holds files but no {report}, so it is not such a result and is left alone"
        )


def begin_anew(folder: Path, question: str = "stress") -> None:
    """Takes an earlier answer away: its cases go, and it must not stand beside those of another call."""
    for name in (REPORTS[question], *DRAWINGS):
        (folder / name).unlink(missing_ok=True)


def earlier_parts(wish: Wish, folder: Path, outdated: bool = False) -> tuple[tuple[str, ...], str]:
    """The parts that an earlier call answered for the same scenario, which stay; and a sentence on others.

    outdated  whether that call was one of another version of the program: then none stay
    """
    path = folder / REPORT
    if not path.is_file():
        return (), ""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["question"] != "stress":
            return (), ""
        parts = tuple(part for part in PARTS if part in found["parts"])
        same = found["scenario_hash"] == scenario_hash(prepared(wish)[1])
        bound = (found["slo"]["text"], found["slo"]["stated"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return (), f"{path}: cannot be read and is made anew: {error}"
    if not same:
        return (), ""
    others = [part for part in parts if part not in wish.parts]
    if outdated:
        told = f"{path}: {', '.join(others)} there are of another version of the program and are left out"
        return (), told if others else ""
    alike = bound == (parse_slo(wish.slo).said(), True) if wish.slo else not bound[1]
    if alike or "breaking" not in parts or "breaking" in wish.parts:
        return parts, ""
    # Other cases and runs would be needed; the suite and the help are the same runs, judged anew.
    left = tuple(part for part in parts if part != "breaking")
    return left, f"{path}: its breaking points are of another bound, {bound[0]}, and are left out"


def stress(wish: Wish, bench: Bench, listener: Listener | None = None) -> dict[str, Any]:
    """The answer, as `stress_schema.SCHEMA` describes it: JSON values in SI units.

    Raises   ScenarioError for mistakes of the file, ClustersimError for those of the bound, and where
             even the balanced case cannot be run
    """
    listener = listener or Listener()
    wished = parse_slo(wish.slo) if wish.slo else None
    base, scenario = prepared(wish)
    if wished and wished.metric in _lacking_latency(scenario):
        raise ClustersimError(f'--slo: "{wish.slo}": {base.file} has no {wished.subject()}')
    balanced = variant(base, BALANCED, EVEN)
    first = bench.all([balanced])[0]
    if first.figures is None:
        raise ClustersimError(f"{base.file}: cannot be run with even load: {first.error}")
    slo = wished or default_slo(first.figures, WORSE)
    own_steps = wish.base.scenario().workload.decode_steps
    head = _head(base, scenario, own_steps, slo, bool(wished))
    head["parts"] = [part for part in PARTS if part in wish.parts]
    listener.row("head", head)
    site = site_of(scenario, first.figures["steps"], first.figures["latency"]["step"]["mean"])
    run = _Run(base, site, slo, first, bench, listener)
    cases = _suite_cases(run, balanced)
    rows = run.rows(cases) if "suite" in wish.parts else []
    broken = run.breaking_points() if "breaking" in wish.parts else []
    helped = run.help(cases) if "help" in wish.parts else None
    found = {**head, "suite": rows, "breaking": broken, "help": helped}
    found["notes"] = list(notes_of(found))
    return found


def _lacking_latency(scenario: Scenario) -> tuple[str, ...]:
    """The latencies that no run of the scenario has."""
    lacking = {"decode": ("ttft",), "prefill": ("tpot",)}
    return lacking.get(scenario.workload.phase, ())


def _head(base: Base, scenario: Scenario, own_steps: int, slo: Slo, stated: bool) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "question": "stress",
        "name": scenario.name,
        "file": base.file,
        "scenario_hash": scenario_hash(scenario),
        "seed": scenario.seed,
        "decode_steps": {"run": scenario.workload.decode_steps, "in_file": own_steps},
        "slo": {"text": slo.said(), "subject": slo.subject(), "limit": slo.limit, "stated": stated},
    }


@dataclass(frozen=True, slots=True)
class _Entry:
    """A case of the suite with its sentence; `lacking` says why it does not apply here."""

    case: Case
    what: str
    lacking: str = ""


def _suite_cases(run: _Run, balanced: Case) -> list[_Entry]:
    entries = [_Entry(balanced, "every expert and every GPU is loaded alike")]
    stated = variant(run.base, AS_STATED)
    if stated.scenario != balanced.scenario:
        entries.append(_Entry(stated, "the scenario as its file states it"))
    for name, one in STRESSES.items():
        lacking = one.lacking(run.site)
        case = Case(name, (), None, lacking) if lacking else variant(run.base, name, one.overrides(run.site))
        entries.append(_Entry(case, one.said(run.site), lacking))
    return entries


@dataclass(frozen=True, slots=True)
class _Run:
    """What all parts of one answer share."""

    base: Base
    site: Site
    slo: Slo
    balanced: Outcome
    bench: Bench
    listener: Listener

    def rows(self, entries: Sequence[_Entry]) -> list[dict[str, Any]]:
        """The suite, each row told as soon as it and all before it are known."""
        found: dict[int, dict[str, Any]] = {}
        told = 0
        for position, outcome in self.bench.run([entry.case for entry in entries], self.listener.tell):
            found[position] = self._row(entries[position], outcome)
            while told in found:
                self.listener.row("suite", found[told])
                told += 1
        return [found[position] for position in range(len(entries))]

    def _row(self, entry: _Entry, outcome: Outcome) -> dict[str, Any]:
        return {
            "case": entry.case.name,
            "what": entry.what,
            "overrides": list(entry.case.overrides),
            "applies": not entry.lacking,
            "error": outcome.error,
            "against_balanced": self.ratios(outcome),
            "missed": self._missed(outcome),
            "figures": outcome.figures,
        }

    def ratios(self, outcome: Outcome) -> dict[str, float | None] | None:
        """Throughput and step of a case ÷ those of the balanced one."""
        if outcome.figures is None or self.balanced.figures is None:
            return None
        ours, theirs = outcome.figures, self.balanced.figures
        return {
            "tokens_per_second": _ratio(ours["tokens_per_second"], theirs["tokens_per_second"]),
            "p50_step": _ratio(ours["latency"]["step"]["p50"], theirs["latency"]["step"]["p50"]),
            "p99_step": _ratio(ours["latency"]["step"]["p99"], theirs["latency"]["step"]["p99"]),
        }

    def _missed(self, outcome: Outcome) -> bool | None:
        value = self.slo.value(outcome.figures)
        return None if value is None else self.slo.missed(value)

    def breaking_points(self) -> list[dict[str, Any]]:
        """Of every cause that applies here, where the bound is first missed."""
        outcomes: dict[tuple[str, float], Outcome] = {}

        def ask(pairs: Sequence[tuple[str, float]]) -> list[Probe]:
            cases = [
                variant(self.base, f"{cause} {at:g}", CAUSES[cause].overrides(self.site, at))
                for cause, at in pairs
            ]
            got = self.bench.all(cases, self.listener.tell)
            outcomes.update(zip(pairs, got, strict=True))
            return [self._probe(at, one) for (_, at), one in zip(pairs, got, strict=True)]

        ranges = {cause: one.over(self.site) for cause, one in CAUSES.items()}
        lacking = {cause: STRESSES[one.like].lacking(self.site) for cause, one in CAUSES.items()}
        searches = {
            cause: breaking_point(ranges[cause], self.slo.most) for cause in CAUSES if not lacking[cause]
        }
        found = together(searches, ask)
        rows = []
        for cause, one in CAUSES.items():
            over = ranges[cause]
            row: dict[str, Any] = {"cause": cause, "what": one.what, "lacking": lacking[cause]}
            row |= {"low": over.low, "high": over.high, "precision": over.precision}
            row["precision_is_ratio"] = over.ratio
            if cause in found:
                missed = found[cause].missed
                at = over.high if missed is None else missed
                row |= as_json(found[cause])
                row["overrides"] = list(one.overrides(self.site, at))
                row["figures"] = outcomes[cause, at].figures
            row["said"] = said_break(row, self.slo, one.mildest)
            self.listener.row("breaking", row)
            rows.append(row)
        return rows

    def _probe(self, at: float, outcome: Outcome) -> Probe:
        value = self.slo.value(outcome.figures)
        error = outcome.error or ("" if value is not None else f"there is no {self.slo.subject()}")
        return Probe(at, value, value is not None and self.slo.missed(value), error)

    def help(self, entries: Sequence[_Entry]) -> dict[str, Any] | None:
        """The cases that apply, under every placement; the file's own first."""
        if self.site.experts < 2 or self.site.ep < 2:
            return None
        kept = [entry for entry in entries if not entry.lacking]
        placements = placements_of(self.site)
        pairs = [(entry, name) for entry in kept for name in placements]
        cases = [
            variant(self.base, f"{entry.case.name} | {name}", (*entry.case.overrides, *placements[name]))
            for entry, name in pairs
        ]
        moves = moves_of(self.base, self.site, [entry.case for entry in kept])
        compared = [case for move in moves for case in (move.once, move.anew)]
        outcomes = self.bench.all([*cases, *compared], self.listener.tell)
        moved = outcomes[len(cases) :]
        cells = {
            (entry.case.name, name): self._cell(name, outcome)
            for (entry, name), outcome in zip(pairs, outcomes, strict=False)
        }
        found: dict[str, Any] = {
            "placements": [{"placement": name, "overrides": list(lay)} for name, lay in placements.items()],
            "rows": [
                {
                    "case": entry.case.name,
                    "what": entry.what,
                    "cells": [cells[entry.case.name, name] for name in placements],
                }
                for entry in kept
            ],
        }
        found["summary"] = list(_weighed(found))
        found["moving"] = moving_table(self.site, moves, moved, self._speed)
        self.listener.row("help", found)
        return found

    def _speed(self, outcome: Outcome) -> float | None:
        ratios = self.ratios(outcome)
        return None if ratios is None else ratios["tokens_per_second"]

    def _cell(self, name: str, outcome: Outcome) -> dict[str, Any]:
        figures = outcome.figures
        return {
            "placement": name,
            "error": outcome.error,
            "missed": self._missed(outcome),
            "against_balanced": self.ratios(outcome),
            "p99_step": figures and figures["latency"]["step"]["p99"],
            "tokens_per_second": figures and figures["tokens_per_second"],
            "imbalance": figures and figures["imbalance"] and figures["imbalance"]["mean"],
        }


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def _weighed(help_: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Of every placement: in how many cases it keeps the bound, and how bad its worst case is."""
    for place, about in enumerate(help_["placements"]):
        cells = [row["cells"][place] for row in help_["rows"]]
        ran = [cell for cell in cells if not cell["error"]]
        ratios = [cell["against_balanced"]["p99_step"] for cell in ran]
        yield {
            "placement": about["placement"],
            "ran": len(ran),
            "not_run": len(cells) - len(ran),
            "kept": sum(cell["missed"] is False for cell in ran),
            "worst": max(ratios) if ratios else None,
            "mean": sum(ratios) / len(ratios) if ratios else None,
            "error": next((cell["error"] for cell in cells if cell["error"]), ""),
        }


def save(
    found: Mapping[str, Any], folder: Path, drawings: Mapping[str, str], question: str = "stress"
) -> None:
    """Writes the answer and its drawings, each whole or not at all; earlier drawings are not left beside it.

    drawings  file name → SVG text
    question  of REPORTS
    Raises    ResultError where that is not possible
    """
    for name, text in drawings.items():
        write_whole(folder / name, text)
    for name in set(DRAWINGS) - set(drawings):
        (folder / name).unlink(missing_ok=True)
    write_whole(folder / REPORTS[question], json_text(found))
