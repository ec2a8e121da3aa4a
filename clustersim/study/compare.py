"""One question: which of these deployments is faster, by how much, and is that more than noise?

What is compared are result folders, replications, or scenario files, which are run: each with the same seeds,
so that all of them see the same random numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from clustersim.analysis import compare as analysis
from clustersim.analysis.compare import METRICS, Side, record
from clustersim.errors import ClustersimError, ResultError, nearest
from clustersim.spec.documents import DocumentError, values_of
from clustersim.spec.writing import to_toml
from clustersim.study.cases import Tell
from clustersim.study.inspecting import RESULTS, find_result, open_result
from clustersim.study.replications import (
    Plan,
    is_replications,
    planned,
    read_replications,
    replicate,
)
from clustersim.study.run import find, load, result_folder, run_scenario
from clustersim.trace.plain import plain
from clustersim.trace.results import SCENARIO

#: What it is called to run a scenario: a bar with that title.
Bar = Callable[[str], AbstractContextManager[Tell]]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_BOUND = re.compile(r"\s*([^<>=]+?)\s*([<>])\s*(\S+)\s*")
_NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+")
_EXAMPLE = '"step p99 > 1.05"'


# ---- sides ----------------------------------------------------------------------------------------------


def compare(
    names: Sequence[str],
    bar: Bar,
    seeds: int = 0,
    overrides: Sequence[str] = (),
    others: Sequence[str] = (),
    seed: int | None = None,
    root: Path = RESULTS,
) -> dict[str, Any]:
    """Results side by side, the first as what the others are held against.

    names      two or more: folders, names of results, or scenario files
    bar        shows how far a run is
    seeds      replications of each scenario file; 0 runs each once and leaves its result
    overrides  "key.path=value" of scenario files, and seed
    others     more of them, of all sides but the first; one file alone is then both sides
    Returns    the keys of `compare_schema.COMPARED` but `broken`
    Raises     ClustersimError for a name that is neither, and for mistakes of a file before any is run
    """
    names = [*names, *names] if len(names) == 1 and others else names
    if not 2 <= len(names) <= len(_LETTERS):
        raise ClustersimError(
            f"compare: {len(names)} name; name two results or scenario files or more, {len(_LETTERS)} at most"
        )
    files = [is_scenario(name) for name in names]
    if not any(files) and (seeds or overrides or seed is not None):
        raise ClustersimError("--seeds, --set and --seed: are for scenario files, and only results are named")
    if others and not any(files[1:]):
        raise ClustersimError("--set-b: is for scenario files behind the first name")
    # All names first: a mistake in the last one shall not be found after the first has run for minutes.
    todo = [
        _to_run(name, bar, seeds, (*overrides, *(others if place else ())), seed)
        if file
        else _to_read(name, root)
        for place, (name, file) in enumerate(zip(names, files, strict=True))
    ]
    sides = [ready(letter) for letter, ready in zip(_LETTERS, todo, strict=False)]
    found: dict[str, Any] = plain(analysis.compare(sides))
    return found


def is_scenario(name: str) -> bool:
    """Whether a name means a scenario file."""
    return Path(name).suffix == ".toml" and not Path(name).is_dir()


Ready = Callable[[str], Side]


def _to_read(name: str, root: Path) -> Ready:
    folder = find_result(name, root)
    if is_replications(folder):
        return lambda letter: _replicated(letter, folder)
    found = open_result(name, root)

    def side(letter: str) -> Side:
        one = record(found.summary, found.trace)
        tables = _tables(found.scenario_text, found.folder / SCENARIO)
        return Side(
            letter, str(found.summary["name"]), str(folder), {int(found.summary["seed"]): one}, tables
        )

    return side


def _replicated(letter: str, folder: Path) -> Side:
    summary, records = read_replications(folder)
    path = folder / SCENARIO
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: damaged: {error}") from error
    return Side(letter, str(summary["name"]), str(folder), records, _tables(text, path))


def _tables(text: str, path: Path) -> Mapping[str, Any]:
    try:
        return values_of(text)
    except DocumentError as error:
        raise ResultError(f"{path}: damaged: {error.problem}") from error


def _to_run(name: str, bar: Bar, seeds: int, overrides: Sequence[str], seed: int | None) -> Ready:
    if not find(name).is_file():
        raise ClustersimError(f"{name}: there is no such file{nearest(name, _beside(Path(name)))}")
    if seeds:
        plan = planned(name, overrides, seed, seeds)
        return lambda letter: _run_many(letter, plan, bar)
    scenario = load(name, overrides, seed)
    folder = result_folder(scenario)

    def side(letter: str) -> Side:
        with bar(f"{letter} {scenario.name}") as tell:
            result = run_scenario(scenario, name, tell)
        result.save(folder)
        one = record(result.summary, result.trace.raw)
        return Side(letter, scenario.name, str(folder), {scenario.seed: one}, values_of(to_toml(scenario)))

    return side


def _run_many(letter: str, plan: Plan, bar: Bar) -> Side:
    with bar(f"{letter} {plan.scenario.name}") as tell:
        replicate(plan, tell)
    return _replicated(letter, plan.folder)


def _beside(path: Path) -> Iterator[str]:
    if path.parent.is_dir():
        yield from (str(one) for one in path.parent.glob("*.toml"))


# ---- bounds that a difference may not break -------------------------------------------------------------


def broken(found: Mapping[str, Any], bounds: Sequence[str]) -> list[str]:
    """Sentences on the bounds that are broken, of what `compare` gives.

    bounds   "METRIC > RATIO" or "METRIC < RATIO", held against the ratio of each side's mean to A's
    Raises   ClustersimError for a bound that is none, and where a side has no such number
    """
    parsed = {text: parse_bound(text) for text in bounds}
    return [said for text, bound in parsed.items() for said in _broken(found, text, *bound)]


def parse_bound(text: str) -> tuple[str, str, float]:
    """Metric (a key of METRICS), sign and ratio of a bound such as "step p99 > 1.05".

    Raises   ClustersimError that says what is allowed
    """
    match = _BOUND.fullmatch(text) if len(text) <= 100 else None
    if match is None:
        raise ClustersimError(
            f'--fail-if: "{text[:100]}" is no bound; write METRIC > RATIO or METRIC < RATIO, '
            f"such as {_EXAMPLE}"
        )
    words, sign, number = match.groups()
    metric = _metric(words, text)
    if not _NUMBER.fullmatch(number) or not 0 < float(number) < math.inf:
        raise ClustersimError(
            f'--fail-if: "{text}": "{number}" is no ratio; 1.05 allows 5 % more than A, as in {_EXAMPLE}'
        )
    return metric, sign, float(number)


def _metric(words: str, text: str) -> str:
    """The name of the metric, whatever the order of its words."""
    wished = sorted(words.lower().split())
    for name in METRICS:
        if sorted(name.lower().split()) == wished:
            return name
    raise ClustersimError(
        f'--fail-if: "{text}": "{words}" is not known{nearest(words, METRICS)}; '
        f"there are {', '.join(METRICS)}"
    )


def _broken(found: Mapping[str, Any], text: str, metric: str, sign: str, limit: float) -> Iterator[str]:
    row = next((one for one in found["metrics"] if one["metric"] == metric), None)
    if row is None:
        there = ", ".join(one["metric"] for one in found["metrics"])
        raise ClustersimError(f'--fail-if: "{text}": no side has {metric} here; there are {there}')
    for one in row["differences"]:
        if one.get("ratio") is None:
            why = one.get("lacking", "A's is 0, so there is no ratio")
            raise ClustersimError(f'--fail-if: "{text}": cannot be told of {one["side"]}: {why}')
        if one["ratio"] > limit if sign == ">" else one["ratio"] < limit:
            yield (
                f"{metric} of {one['side']} is {one['ratio']:.6g} x that of A, {sign} {limit:g} "
                f"({one['verdict']})"
            )
